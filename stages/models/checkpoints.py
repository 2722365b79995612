"""Loads and saves models as the hub lays them out: safetensors only, no code from outside, no network.

Promises: what is loaded has every weight that its config asks for (transformers fills a missing one with noise and only
warns); a tokenizer is saved beside its model as the very files that it came in.
Does not: download (`stages.storage.fetch` does), or look into the weights (`stages.teach` finds NaN).
"""

import errno
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import StageFailed, Transient
from stages.models.tokenization import copy_tokenizer_files
from stages.runtime.processes import quiet_transformers
from stages.runtime.translation import within_memory
from stages.storage import Folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PASSING_ERRNOS = (errno.EAGAIN, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
"""What an overloaded host or a network file system raises, and may not raise a minute later."""


def load_model(folder: Path, *, dtype: str = "float32", device: str = "cpu") -> "PreTrainedModel":
    """Load a causal language model for inference (`eval` mode).

    Args:
        folder: a checkpoint as the hub lays it out.
        dtype: torch's name of the weights' type, e.g. `bfloat16`; `auto` is what the checkpoint names.
        device: torch's name of the device.

    Raises:
        OutOfMemory: it does not fit the host's or the device's memory.
        Transient: its files cannot be read for now.
        StageFailed: no safetensors, an architecture that transformers has no causal language model for, or
            weights that are missing or of another shape than the config says.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    model_config(folder)
    if not list(folder.glob("*.safetensors")):
        raise StageFailed(f"{folder} has no *.safetensors weights; save the model again with `save_pretrained`")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype, None)
    if wanted != "auto" and not isinstance(wanted, torch.dtype):
        raise StageFailed(f"dtype={dtype!r} is no type of torch; expected e.g. 'float32', 'bfloat16' or 'auto'")
    try:
        with within_memory(f"loading the model in {folder}"):
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=wanted,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError) as error:
        text = f"cannot load the model in {folder}: {type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in PASSING_ERRNOS:
            raise Transient(text) from error
        raise StageFailed(text) from error
    problems = {name: sorted(map(str, loading[name])) for name in ("missing_keys", "mismatched_keys") if loading[name]}
    if problems:
        shown = "; ".join(f"{len(keys)} {name.replace('_', ' ')}, such as {keys[0]}" for name, keys in problems.items())
        raise StageFailed(
            f"the weights in {folder} are not those that its config.json describes: {shown}; save the model again"
        )
    if isinstance(wanted, torch.dtype):
        _unpack_four_bit_floats(model, wanted)
    with within_memory(f"moving the model in {folder} to {device}"):
        loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _unpack_four_bit_floats(model: "PreTrainedModel", dtype: "torch.dtype") -> None:
    """Unpack a checkpoint in NVFP4 or MXFP4 now, into the type that it is to compute in.

    compressed-tensors 0.19 unpacks it at the first forward pass, into bfloat16 whatever the model's type is, so that
    its first product fails in any other one.
    """
    compressor: Any = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    groups = compressor.quantization_config.config_groups.values() if compressor else ()
    if any(group.weights and group.weights.type == "float" and group.weights.num_bits == 4 for group in groups):
        compressor.decompress_model(model)
        model.to(dtype)


def save_checkpoint(model: "PreTrainedModel", tokenizer: Path | None, out: Folder, name: str) -> None:
    """Save a model below `name/`, with the tokenizer that lies in a folder.

    Written in place on a local disk, else uploaded file by file.
    """
    quiet_transformers()
    local = out.local_path()
    if local is not None:
        _save(model, tokenizer, local / name)
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        _save(model, tokenizer, Path(temporary))
        upload_folder(Path(temporary), out, name)


def _save(model: "PreTrainedModel", tokenizer: Path | None, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _fix_generation(model)
    model.save_pretrained(folder)
    if tokenizer is not None:
        copy_tokenizer_files(tokenizer, folder)


def _fix_generation(model: "PreTrainedModel") -> None:
    """Make generation settings such that transformers saves them: it loads a temperature without sampling silently.

    The flags that are there mean sampling; settings that are wrong besides give way to the architecture's own.
    """
    from transformers import GenerationConfig

    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        try:
            settings.validate(strict=True)
        except ValueError:
            model.generation_config = GenerationConfig.from_model_config(model.config)


def upload_folder(folder: Path, out: Folder, name: str) -> None:
    """Copy a local folder's files below `name/`, in the order of their names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            out.upload(path, f"{name}/{path.relative_to(folder).as_posix()}")


def model_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `config.json`, without transformers.

    Raises:
        StageFailed: it is missing, or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StageFailed(
            f"{folder} has no config.json; expected a checkpoint as `save_pretrained` writes it"
        ) from error
    except ValueError as error:
        raise StageFailed(f"{path} is not JSON: {error}; save the model again") from error
    if not isinstance(config, dict):
        raise StageFailed(f"{path} holds a {type(config).__name__}, expected an object; save the model again")
    return config


def text_config(folder: Path) -> Any:
    """Return the part of a checkpoint's config that is about text, as transformers completes it (it may be nested).

    Raises:
        StageFailed: there is none, or transformers does not know the architecture.
    """
    from transformers import AutoConfig

    quiet_transformers()
    model_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise StageFailed(f"cannot read the config in {folder}: {type(error).__name__}: {error}") from error


def weight_names(folder: Path, index: str) -> frozenset[str]:
    """Return the names of a checkpoint's weights, by its index, or by the header of its one file where that is here."""
    if (folder / index).exists():
        return frozenset(json.loads((folder / index).read_text())["weight_map"])
    path = folder / "model.safetensors"
    try:
        return frozenset(tensors_of_file(path)) if path.exists() else frozenset()
    except ValueError:  # raised where it is loaded
        return frozenset()


MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    dtype: str
    """Safetensors' name of its type, e.g. `BF16`."""
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def num_elements(self) -> int:
        """Return how many numbers it holds."""
        return math.prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return what the safetensors files of a checkpoint hold, by name, from their headers."""
    found: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= tensors_of_file(path)
    return found


def tensors_of_file(path: Path) -> dict[str, StoredTensor]:
    """Return what one safetensors file holds, by name, from its header.

    Raises:
        ValueError: it is no safetensors file.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size) if size <= MAX_HEADER_BYTES else b"")
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), end - start)
    return tensors


