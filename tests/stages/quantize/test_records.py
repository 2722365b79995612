"""Which schemes are settled, whether enough trials succeeded, and what `search.json` says."""

from pathlib import Path

import pytest

from stages.errors import StageFailed
from stages.quantize.records import (
    assemble_search,
    check_enough,
    failed_record,
    final_metrics,
    new_record,
    points_of,
    read_settled,
    receipt_name,
)
from stages.quantize.schemes import Scheme
from stages.quantize.selection import Verification, pareto_front
from stages.storage import Folder

INT8, INT4, INT3 = (Scheme(weight_bits=bits, group_size=32) for bits in (8, 4, 3))


def done(scheme: Scheme, kl: float, size_bytes: int) -> dict[str, object]:
    return new_record(scheme) | {
        "status": "done", "error": None, "seconds": 1.0, "kl": kl, "agreement": 0.9, "size_bytes": size_bytes,
        "bits_per_weight": 5.0, "linear_bits_per_weight": 4.5, "folder": "trials/x", "files": [],
    }  # fmt: skip


def test_settled_are_those_with_a_receipt_or_without_a_fit(tmp_path: Path) -> None:
    resume = Folder.at(tmp_path)
    resume.put_json(receipt_name(INT8.name), done(INT8, 0.1, 10))
    wide = Scheme(weight_bits=4, group_size=48)
    settled = read_settled([INT8, INT4, wide], resume, {"layer": 64})
    assert list(settled) == [INT8.name, wide.name]
    assert settled[INT8.name]["kl"] == 0.1
    assert settled[wide.name]["status"] == "failed"
    assert "layer (64)" in settled[wide.name]["error"]


def test_too_few_done_trials_is_an_error_that_names_each_reason() -> None:
    records = [done(INT8, 0.1, 10), failed_record(INT4, "no luck", 0.0), failed_record(INT3, "none either", 0.0)]
    check_enough(records, 1)
    with pytest.raises(StageFailed, match=f"1 of 3 .* at least 2:\n  {INT4.name}: no luck\n  {INT3.name}: none either"):
        check_enough(records, 2)


def assembled(max_kl: float) -> dict[str, object]:
    records = [done(INT8, 0.01, 100), done(INT4, 0.1, 50), failed_record(INT3, "no luck", 0.0)]
    verdict = Verification(accepted={INT4.name: 0.11, INT8.name: 0.01})
    front = pareto_front(points_of(records))
    return assemble_search(records, front, verdict, base="abc", base_bytes=400, max_kl=max_kl)


def test_search_json_chooses_by_the_reloaded_kl() -> None:
    assert assembled(0.2)["chosen"] == INT4.name
    assert assembled(0.105)["chosen"] == INT8.name  # the trial's 0.1 would be within, the reload's 0.11 is not
    assert assembled(0.001)["chosen"] is None


def test_search_json_leaves_out_where_the_receipts_keep_files() -> None:
    search = assembled(0.2)
    assert not {"folder", "files"} & set(search["trials"][0])
    assert [trial["pareto"] for trial in search["trials"]] == [True, True, False]
    assert search["finalists"][0]["folder"] == f"finalists/{INT4.name}"


def test_final_metrics_without_a_chosen_one_have_no_numbers_of_it() -> None:
    metrics = final_metrics(assembled(0.2))
    assert metrics["compression_x"] == 8.0
    assert (metrics["trials_done"], metrics["trials_failed"], metrics["best_kl"]) == (2, 1, 0.01)
    assert "compression_x" not in final_metrics(assembled(0.001))
