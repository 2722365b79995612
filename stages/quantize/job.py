"""What every process of a search is given, and what a survey finds: plain values, without torch."""

from dataclasses import dataclass
from typing import Literal

from stages.contract import Artifact
from stages.formats.dataset import DatasetInfo
from stages.formats.tokens import TokenRows
from stages.storage import Folder


@dataclass(frozen=True, slots=True)
class SearchJob:
    """What every process of a search is given."""

    model: Artifact
    resume: Folder
    calibration: TokenRows
    """What schemes are calibrated on."""
    dataset: DatasetInfo
    """What the model must fit; the KL is normalized over its vocabulary."""
    micro_batch: int | None
    device: str
    seed: int
    on_indivisible: Literal["fail", "keep"] = "fail"
    """See `stages.quantize.fitting`."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The linear layers of a model."""

    in_features: dict[str, int]
    """Input width of each layer that schemes quantize, by module name."""
    num_weights: int
    """Weights in those layers and in experts that are no layers of their own."""
    num_expert_weights: int
    """Weights in experts that are no layers of their own, which stay in 16 bits."""
    ignored: tuple[str, ...]
    """Linear layers that stay as they are, whatever the scheme."""
    vocabulary: tuple[str, ...]
    """Token embeddings, then the output head."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of the unquantized model."""

    layers: Layers
    num_parameters: int
    """Distinct parameters: a tied embedding counts once."""
    micro_batch: int
    """Rows of one forward pass: those given, or as many as fit."""
    replays_head: bool
    """Whether its output head can be replayed; where not, whole logits are kept."""
    dtype: str
    """The 16-bit type of what quantization leaves alone: the checkpoint's own, or bfloat16."""
    is_cast: bool
    """Whether the checkpoint is stored in 16 bits already, so that a cast is the model itself."""
    bytes_16: int
    """Its weights in 16 bits, which compression is told against."""
    num_tokens: int
    """Tokens that are measured."""
    noise: float
    """KL of the model to itself with another micro-batch, nats per token: what rounding alone makes of it."""
    whole_rows: bool = True
    """Whether it keeps the segments of a row apart by itself."""
