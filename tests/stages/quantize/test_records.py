"""Which schemes are known, whether enough trials succeeded, and what `search.json` says."""

from pathlib import Path

import pytest

from stages.errors import StageFailed
from stages.formats.search import DoneTrial, FailedTrial, Search
from stages.quantize.job import Layers, Survey
from stages.quantize.records import (
    Receipt,
    ReceiptFile,
    assemble_search,
    check_enough,
    describe_choice,
    describe_trials,
    failed_receipt,
    final_metrics,
    known_receipts,
    points_of,
    read_receipt,
    write_receipt,
)
from stages.quantize.schemes import CAST, Scheme
from stages.quantize.selection import Verification, pareto_front
from stages.storage import Folder
from tests.fakes import artifact_of

INT8, INT4, INT3 = (Scheme(weight_bits=bits, group_size=32) for bits in (8, 4, 3))


def done(scheme: Scheme, kl: float, size_bytes: int) -> DoneTrial:
    return DoneTrial(
        scheme=scheme.name, config=scheme.model_dump(mode="json"), seconds=1.0, kl=kl, kl_p99=kl, agreement=0.9,
        num_tokens=10, size_bytes=size_bytes, bits_per_weight=5.0, linear_bits_per_weight=4.5,
    )  # fmt: skip


def failed(scheme: Scheme, error: str) -> FailedTrial:
    trial = failed_receipt(scheme, error, 0.0).trial
    assert isinstance(trial, FailedTrial)
    return trial


def survey(*, is_cast: bool = False, **in_features: int) -> Survey:
    layers = Layers(in_features or {"layer": 64}, 64, 0, (), ("embeddings",))
    return Survey(layers, 100, 1, True, "bfloat16", is_cast, bytes_16=200, num_tokens=7, noise=0.0)


def test_cast_of_a_model_in_16_bits_is_that_model_and_needs_no_trial(tmp_path: Path) -> None:
    resume = Folder.at(tmp_path)
    assert known_receipts([CAST], resume, survey(), "fail") == {}
    receipt = known_receipts([CAST], resume, survey(is_cast=True), "fail")[CAST.name]
    trial = receipt.trial
    assert isinstance(trial, DoneTrial)
    assert (trial.kl, trial.agreement, trial.size_bytes, trial.bits_per_weight) == (0.0, 1.0, 200, 16.0)
    assert receipt.folder is None


def test_layer_that_a_group_does_not_divide_settles_a_scheme_unless_it_may_be_kept(tmp_path: Path) -> None:
    resume, found = Folder.at(tmp_path), survey(narrow=48, wide=64)
    assert list(known_receipts([INT4], resume, found, "fail")) == [INT4.name]
    assert known_receipts([INT4], resume, found, "keep") == {}


def test_settled_are_those_with_a_receipt_or_without_a_fit(tmp_path: Path) -> None:
    resume = Folder.at(tmp_path)
    receipt = Receipt(trial=done(INT8, 0.1, 10), folder="x", files=(ReceiptFile(name="a", size_bytes=1, sha256="0"),))
    write_receipt(resume, receipt)
    wide = Scheme(weight_bits=4, group_size=48)
    known = known_receipts([INT8, INT4, wide], resume, survey(), "fail")
    assert list(known) == [INT8.name, wide.name]
    assert known[INT8.name] == receipt
    unfit = known[wide.name].trial
    assert isinstance(unfit, FailedTrial)
    assert "layer (64)" in unfit.error


def test_receipt_that_was_first_stays(tmp_path: Path) -> None:
    resume = Folder.at(tmp_path)
    first = write_receipt(resume, failed_receipt(INT8, "elsewhere", 0.0))
    assert write_receipt(resume, failed_receipt(INT8, "here", 0.0)) == first == read_receipt(resume, INT8.name)


@pytest.mark.parametrize("torn", [b"", b'{"schema": 1, "tri', b"\0" * 40])
def test_receipt_that_a_power_cut_tore_counts_as_absent_and_is_overwritten(tmp_path: Path, torn: bytes) -> None:
    resume = Folder.at(tmp_path)
    resume.put(f"trials/{INT8.name}.json", torn)
    assert known_receipts([INT8], resume, survey(), "fail") == {}
    receipt = failed_receipt(INT8, "no luck", 0.0)
    assert write_receipt(resume, receipt) == receipt == read_receipt(resume, INT8.name)


