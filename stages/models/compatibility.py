"""Whether a checkpoint can read a dataset's tokens: asked of teachers, students and whatever is scored.

Asked twice, by the same rules: at planning, of what `config.json`, the tokenizer's files and the weights' index tell
(`check_planned`, `check_cut`, `check_groups`), and where the checkpoint is read, since the model of another step is
there only then (`check_compatible`).

Promise: what would fail, or silently give figures about something else, after hours of work is refused before it, with
what would fit. Planning imports transformers (seconds) only where nothing else can tell: for a student that is cut, a
nested config, and tokenizers whose files differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract import Input
from stages.errors import ConfigError, ExternalDataError, StageFailed
from stages.external.checkpoints import WEIGHTS_INDEX, Checkpoint, PretrainedTokenizer
from stages.models.checkpoints import model_config, text_config, weight_names
from stages.models.context_length import longest_context, text_part
from stages.models.tokenization import (
    backend_of,
    canonical_tokenizer,
    difference,
    has_same_class,
    has_tokenizer,
    load_tokenizer,
    read_tokenizer,
    tokenizer_digest,
)

if TYPE_CHECKING:
    from stages.formats.dataset import DatasetInfo

__all__ = ["check_compatible", "check_cut", "check_groups", "check_planned"]

WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")
PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_blocks", ".weight.absmax")
"""How names of quantized weights end (GPTQ and AWQ, compressed-tensors, FP8, MXFP4, bitsandbytes)."""


def _misfits(
    what: str, *, context: int | None, vocabulary: int | None, sequence_length: int | None, tokens: int | None
) -> Iterator[str]:
    """Yield in what a checkpoint does not fit a dataset, by numbers alone; of None nothing is known."""
    if vocabulary is not None and tokens is not None and vocabulary < tokens:
        yield (
            f"the vocabulary of {what} has {vocabulary} entries, expected at least the dataset's {tokens}; prepare the "
            "dataset with the tokenizer of this model"
        )
    if context is not None and sequence_length is not None and context < sequence_length:
        yield (
            f"the context of {what} is {context} tokens, expected at least the {sequence_length} of the dataset's "
            f"rows; prepare the dataset with sequence_length={context} or less"
        )


def check_compatible(what: str, folder: Path, dataset: "DatasetInfo") -> None:
    """Refuse a checkpoint that does not fit a dataset.

    Args:
        what: the checkpoint's name in errors, e.g. `the teacher`.
        folder: the checkpoint.
        dataset: what it shall read.

    Raises:
        StageFailed: its vocabulary is smaller, its context is shorter, or its tokenizer gives other ids.
    """
    config = text_config(folder)
    for misfit in _misfits(
        what,
        context=longest_context(config.to_dict()) or getattr(config, "max_position_embeddings", None),
        vocabulary=config.vocab_size,
        sequence_length=dataset.sequence_length,
        tokens=dataset.vocabulary_size,
    ):
        raise StageFailed(misfit)
    if not has_tokenizer(folder):
        return
    found, expected = tokenizer_digest(load_tokenizer(folder)), dataset.tokenizer_digest
    if found != expected:
        raise StageFailed(
            f"{what} has another tokenizer (digest {found[:12]}) than the dataset ({expected[:12]}), and the same text "
            "has other ids in each; prepare the dataset with the tokenizer of this model"
        )


def check_planned(
    sources: Mapping[str, Any],
    inputs: Mapping[str, Input],
    *,
    unquantized: tuple[str, ...],
    schemes: Sequence[Any] = (),
) -> None:
    """Refuse, before anything runs, checkpoints among a stage's sources that do not fit its input `data`.

    Args:
        sources: what feeds the stage; of models only checkpoints from outside can be judged.
        inputs: the stage's inputs.
        unquantized: those whose weights must be plain numbers, to be taught by, trained or quantized.
        schemes: of quantization, each with a `name` and a `group_size`; all of what a search tries.

    Raises:
        ConfigError: one does not fit; says what would.
    """
    if schemes:
        check_groups(sources["model"], {scheme.name: scheme.group_size for scheme in schemes})
    data = sources.get("data")
    for name, spec in inputs.items():
        given = sources.get(name)
        for source in given.values() if spec.many and isinstance(given, Mapping) else (given,):
            if not isinstance(source, Checkpoint):
                continue
            with suppress(ExternalDataError):  # raised where its identity is asked for
                folder = source.described()
                if folder is not None and (folder / "config.json").exists():
                    _check_described(
                        f"the checkpoint {source.source!r}", source, folder, data, plain=name in unquantized
                    )


def _check_described(what: str, source: Checkpoint, folder: Path, data: Any, *, plain: bool) -> None:
    try:
        config = model_config(folder)
        if plain:
            _check_unquantized(what, folder, config)
        text = text_part(config)
        if text != config or "auto_map" in config:
            _check_architecture(what, folder)
            text = text_config(folder).to_dict()
        own = getattr(data, "tokenizer", None)  # a Prepare, whose class no other stage may import
        vocabulary = text.get("vocab_size")
        is_same = isinstance(own, PretrainedTokenizer) and own.model_dump() == source.model_dump()
        if not is_same and isinstance(own, PretrainedTokenizer):
            _check_tokenizer(what, folder, own)
        elif own is not None and not is_same and has_tokenizer(folder):
            raise ConfigError(
                f"{what} brings a tokenizer, and the dataset trains one of its own, so that the same text has other "
                f"ids in each; prepare the dataset with PretrainedTokenizer(source={source.source!r})"
            )
        tokens = None if is_same else _num_tokens(own)
        length = getattr(data, "sequence_length", None)
        for misfit in _misfits(
            what,
            context=longest_context(text),
            vocabulary=vocabulary if isinstance(vocabulary, int) else None,
            sequence_length=length if isinstance(length, int) else None,
            tokens=tokens,
        ):
            raise ConfigError(misfit)
    except StageFailed as error:
        raise ConfigError(f"{what}: {error}") from error


def _check_unquantized(what: str, folder: Path, config: Mapping[str, Any]) -> None:
    found = config.get("quantization_config") or text_part(config).get("quantization_config")
    names = weight_names(folder, WEIGHTS_INDEX)
    packed = next((name for name in sorted(names) if name.endswith(PACKED)), None)
    if found or packed:
        method = found.get("quant_method") if isinstance(found, dict) else None
        how = f"by {method}" if method else f"its weights hold {packed}" if packed else "by its config.json"
        raise ConfigError(
            f"{what} is quantized already ({how}), so that there is nothing exact to learn from, train or quantize; "
            "give the checkpoint that it was made from, in bfloat16, float16 or float32"
        )


def _check_architecture(what: str, folder: Path) -> None:
    """Refuse a model for which transformers has no causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    text_config(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        inner = getattr(config.get_text_config(), "model_type", None)
        raise ConfigError(
            f"{what} is of the type {config.model_type!r}, which transformers cannot load as a causal language model; "
            f"give a checkpoint of its language model alone (of the type {inner!r}), or one of text only"
        )


def _num_tokens(own: Any) -> int | None:
    """Return the size of the vocabulary that a dataset will have; None where that is not known yet."""
    if isinstance(own, PretrainedTokenizer):
        backend = read_tokenizer(own.described())
        return None if backend is None else 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    size = getattr(own, "vocabulary_size", None)
    return size if isinstance(size, int) else None


def _check_tokenizer(what: str, folder: Path, own: PretrainedTokenizer) -> None:
    """Refuse a checkpoint whose tokenizer gives other ids; the files alone often show that it does not."""
    other = own.described()
    if other is None or not has_tokenizer(folder):
        return
    pair = [read_tokenizer(each) for each in (folder, other)]
    if all(pair) and canonical_tokenizer(pair[0]) == canonical_tokenizer(pair[1]) and has_same_class(folder, other):
        return
    found, expected = (canonical_tokenizer(backend_of(load_tokenizer(each))) for each in (folder, other))
    if found != expected:
        raise ConfigError(
            f"{what} has another tokenizer than the dataset, that of {own.source}: {difference(found, expected)}; give "
            "a checkpoint with that tokenizer, or prepare the dataset with the tokenizer of this one (that needs "
            "another teacher too)"
        )


def check_cut(origin: Checkpoint, sizes: Mapping[str, Any]) -> None:
    """Refuse, before anything runs, a student that cannot be cut from a checkpoint: it is cut on the meta device.

    Args:
        origin: what it is cut from.
        sizes: what to keep, as the fields of a `Size`.

    Raises:
        ConfigError: a size does not divide, or the architecture cannot be cut so.
    """
    with suppress(ExternalDataError):  # raised where its identity is asked for
        folder = origin.described()
        if folder is not None and (folder / "config.json").exists():
            _dry_cut(f"a student of the checkpoint {origin.source!r}", folder, sizes)


def _dry_cut(what: str, folder: Path, sizes: Mapping[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stages.models.narrowing import Size, narrow

    try:
        _check_architecture(what, folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            narrow(AutoModelForCausalLM.from_config(config, dtype=torch.float32), Size(**sizes), seed=0)
    except StageFailed as error:
        raise ConfigError(f"{what}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{what} cannot be made in its architecture ({type(error).__name__}: {error}); take fewer layers only, or "
            "a checkpoint of the size that you want"
        ) from error


def check_groups(model: Any, group_sizes: Mapping[str, Any]) -> None:
    """Refuse, before anything runs, a search of which no scheme's group divides the inputs of a model's layers.

    Args:
        model: what is quantized; only a checkpoint from outside can be judged.
        group_sizes: group size by scheme; None has no groups.

    Raises:
        ConfigError: none does; names sizes that do.
    """
    if not isinstance(model, Checkpoint):
        return
    with suppress(ExternalDataError, StageFailed):
        folder = model.described()
        text = text_part(model_config(folder)) if folder is not None else {}
        width = next((text[key] for key in WIDTH_KEYS if isinstance(text.get(key), int)), None)
        wrong = [name for name, size in group_sizes.items() if size is not None and width is not None and width % size]
        if width is not None and group_sizes and len(wrong) == len(group_sizes):
            fitting = [size for size in (128, 64, 32, 16, 8) if width % size == 0]
            raise ConfigError(
                f"the groups of no scheme ({', '.join(wrong)}) divide the {width} channels of {model.source}; use a "
                f"group_size of {' or '.join(map(str, fitting)) or 'None'}, or a scheme without groups"
            )