def add_to_index(folder: Path, files: Mapping[str, str]) -> None:
    """Enter tensors into the index of a checkpoint of several files; name of a tensor → name of its file."""
    path = folder / "model.safetensors.index.json"
    if path.exists():
        index = json.loads(path.read_text())
        index["weight_map"] |= files
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def bytes_in_16_bits(folder: Path) -> int:
    """Return the bytes of a checkpoint's tensors with each floating-point number in 16 bits at most.

    Compression is told against this: a checkpoint in 32 bits is not half compressed by a cast.
    """
    wide = ("F32", "F64")
    return sum(
        2 * tensor.num_elements if tensor.dtype in wide else tensor.size_bytes
        for tensor in stored_tensors(folder).values()
    )


def stored_dtype(folder: Path) -> "torch.dtype":
    """Return the type in which a checkpoint's floating-point weights are stored; of several, the largest tensors'."""
    import torch

    sizes: dict[torch.dtype, int] = {}
    for tensor in stored_tensors(folder).values():
        dtype = _TORCH_OF.get(tensor.dtype)
        if dtype is not None:
            kind = getattr(torch, dtype)
            sizes[kind] = sizes.get(kind, 0) + tensor.num_elements
    return max(sizes, key=lambda kind: sizes[kind], default=torch.float32)


def dtype_in_16_bits(folder: Path) -> str:
    """Return torch's name of the 16-bit type that a checkpoint is stored in, or is to be: bfloat16, unless float16."""
    found = str(stored_dtype(folder)).removeprefix("torch.")
    return found if found == "float16" else "bfloat16"


_TORCH_OF = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}
"""Safetensors' names of types that a student can be stored in; a float64 checkpoint's student is float32."""
