"""What the three kinds of processes of a search do: survey the model, try one scheme, measure finalists again.

Promises: a trial measures what it wrote: its checkpoint is checked tensor by tensor, loaded again by plain transformers
and run; it is in the store before its receipt, and the receipt is created once, whole; what would
fail again (a scheme that does not work) is a receipt with its error, and what may not (memory, storage, a device) is
raised, without a receipt, so that the scheme is tried again.
Does not: know Ray. Each of the three is called once in a process of its own.
"""

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from stages.contract import Artifact
from stages.errors import OutOfMemory, StageFailed, Transient
from stages.formats.search import DoneTrial
from stages.formats.tokens import TokenRows
from stages.models.checkpoints import bytes_in_16_bits, dtype_in_16_bits, load_model, save_checkpoint, stored_dtype
from stages.models.compatibility import check_compatible
from stages.models.segments import row_inputs
from stages.quantize.compress import find_layers, forget_session, quantize_model, quiet, split_experts
from stages.quantize.fidelity import BasePredictions, fitting_micro_batch, measure_fidelity, predict
from stages.quantize.fitting import plan_layers
from stages.quantize.job import SearchJob, Survey
from stages.quantize.records import Receipt, ReceiptFile, failed_receipt, write_receipt
from stages.quantize.schemes import CAST_BITS, Scheme
from stages.quantize.written import check_written, complete_vocabulary, set_buffers_aside
from stages.runtime.translation import one_line, within_memory
from stages.storage import Folder


def survey_model(job: SearchJob, rows: TokenRows) -> tuple[Survey, BasePredictions]:
    """Load the unquantized model once: its layers, and its predictions on the rows that are measured.

    Raises:
        StageFailed: the model does not fit the dataset: a smaller vocabulary, a shorter context, another tokenizer.
        OutOfMemory: a smaller micro-batch may do.
    """
    folder = job.model.folder("model")
    check_compatible("the model", folder, job.dataset)
    with quiet():
        model = load_model(folder, dtype="auto", device=job.device)
        micro_batch = fitting_micro_batch(
            job.micro_batch,
            sequence_length=rows.ids_RT.shape[1],
            vocabulary_size=model.config.get_text_config().vocab_size,
        )
        with within_memory("the unquantized model", micro_batch=micro_batch):
            base = predict(
                model, rows, vocabulary_size=job.dataset.vocabulary_size, micro_batch=micro_batch, device=job.device
            )
        noise = _rounding_noise(model, base, micro_batch, job.device)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        split_experts(model)
    dtype = dtype_in_16_bits(folder)
    found = Survey(
        layers=find_layers(model),
        num_parameters=num_parameters,
        micro_batch=micro_batch,
        replays_head=base.head.weight is not None,
        dtype=dtype,
        is_cast=stored_dtype(folder) == getattr(torch, dtype),
        bytes_16=bytes_in_16_bits(folder),
        num_tokens=len(base.states.array),
        noise=noise,
        whole_rows=base.head.whole_rows,
    )
    return found, base


NOISE_ROWS = 8
"""Rows on which the model is compared with itself."""


