"""Records of a search: receipts in `resume` of what a later attempt need not do again, and what `search.json` says.

Promises: a receipt is the whole record of a trial that ended for good, done or failed; a scheme that cannot fit the
model is recorded too, without a trial.
"""

from collections.abc import Iterable, Mapping, Sequence

from stages.errors import StageFailed
from stages.formats.json_format import FormatModel, JsonFormat
from stages.formats.search import DoneTrial, FailedTrial, Finalist, Search, Trial
from stages.quantize.schemes import Scheme
from stages.quantize.selection import TrialPoint, Verification, choose
from stages.storage import AlreadyExists, Folder

__all__ = [
    "Receipt",
    "ReceiptFile",
    "assemble_search",
    "check_enough",
    "describe_failures",
    "describe_trial",
    "failed_receipt",
    "final_metrics",
    "known_receipts",
    "points_of",
    "read_receipt",
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


def known_receipts(schemes: Iterable[Scheme], resume: Folder, in_features: Mapping[str, int]) -> dict[str, Receipt]:
    """Return receipts of schemes that need no trial: they have one, or cannot fit layers of these input widths."""
    known: dict[str, Receipt] = {}
    for scheme in schemes:
        if found := read_receipt(resume, scheme.name):
            known[scheme.name] = found
        elif misfit := scheme.misfit(in_features):
            known[scheme.name] = failed_receipt(scheme, misfit, 0.0)
    return known


def check_enough(trials: Sequence[Trial], min_done: int) -> None:
    """Check that enough trials succeeded.

    Raises:
        StageFailed: they did not; names each reason.
    """
    failed = [trial for trial in trials if isinstance(trial, FailedTrial)]
    num_done = len(trials) - len(failed)
    if num_done < min_done:
        reasons = "".join(f"\n  {trial.scheme}: {trial.error}" for trial in failed)
        raise StageFailed(f"{num_done} of {len(trials)} schemes succeeded, expected at least {min_done}:{reasons}")


def describe_trial(trial: Trial) -> str:
    """Return what to log of a trial, in one line."""
    if isinstance(trial, FailedTrial):
        return f"{trial.scheme} failed: {trial.error}"
    return f"{trial.scheme}: KL {trial.kl:.2g} nats/token, {trial.size_bytes} bytes"


def describe_failures(trials: Sequence[Trial]) -> str:
    """Return the first reason why trials failed, and how many others there are."""
    reasons = sorted({trial.error for trial in trials if isinstance(trial, FailedTrial)})
    if not reasons:
        return "none was proposed"
    return reasons[0] if len(reasons) == 1 else f"{reasons[0]}; and {len(reasons) - 1} other reasons"


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
        base_bytes: its weights on disk.
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
    )


def final_metrics(search: Search) -> dict[str, float]:
    """Return a search's final numbers; those of the chosen one only where there is one."""
    done = [trial for trial in search.trials if isinstance(trial, DoneTrial)]
    metrics: dict[str, float] = {
        "trials_done": len(done),
        "trials_failed": len(search.trials) - len(done),
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
                "compression_x": search.base_bytes / finalist.size_bytes,
            }
    return metrics