def test_receipt_of_another_version_is_an_error_that_names_it(tmp_path: Path) -> None:
    resume = Folder.at(tmp_path)
    resume.put_json(f"trials/{INT8.name}.json", {"status": "done", "kl": 0.1})
    with pytest.raises(StageFailed, match=rf"receipt trials/{INT8.name}.json has schema None, expected 1"):
        read_receipt(resume, INT8.name)


def test_too_few_done_trials_is_an_error_that_names_each_reason() -> None:
    trials = [done(INT8, 0.1, 10), failed(INT4, "no luck"), failed(INT3, "none either")]
    check_enough(trials, 1)
    with pytest.raises(StageFailed, match=f"1 of 3 .* at least 2:\n  {INT4.name}: no luck\n  {INT3.name}: none either"):
        check_enough(trials, 2)


def test_failures_are_described_once_for_each_reason() -> None:
    same = [failed(INT8, "too wide"), failed(INT4, "too wide")]
    assert describe_trials([done(INT3, 0.1, 10), *same]) == [
        f"{INT3.name}: KL 0.1 nats/token, 10 bytes, 5.00 bits a weight",
        f"{INT8.name}, {INT4.name} failed: too wide",
    ]
    with pytest.raises(StageFailed, match=f"\n  {INT8.name}, {INT4.name}: too wide$"):
        check_enough(same, 1)


def test_cast_does_not_count_among_the_trials_that_must_succeed() -> None:
    cast = done(CAST, 0.0, 100)
    with pytest.raises(StageFailed, match="0 of 1 schemes succeeded, expected at least 1"):
        check_enough([cast, failed(INT4, "no luck")], 1)


def test_choice_is_described_with_its_bits_or_with_why_there_is_none() -> None:
    assert describe_choice(assembled(0.2)) == (f"chose {INT4.name}: 50 bytes, 5.00 bits a weight, KL 0.11 nats/token")
    assert "the best finalist has KL 0.01 nats/token, and max_kl is 0.001" in describe_choice(assembled(0.001))
    trials = [done(INT8, 0.01, 100)]
    lost = assemble_search(
        trials, (), Verification(rejected={INT8.name: "gone"}), base="abc", base_bytes=400, max_kl=1.0
    )
    assert describe_choice(lost) == "chose none: no finalist survived its reload (search.json says why)"


def test_layers_that_were_kept_are_on_record_for_the_finalist_too() -> None:
    trial = done(INT8, 0.01, 100).model_copy(update={"kept_layers": ("a.q_proj",)})
    verdict = Verification(accepted={INT8.name: 0.01})
    search = assemble_search([trial], points_of([trial]), verdict, base="abc", base_bytes=400, max_kl=1.0)
    assert search.finalists[0].kept_layers == ("a.q_proj",)
    assert final_metrics(search)["chosen_kept_layers"] == 1
    assert "1 layers kept in 16 bits" in describe_trials([trial])[0]


def assembled(max_kl: float) -> Search:
    trials = [done(INT8, 0.01, 100), done(INT4, 0.1, 50), failed(INT3, "no luck")]
    verdict = Verification(accepted={INT4.name: 0.11, INT8.name: 0.01})
    front = pareto_front(points_of(trials))
    return assemble_search(trials, front, verdict, base="abc", base_bytes=400, max_kl=max_kl)


def test_search_json_chooses_by_the_reloaded_kl() -> None:
    assert assembled(0.2).chosen == INT4.name
    assert assembled(0.105).chosen == INT8.name  # the trial's 0.1 would be within, the reload's 0.11 is not
    assert assembled(0.001).chosen is None


def test_search_json_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    search = assembled(0.2)
    search.write(Folder.at(tmp_path))
    assert Search.read(artifact_of("search", tmp_path)) == search
    plain = Folder.at(tmp_path).get_json("search.json")
    assert not {"folder", "files"} & set(plain["trials"][0])
    assert [trial.get("pareto") for trial in plain["trials"]] == [True, True, None]
    assert plain["finalists"][0]["folder"] == f"finalists/{INT4.name}"


def test_final_metrics_without_a_chosen_one_have_no_numbers_of_it() -> None:
    metrics = final_metrics(assembled(0.2))
    assert metrics["compression_x"] == 8.0
    assert (metrics["trials_done"], metrics["trials_failed"], metrics["best_kl"]) == (2, 1, 0.01)
    assert "compression_x" not in final_metrics(assembled(0.001))
