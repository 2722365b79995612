"""Records of trials: one row of `search.json` each, and as receipts in `resume` what a later attempt need not do again.

Promises: a receipt is the whole record of a trial that ended for good, done or failed; a scheme that cannot fit the
model is a record too, without a trial.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.errors import StageFailed
from stages.quantize.schemes import Scheme
from stages.quantize.selection import TrialPoint, Verification, choose
from stages.storage import Folder

TrialRecord = dict[str, Any]
"""One trial, as JSON: its row of `search.json`; that of a checkpoint names its `folder` in `resume` and its `files`."""

FINALIST_COLUMNS = ("scheme", "kl", "agreement", "size_bytes", "bits_per_weight", "linear_bits_per_weight")


def receipt_name(scheme: str) -> str:
    """Return the name, in `resume`, of a scheme's receipt."""
    return f"trials/{scheme}.json"


def new_record(scheme: Scheme) -> TrialRecord:
    """Return what every record of a scheme starts with."""
    return {"scheme": scheme.name, "config": scheme.model_dump(mode="json")}


def failed_record(scheme: Scheme, error: str, seconds: float) -> TrialRecord:
    """Return the record of a scheme that cannot succeed."""
    return new_record(scheme) | {"status": "failed", "error": error, "seconds": seconds}


def read_settled(schemes: Iterable[Scheme], resume: Folder, in_features: Mapping[str, int]) -> dict[str, TrialRecord]:
    """Return records of schemes that need no trial: they have a receipt, or cannot fit layers of these input widths."""
    settled: dict[str, TrialRecord] = {}
    for scheme in schemes:
        if resume.has(receipt_name(scheme.name)):
            settled[scheme.name] = resume.get_json(receipt_name(scheme.name))
        elif misfit := scheme.misfit(in_features):
            settled[scheme.name] = failed_record(scheme, misfit, 0.0)
    return settled


def check_enough(records: Sequence[TrialRecord], min_done: int) -> None:
    """Check that enough trials succeeded.

    Raises:
        StageFailed: they did not; names each reason.
    """
    failed = [record for record in records if record["status"] != "done"]
    num_done = len(records) - len(failed)
    if num_done < min_done:
        reasons = "".join(f"\n  {record['scheme']}: {record['error']}" for record in failed)
        raise StageFailed(f"{num_done} of {len(records)} schemes succeeded, expected at least {min_done}:{reasons}")


def points_of(records: Iterable[TrialRecord]) -> list[TrialPoint]:
    """Return the (KL, bytes) points of the trials that are done."""
    return [TrialPoint(r["scheme"], r["kl"], r["size_bytes"]) for r in records if r["status"] == "done"]


def assemble_search(
    records: Sequence[TrialRecord],
    front: Iterable[TrialPoint],
    verdict: Verification,
    *,
    base: str,
    base_bytes: int,
    max_kl: float,
) -> dict[str, Any]:
    """Return the content of `search.json`.

    Args:
        records: one for each scheme.
        front: the points that no other beats.
        verdict: what became of the finalists.
        base: fingerprint of the unquantized model.
        base_bytes: its weights on disk.
        max_kl: nats per token that the chosen one may have after its reload.
    """
    on_front = {point.name for point in front}
    by_name = {record["scheme"]: record for record in records}
    finalists = [
        {column: by_name[name][column] for column in FINALIST_COLUMNS}
        | {"folder": f"finalists/{name}", "reloaded_kl": reloaded_kl}
        for name, reloaded_kl in verdict.accepted.items()
    ]
    chosen = choose((TrialPoint(f["scheme"], f["reloaded_kl"], f["size_bytes"]) for f in finalists), max_kl)
    trials = [
        {key: value for key, value in record.items() if key not in ("folder", "files")}
        | {"pareto": record["scheme"] in on_front, "reload_error": verdict.rejected.get(record["scheme"])}
        for record in records
    ]
    return {
        "base": base,
        "base_bytes": base_bytes,
        "max_kl": max_kl,
        "trials": trials,
        "finalists": finalists,
        "chosen": chosen.name if chosen else None,
    }


def final_metrics(search: Mapping[str, Any]) -> dict[str, float]:
    """Return a search's final numbers; those of the chosen one only where there is one."""
    done = [trial for trial in search["trials"] if trial["status"] == "done"]
    metrics = {
        "trials_done": len(done),
        "trials_failed": len(search["trials"]) - len(done),
        "pareto_size": sum(trial["pareto"] for trial in done),
        "base_bytes": search["base_bytes"],
    }
    if done:
        metrics["best_kl"] = min(trial["kl"] for trial in done)
    for finalist in search["finalists"]:
        if finalist["scheme"] == search["chosen"]:
            metrics |= {
                "chosen_kl": finalist["reloaded_kl"],
                "chosen_agreement": finalist["agreement"],
                "chosen_size_bytes": finalist["size_bytes"],
                "chosen_bits_per_weight": finalist["bits_per_weight"],
                "compression_x": search["base_bytes"] / finalist["size_bytes"],
            }
    return metrics