def _rounding_noise(model: Any, base: BasePredictions, micro_batch: int, device: str) -> float:
    """Return the KL of a model to itself, run in batches of another size, in nats per token."""
    other = max(1, micro_batch // 2) if micro_batch > 1 else 2
    return max(0.0, measure_fidelity(model, base.first(NOISE_ROWS), micro_batch=other, device=device).kl)


def run_trial(scheme: Scheme, job: SearchJob, survey: Survey, base: BasePredictions) -> Receipt:
    """Quantize, measure and save one scheme, and leave its receipt.

    Returns:
        The receipt, of this trial or of the one that was first.

    Raises:
        OutOfMemory: a smaller micro-batch may do; there is no receipt.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stillhouse-trial-") as scratch:
        try:
            with quiet(), within_memory(f"scheme {scheme.name}", micro_batch=survey.micro_batch):
                trial = _quantize_and_save(scheme, job, survey, base, Path(scratch))
        except Exception as error:  # a trial is a border: what its scheme does wrong is its result
            if _may_succeed_later(error):
                raise
            seconds = round(time.monotonic() - started, 3)
            return write_receipt(job.resume, failed_receipt(scheme, one_line(error), seconds))
        folder, files = _upload(Path(scratch), scheme.name, job.resume)
    trial = trial.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
    return write_receipt(job.resume, Receipt(trial=trial, folder=folder, files=files))


def _may_succeed_later(error: Exception) -> bool:
    """Whether the same trial may succeed another time, on another machine too: memory is no part of identity."""
    return isinstance(error, OutOfMemory | Transient | OSError | torch.AcceleratorError)


def _quantize_and_save(
    scheme: Scheme, job: SearchJob, survey: Survey, base: BasePredictions, scratch: Path
) -> DoneTrial:
    torch.manual_seed(job.seed)
    folder, written = job.model.folder("model"), scratch / "model"
    plan = plan_layers(scheme, survey.layers.in_features)
    model = load_model(folder, dtype=survey.dtype, device=job.device)
    split_experts(model)
    quantize_model(
        model,
        scheme,
        plan,
        layers=survey.layers,
        calibration=row_inputs(
            torch.tensor(job.calibration.ids_RT, dtype=torch.long),
            torch.tensor(job.calibration.positions_RT),
            torch.tensor(job.calibration.document_ids_RT >= 0),
            whole=survey.whole_rows,
            batch_rows=survey.micro_batch,
        ),
    )
    buffers = set_buffers_aside(model, survey.layers) if scheme.vocabulary_bits else {}
    save_checkpoint(model, folder, Folder.at(scratch), "model")
    if scheme.vocabulary_bits:
        complete_vocabulary(written, buffers, survey.layers)
    linear_bytes = check_written(written, scheme, plan, survey.layers)
    del model
    forget_session()
    fidelity = measure_fidelity(
        _load_written(written, job.device), base, micro_batch=survey.micro_batch, device=job.device
    )
    size_bytes = sum(path.stat().st_size for path in written.glob("*.safetensors"))
    num_linear = survey.layers.num_weights
    return DoneTrial(
        scheme=scheme.name,
        config=scheme.model_dump(mode="json"),
        seconds=0.0,
        **asdict(fidelity),
        size_bytes=size_bytes,
        bits_per_weight=8 * size_bytes / survey.num_parameters,
        linear_bits_per_weight=8 * linear_bytes / num_linear if num_linear else CAST_BITS,
        kept_layers=plan.kept,
    )


def _load_written(folder: Path, device: str) -> Any:
    """Load what a trial wrote, as anybody would.

    Raises:
        StageFailed: plain transformers does not; the reason is the same wherever the files lie.
    """
    try:
        return load_model(folder, dtype="auto", device=device)
    except StageFailed as error:
        if type(error) is not StageFailed:
            raise
        reason = str(error).replace(str(folder), "its folder")
        raise StageFailed(f"plain transformers does not load what was written: {reason}") from error


def _upload(scratch: Path, scheme: str, resume: Folder) -> tuple[str, tuple[ReceiptFile, ...]]:
    """Copy a saved checkpoint into `resume`, below a name that no other try of this scheme uses."""
    name = f"trials/{scheme}/{uuid4().hex[:8]}"
    root = scratch / "model"
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    files = [(resume / name).upload(path, path.relative_to(root).as_posix()) for path in paths]
    return name, tuple(ReceiptFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256) for f in files)


def remeasure(
    schemes: Iterable[str], finalists: Artifact, job: SearchJob, survey: Survey, base: BasePredictions
) -> Mapping[str, float | str]:
    """Load finalists from their files by plain transformers and measure each again.

    Returns:
        For each scheme its KL, or what went wrong while it was loaded or run.
    """
    found: dict[str, float | str] = {}
    for scheme in schemes:
        folder = finalists.folder(f"finalists/{scheme}")
        try:
            with quiet(), within_memory(f"finalist {scheme}", micro_batch=survey.micro_batch):
                model = load_model(folder, dtype="auto", device=job.device)
                found[scheme] = measure_fidelity(model, base, micro_batch=survey.micro_batch, device=job.device).kl
        except Exception as error:  # as in `run_trial`
            if _may_succeed_later(error) and not isinstance(error, OSError):
                raise
            found[scheme] = one_line(error)
    return found
