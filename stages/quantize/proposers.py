"""Which schemes a search tries: a proposer is asked again and again, with the trials so far, until it has no more.

Promises: a proposer is part of the stage's config, and what it proposes depends on its fields and on the trials that it
is given, so that an attempt that goes on after a crash proposes the same schemes and finds their receipts.

A new one is a subclass here (or in a user's own workflow file), given to `Quantize(proposer=…)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import Field, field_validator

from stages.contract import Config
from stages.formats.search import Trial
from stages.quantize.schemes import DEFAULT_SCHEMES, Scheme

__all__ = ["Grid", "Proposer"]


class Proposer(Config, ABC):
    """Chooses the schemes of a search, in rounds."""

    kind: str = Field(default="", validate_default=True)
    """The class's name, so that a logged config says which proposer ran."""

    @field_validator("kind")
    @classmethod
    def _is_own_name(cls, kind: str) -> str:
        if kind not in ("", cls.__name__):
            raise ValueError(f"kind is {kind!r}, expected {cls.__name__!r}, which is also the default")
        return cls.__name__

    @abstractmethod
    def propose(self, trials: Sequence[Trial]) -> Sequence[Scheme]:
        """Return the schemes to try next, which run at the same time.

        Args:
            trials: those of all rounds so far, done and failed, in the order in which they were proposed.

        Returns:
            Schemes; those that were tried already are left out, and the search ends where none is new.
        """


class Grid(Proposer):
    """A fixed list of schemes, in one round."""

    schemes: tuple[Scheme, ...] = Field(default=DEFAULT_SCHEMES, min_length=1)
    """What is tried, one trial each."""

    @field_validator("schemes")
    @classmethod
    def _names_differ(cls, schemes: tuple[Scheme, ...]) -> tuple[Scheme, ...]:
        names = [scheme.name for scheme in schemes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"schemes names {', '.join(twice)} more than once; expected each scheme once")
        return schemes

    def propose(self, trials: Sequence[Trial]) -> Sequence[Scheme]:
        """Return every scheme, once."""
        return () if trials else self.schemes
