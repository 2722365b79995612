"""What every process of a search is given, and what a survey finds: plain values, without torch."""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Layers:
    """The linear layers of a model."""

    in_features: dict[str, int]
    """Input width of each layer that schemes quantize, by module name."""
    num_weights: int
    """Weights in those layers."""
    ignored: tuple[str, ...]
    """Linear layers that stay as they are, whatever the scheme."""


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
    whole_rows: bool = True
    """Whether it keeps the segments of a row apart by itself."""
