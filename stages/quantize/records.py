"""Records of a search: receipts in `resume` of what a later attempt need not do again, and what `search.json` says.

Promises: a receipt is the whole record of a trial that ended for good, done or failed; a scheme that cannot fit the
model is recorded too, without a trial.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from stages.errors import OutOfMemory, StageFailed, Transient
from stages.formats.json_format import FormatModel, JsonFormat
from stages.formats.search import DoneTrial, FailedTrial, Finalist, Search, Trial
from stages.quantize.fitting import OnIndivisible, misfit
from stages.quantize.schemes import CAST, CAST_BITS, Scheme
from stages.quantize.selection import TrialPoint, Verification, choose
from stages.storage import AlreadyExists, Folder

if TYPE_CHECKING:
    from stages.quantize.job import Survey

__all__ = [
    "Receipt",
    "ReceiptFile",
    "assemble_search",
    "check_enough",
    "check_lost",
    "describe_choice",
    "describe_trials",
    "failed_receipt",
    "final_metrics",
    "known_receipts",
    "points_of",
    "read_receipt",
    "reasons_of",
    "write_receipt",
]


class ReceiptFile(FormatModel):
    """One file of a trial's checkpoint."""

    name: str
    """Relative to the receipt's folder."""
    size_bytes: int
    sha256: str


class Receipt(JsonFormat):
    """A trial that ended for good, and where its checkpoint lies; kept in `resume`, never part of the artifact."""

    trial: Trial
    folder: str | None = None
    """The checkpoint's folder below `resume`; None where the trial failed."""
    files: tuple[ReceiptFile, ...] = ()


def _receipt_name(scheme: str) -> str:
    return f"trials/{scheme}.json"


def failed_receipt(scheme: Scheme, error: str, seconds: float) -> Receipt:
    """Return the receipt of a scheme that cannot succeed."""
    config = scheme.model_dump(mode="json")
    return Receipt(trial=FailedTrial(scheme=scheme.name, config=config, seconds=seconds, error=error))


def read_receipt(resume: Folder, scheme: str) -> Receipt | None:
    """Return the receipt of a scheme, or None where there is none, or where a power cut left it torn.

    Raises:
        StageFailed: another version of stillhouse wrote it.
    """
    name = _receipt_name(scheme)
    if resume.find_json(name) is None:
        return None
    return Receipt.parse(resume.get(name), where=f"the receipt {name}")


def write_receipt(resume: Folder, receipt: Receipt) -> Receipt:
    """Write a receipt, and return the one that stands: this one, or another try's that was first and whole."""
    name = _receipt_name(receipt.trial.scheme)
    try:
        resume.put_json(name, receipt.to_json(), create=True)
    except AlreadyExists:
        if first := read_receipt(resume, receipt.trial.scheme):
            return first
        resume.put_json(name, receipt.to_json())
    return receipt


def known_receipts(
    schemes: Iterable[Scheme], resume: Folder, survey: "Survey", on_indivisible: OnIndivisible
) -> dict[str, Receipt]:
    """Return receipts of schemes that need no trial.

    They have one, cannot fit the model's layers, or are the cast of a model that is stored in 16 bits already: that is
    the model itself, which has no checkpoint here.
    """
    known: dict[str, Receipt] = {}
    for scheme in schemes:
        if found := read_receipt(resume, scheme.name):
            known[scheme.name] = found
        elif reason := misfit(scheme, survey.layers.in_features, on_indivisible):
            known[scheme.name] = failed_receipt(scheme, reason, 0.0)
        elif scheme == CAST and survey.is_cast:
            known[scheme.name] = Receipt(trial=_as_it_is(survey))
    return known


def _as_it_is(survey: "Survey") -> DoneTrial:
    """Return the record of a model that is its own cast."""
    return DoneTrial(
        scheme=CAST.name,
        config=CAST.model_dump(mode="json"),
        seconds=0.0,
        kl=0.0,
        kl_p99=0.0,
        agreement=1.0,
        num_tokens=survey.num_tokens,
        size_bytes=survey.bytes_16,
        bits_per_weight=8 * survey.bytes_16 / survey.num_parameters,
        linear_bits_per_weight=CAST_BITS,
    )


def check_enough(trials: Sequence[Trial], min_done: int) -> None:
    """Check that enough trials succeeded, the plain cast not counted.

    Raises:
        StageFailed: they did not; names each reason once.
    """
    failed = [trial for trial in trials if isinstance(trial, FailedTrial)]
    tried = [trial for trial in trials if trial.scheme != CAST.name]
    num_done = sum(isinstance(trial, DoneTrial) for trial in tried)
    if num_done < min_done:
        reasons = "".join(f"\n  {names}: {reason}" for reason, names in reasons_of(failed).items())
        raise StageFailed(f"{num_done} of {len(tried)} schemes succeeded, expected at least {min_done}:{reasons}")


def reasons_of(trials: Iterable[Trial]) -> dict[str, str]:
    """Return each reason why trials failed, with the names of their schemes."""
    names: dict[str, list[str]] = {}
    for trial in trials:
        if isinstance(trial, FailedTrial):
            names.setdefault(trial.error, []).append(trial.scheme)
    return {error: ", ".join(schemes) for error, schemes in names.items()}


def describe_trials(trials: Sequence[Trial]) -> list[str]:
    """Return what to log of trials: a line for each that is done, and one for each reason why others failed."""
    lines = [_describe(trial) for trial in trials if isinstance(trial, DoneTrial)]
    return [*lines, *(f"{names} failed: {reason}" for reason, names in reasons_of(trials).items())]


