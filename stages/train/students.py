"""Where a student's shape and first weights come from: fresh, or a checkpoint, its origin, made smaller or as it is.

Promise: the returned model has float32 weights, reads the dataset's tokens, and is the same for the same config, seed
and checkpoint. It is stored in the type of the checkpoint that it comes from, a fresh one in bfloat16. What does not
fit is refused with the values that would.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.contract import Config
from stages.errors import ConfigError
from stages.external.checkpoints import Checkpoint
from stages.formats.dataset import DatasetInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.models.narrowing import Importance


class Llama(Config):
    """A Llama with fresh weights; its vocabulary and context length are the dataset's."""

    kind: Literal["llama"] = "llama"
    layers: int = Field(ge=1)
    """Transformer blocks."""
    width: int = Field(ge=2)
    """Channels of the residual stream."""
    heads: int = Field(ge=1)
    """Attention heads; must divide `width`."""
    kv_heads: int | None = Field(None, ge=1)
    """Heads of keys and values; must divide `heads`. None is as many as `heads`."""
    ffn_width: int | None = Field(None, ge=1)
    """Channels inside the feed-forward blocks; None is 8/3 of `width`, rounded up to a multiple of 32
    (arXiv:2302.13971)."""
    tie_embeddings: bool = True
    """Input and output embeddings share weights: at small widths most weights would be embeddings else."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary position frequencies (arXiv:2104.09864)."""

    def model_post_init(self, _: Any) -> None:
        """Refuse heads that do not divide."""
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigError(
                f"width {self.width} over {self.heads} heads is no even whole number; choose heads that divide width"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"kv_heads is {self.kv_heads}, expected a divisor of heads = {self.heads}")


class Smaller(Config):
    """The architecture of the input `origin`, made smaller, with its weights where they fit."""

    kind: Literal["smaller"] = "smaller"
    layers: int | tuple[int, ...] | None = None
    """Blocks to keep: how many (the first and the last are among them), or which, counted from 0; None keeps all."""
    heads: int | None = Field(None, ge=1)
    """Attention heads to keep; None follows `width`, so that a head keeps its size. In architectures whose config has
    no head size of its own (GPT-2, Qwen2, Phi-3) the width follows the heads."""
    width: int | None = Field(None, ge=2)
    """Channels of the residual stream to keep; None keeps all."""
    ffn_width: int | None = Field(None, ge=1)
    """Channels inside the feed-forward blocks to keep; None shrinks them as `width`."""
    choice: Literal["importance", "position"] = "importance"
    """By what is chosen: what each part does on training text (Minitron, ShortGPT: `stages/models/importance.py`), or
    layers evenly spaced and of all else the leading ones, which are no better than random ones."""
    importance_tokens: int = Field(65_536, ge=1)
    """Tokens of training text on which importance is measured, at most."""

    @property
    def sizes(self) -> dict[str, Any]:
        """How much is kept of what: the fields of a `Size`."""
        return {name: getattr(self, name) for name in ("layers", "heads", "width", "ffn_width")}

    def model_post_init(self, _: Any) -> None:
        """Refuse a student that is no smaller."""
        if set(self.sizes.values()) == {None}:
            raise ConfigError(
                "Smaller has none of layers, heads, width and ffn_width; set one, or use Continue() for the origin's "
                "own size"
            )
        if isinstance(self.layers, int) and self.layers < 1:
            raise ConfigError(f"Smaller.layers is {self.layers}, expected at least 1")


class Continue(Config):
    """The weights of the input `origin` as they are."""

    kind: Literal["continue"] = "continue"


Student = Annotated[Llama | Smaller | Continue, Field(discriminator="kind")]
"""Any of them."""


def check_student(student: Llama | Smaller | Continue, sources: Mapping[str, Any]) -> None:
    """Check a student against the input `origin`, before anything runs.

    Raises:
        ConfigError: it needs an origin and has none, has one that it does not need, or is larger than its origin.
    """
    if isinstance(student, Llama):
        if "origin" in sources:
            raise ConfigError(
                "model is Llama(…), whose weights are fresh, and the input 'origin' is wired; leave origin= out, or "
                "use Smaller(…) or Continue()"
            )
        return
    if "origin" not in sources:
        how = "is cut from" if isinstance(student, Smaller) else "goes on from"
        raise ConfigError(
            f"model is {type(student).__name__}, which {how} the input 'origin', and none is wired; pass origin="
        )
    if isinstance(student, Smaller) and isinstance(origin := sources["origin"], Checkpoint):
        from stages.models.compatibility import check_cut

        check_cut(origin, student.sizes)


def build_student(
    student: Llama | Smaller | Continue,
    dataset: DatasetInfo,
    *,
    origin: Path | None,
    seed: int,
    importance: "Importance | None" = None,
) -> "PreTrainedModel":
    """Return the student before training, on the CPU.

    Args:
        student: what it shall be.
        dataset: what it is trained on.
        origin: folder of the checkpoint that it comes from; None for a fresh one.
        seed: of fresh weights.
        importance: of the checkpoint's parts, by which a smaller one keeps them; None keeps them by position.

    Raises:
        StageFailed: the checkpoint does not fit the dataset, or cannot be made smaller in this way.
    """
    if isinstance(student, Llama):
        return _fresh(student, dataset, seed)
    from stages.models.checkpoints import load_model
    from stages.models.compatibility import check_compatible
    from stages.models.narrowing import Size, narrow

    assert origin is not None, "check_student sees to it that there is one"
    check_compatible("the student's checkpoint", origin, dataset)
    model = load_model(origin, dtype="float32")
    if isinstance(student, Continue):
        return model
    smaller: PreTrainedModel = narrow(model, Size(**student.sizes), seed=seed, importance=importance)
    return smaller


def _fresh(student: Llama, dataset: DatasetInfo, seed: int) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=dataset.vocabulary_size,
        hidden_size=student.width,
        num_hidden_layers=student.layers,
        num_attention_heads=student.heads,
        num_key_value_heads=student.kv_heads or student.heads,
        intermediate_size=student.ffn_width or -(-student.width * 8 // (3 * 32)) * 32,
        max_position_embeddings=dataset.sequence_length,
        tie_word_embeddings=student.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": student.rope_theta},
        bos_token_id=dataset.bos_token_id,
        eos_token_id=dataset.eos_token_id,
        pad_token_id=_own_padding(dataset),
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _own_padding(dataset: DatasetInfo) -> int | None:
    """Return the padding token if it is nothing else: transformers gives it an embedding of zeros that never learns."""
    pad = dataset.pad_token_id
    return None if pad in (dataset.bos_token_id, dataset.eos_token_id) else pad
