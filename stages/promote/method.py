"""A way to train, and the models that it gave. Light: config only."""

from typing import Self

from pydantic import Field, model_validator

from stages.contract import Config

__all__ = ["Method"]


class Method(Config):
    """One side of a claim: a method, by the models that it gave with several training seeds."""

    name: str = Field(min_length=1)
    """What the claim calls it, e.g. `distilled`."""
    models: tuple[str, ...] = Field(min_length=1)
    """Candidates, one for each seed, in the same order of seeds on both sides: those at one place are a pair."""

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"method {self.name!r} has one model twice: {', '.join(self.models)}; expected one a seed")
        return self

    @classmethod
    def of(cls, side: "str | Method") -> "Method":
        """Return a method; one model is one of that name."""
        return side if isinstance(side, Method) else cls(name=side, models=(side,))