def _describe(trial: DoneTrial) -> str:
    kept = f", {len(trial.kept_layers)} layers kept in 16 bits" if trial.kept_layers else ""
    return (
        f"{trial.scheme}: KL {trial.kl:.2g} nats/token, {trial.size_bytes} bytes, "
        f"{trial.bits_per_weight:.2f} bits a weight{kept}"
    )


def describe_choice(search: Search) -> str:
    """Return what a search chose, or why it chose none, in one line."""
    for one in search.finalists:
        if one.scheme == search.chosen:
            return (
                f"chose {one.scheme}: {one.size_bytes} bytes, {one.bits_per_weight:.2f} bits a weight, "
                f"KL {one.reloaded_kl:.2g} nats/token"
            )
    if search.finalists:
        best = min(one.reloaded_kl for one in search.finalists)
        return f"chose none: the best finalist has KL {best:.2g} nats/token, and max_kl is {search.max_kl:g}"
    if any(isinstance(trial, DoneTrial) and trial.reload_error for trial in search.trials):
        reason = "no finalist survived its reload"
    elif any(isinstance(trial, FailedTrial) for trial in search.trials):
        reason = "no scheme succeeded"
    else:
        reason = "no scheme makes the model smaller than 16 bits do"
    return f"chose none: {reason} (search.json says why)"


def check_lost(missing: Sequence[str], results: Any, micro_batch: int) -> None:
    """Check that no trial ended without a receipt, by something that another attempt may not meet again.

    Args:
        missing: schemes without a receipt.
        results: Ray Tune's.
        micro_batch: rows of one forward pass in the trials.

    Raises:
        OutOfMemory: memory did not suffice.
        Transient: a worker was lost.
    """
    if not missing:
        return
    starved = [result.metrics["out_of_memory"] for result in results if (result.metrics or {}).get("out_of_memory")]
    reasons = sorted({str(error).strip() for error in results.errors})
    # Ray's memory monitor kills the worker before the kernel does, and says so.
    starved += [reason for reason in reasons if "OutOfMemoryError" in reason or "low on memory" in reason]
    if starved:
        raise OutOfMemory(starved[0], micro_batch=micro_batch)
    shown = "; ".join(reason.rpartition("\n")[2] for reason in reasons)
    raise Transient(
        f"{len(missing)} trials ended without a receipt ({', '.join(missing)}): {shown}; the others stay done"
    )


def points_of(trials: Iterable[Trial]) -> list[TrialPoint]:
    """Return the (KL, bytes) points of the trials that are done."""
    return [TrialPoint(t.scheme, t.kl, t.size_bytes) for t in trials if isinstance(t, DoneTrial)]


def assemble_search(
    trials: Sequence[Trial],
    front: Iterable[TrialPoint],
    verdict: Verification,
    *,
    base: str,
    base_bytes: int,
    max_kl: float,
) -> Search:
    """Return the content of `search.json`.

    Args:
        trials: one for each scheme, in the order in which they were proposed.
        front: the points that no other beats.
        verdict: what became of the finalists.
        base: fingerprint of the unquantized model.
        base_bytes: its weights in 16 bits.
        max_kl: nats per token that the chosen one may have after its reload.
    """
    on_front = {point.name for point in front}
    done = {trial.scheme: trial for trial in trials if isinstance(trial, DoneTrial)}
    finalists = tuple(_to_finalist(done[name], reloaded_kl) for name, reloaded_kl in verdict.accepted.items())
    chosen = choose((TrialPoint(f.scheme, f.reloaded_kl, f.size_bytes) for f in finalists), max_kl)

    def judged(trial: Trial) -> Trial:
        if isinstance(trial, FailedTrial):
            return trial
        reload_error = verdict.rejected.get(trial.scheme)
        facts = {"pareto": trial.scheme in on_front, "reload_error": reload_error}
        return trial.model_copy(update={**facts, "refused": verdict.refused.get(trial.scheme)})

    return Search(
        base=base,
        base_bytes=base_bytes,
        max_kl=max_kl,
        trials=tuple(judged(trial) for trial in trials),
        finalists=finalists,
        chosen=chosen.name if chosen else None,
    )


def _to_finalist(trial: DoneTrial, reloaded_kl: float) -> Finalist:
    return Finalist(
        scheme=trial.scheme,
        folder=f"finalists/{trial.scheme}",
        kl=trial.kl,
        reloaded_kl=reloaded_kl,
        agreement=trial.agreement,
        size_bytes=trial.size_bytes,
        bits_per_weight=trial.bits_per_weight,
        linear_bits_per_weight=trial.linear_bits_per_weight,
        kept_layers=trial.kept_layers,
    )


def final_metrics(search: Search) -> dict[str, float]:
    """Return a search's final numbers; those of the chosen one only where there is one."""
    done = [trial for trial in search.trials if isinstance(trial, DoneTrial) and trial.scheme != CAST.name]
    metrics: dict[str, float] = {
        "trials_done": len(done),
        "trials_failed": sum(isinstance(trial, FailedTrial) for trial in search.trials),
        "pareto_size": sum(trial.pareto for trial in done),
        "base_bytes": search.base_bytes,
    }
    if done:
        metrics["best_kl"] = min(trial.kl for trial in done)
    for finalist in search.finalists:
        if finalist.scheme == search.chosen:
            metrics |= {
                "chosen_kl": finalist.reloaded_kl,
                "chosen_agreement": finalist.agreement,
                "chosen_size_bytes": finalist.size_bytes,
                "chosen_bits_per_weight": finalist.bits_per_weight,
                "chosen_kept_layers": len(finalist.kept_layers),
                "compression_x": search.base_bytes / finalist.size_bytes,
            }
    return metrics
