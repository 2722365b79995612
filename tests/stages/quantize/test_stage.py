"""The whole stage on a real local Ray: a search, and another attempt behind its receipts with the reload's gate."""

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages.contract import Artifact, Context, Outcome
from stages.errors import OutOfMemory, StageFailed, Transient
from stages.formats.search import DoneTrial, Trial
from stages.quantize import stage as quantize_stage
from stages.quantize.job import Layers, SearchJob, Survey
from stages.quantize.proposers import Grid, Proposer
from stages.quantize.records import Receipt, write_receipt
from stages.quantize.schemes import CAST, Scheme
from stages.quantize.stage import Quantize
from tests.fakes import RecordingReporter, fake_context

INT8 = Scheme(weight_bits=8)
W8A8 = Scheme(weight_bits=8, activation_bits=8)
GPTQ4 = Scheme(weight_bits=4, group_size=32, algorithm="gptq")
INT4 = Scheme(weight_bits=4)
TOO_WIDE = Scheme(weight_bits=4, group_size=96)
SCHEMES = (INT8, W8A8, GPTQ4, TOO_WIDE)
STAGE = Quantize(
    proposer=Grid(schemes=SCHEMES),
    calibration_tokens=16 * 32,
    evaluation_tokens=8 * 31,
    finalists=3,
    max_kl=0.5,
    seed=3,
)

pytestmark = pytest.mark.ray


class Search:
    """One run of the stage: its context, its outcome and its `search.json`."""

    def __init__(self, stage: Quantize, context: Context) -> None:
        self.context = context
        self.outcome: Outcome = stage.run(context)
        self.json: dict[str, Any] = context.out.get_json("search.json")
        self.trials = {trial["scheme"]: trial for trial in self.json["trials"]}
        self.finalists = {finalist["scheme"]: finalist for finalist in self.json["finalists"]}


@pytest.fixture(scope="module")
def search(local_ray: None, model: Artifact, data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Search:
    handler = signal.getsignal(signal.SIGINT)
    found = Search(STAGE, fake_context(tmp_path_factory.mktemp("search"), {"model": model, "data": data}, workers=2))
    assert signal.getsignal(signal.SIGINT) is handler
    return found


def test_search_records_every_scheme_in_order(search: Search, model: Artifact) -> None:
    assert list(search.trials) == [CAST.name, *(scheme.name for scheme in SCHEMES)]
    assert [trial["status"] for trial in search.json["trials"]] == ["done", "done", "done", "done", "failed"]
    assert "group_size=96 does not divide" in search.trials[TOO_WIDE.name]["error"]
    assert search.json["base"] == model.fingerprint
    (weights,) = model.below("model/*.safetensors")
    assert search.json["base_bytes"] == pytest.approx(weights.size_bytes / 2, rel=0.02), "it is stored in 32 bits"
    assert search.trials[CAST.name]["size_bytes"] == pytest.approx(search.json["base_bytes"], rel=0.02)
    assert search.trials[GPTQ4.name]["config"] == GPTQ4.model_dump(mode="json")
    assert 0 < search.trials[INT8.name]["kl"] < search.trials[W8A8.name]["kl"] < search.trials[GPTQ4.name]["kl"]
    assert search.trials[INT8.name]["agreement"] > search.trials[GPTQ4.name]["agreement"] > 0
    assert search.outcome.metrics["trials_done"] == 3
    assert search.outcome.metrics["trials_failed"] == 1


def test_search_sizes_are_real_and_smaller_for_fewer_bits(search: Search) -> None:
    small, large = search.trials[GPTQ4.name], search.trials[INT8.name]
    assert small["size_bytes"] < large["size_bytes"] < search.json["base_bytes"]
    # Scales in 16 bits: 4 + 16/32 bits for groups of 32, and 8 + 16/64 or 8 + 16/128 for channels; shapes on top.
    assert 4.5 <= small["linear_bits_per_weight"] < 4.7
    assert 8.12 <= large["linear_bits_per_weight"] < 8.4
    for name, finalist in search.finalists.items():
        weights = [e for e in search.context.out.entries(f"finalists/{name}") if e.name.endswith(".safetensors")]
        assert sum(entry.size_bytes for entry in weights) == finalist["size_bytes"]


def test_search_chooses_the_smallest_within_the_limit_by_its_reloaded_kl(search: Search) -> None:
    within = [f for f in search.json["finalists"] if f["reloaded_kl"] <= STAGE.max_kl]
    assert search.json["chosen"] == min(within, key=lambda f: f["size_bytes"])["scheme"]
    assert search.outcome.metrics["chosen_size_bytes"] == search.finalists[search.json["chosen"]]["size_bytes"]
    assert search.outcome.metrics["compression_x"] > 1
    for finalist in search.json["finalists"]:
        assert finalist["reloaded_kl"] == pytest.approx(finalist["kl"], abs=1e-5)


def test_search_finalists_are_complete_checkpoints(search: Search) -> None:
    from stages.models.checkpoints import load_model
    from stages.models.tokenization import load_tokenizer

    assert set(search.finalists) == {INT8.name, W8A8.name, GPTQ4.name}
    for finalist in search.json["finalists"]:
        folder = Path(search.context.out.uri) / finalist["folder"]
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert len(load_tokenizer(folder)) == load_model(folder).config.vocab_size


def test_search_reports_how_far_it_is(search: Search) -> None:
    report = search.context.reporter
    assert isinstance(report, RecordingReporter)
    assert report.progressed == [(done, 5, "trials") for done in (1, 2, 3, 4, 5)]
    assert {point["trial/size_bytes"] for _, point in report.points} == {
        trial["size_bytes"] for trial in search.trials.values() if trial["status"] == "done"
    }
    assert any(TOO_WIDE.name in note for note in report.notes)


def going_on(search: Search, context: Context, receipts: Mapping[str, Mapping[str, object]]) -> Context:
    """Put that search's receipts and checkpoints, with some receipts edited, below another context's `resume`."""
    for entry in search.context.resume.entries():
        data = search.context.resume.get(entry.name)
        if entry.name in receipts:
            receipt = json.loads(data)
            data = json.dumps(receipt | {"trial": receipt["trial"] | receipts[entry.name]}).encode()
        context.resume.put(entry.name, data)
    return context


def test_search_behind_receipts_runs_no_trial_again_and_rejects_what_its_files_do_not_hold(
    search: Search, model: Artifact, data: Artifact, tmp_path: Path
) -> None:
    """One receipt is marked, one claims another KL than its files have, and one's files have changed since."""
    claimed = search.trials[GPTQ4.name]["kl"] - 0.01
    receipts = {f"trials/{INT8.name}.json": {"seconds": 12345.0}, f"trials/{GPTQ4.name}.json": {"kl": claimed}}
    context = going_on(search, fake_context(tmp_path, {"model": model, "data": data}, workers=2), receipts)
    (weights,) = [e.name for e in context.resume.entries(f"trials/{W8A8.name}") if e.name.endswith(".safetensors")]
    context.resume.put(weights, context.resume.get(weights)[:-4] + b"\0\1\2\3")

    again = Search(STAGE, context)

    assert again.trials[INT8.name]["seconds"] == 12345.0
    assert again.trials[GPTQ4.name]["kl"] == claimed
    assert f"was {claimed:.6f}" in again.trials[GPTQ4.name]["reload_error"]
    assert "has changed since its trial" in again.trials[W8A8.name]["reload_error"]
    assert again.trials[INT8.name]["reload_error"] is None
    assert list(again.finalists) == [INT8.name, CAST.name], "the cast is next on the front"
    assert again.json["chosen"] == INT8.name
    assert {entry.name.split("/")[1] for entry in context.out.entries("finalists")} == {INT8.name, CAST.name}


def survey_little(job: object, evaluation: object) -> tuple[Survey, None]:
    layers = Layers({"layer": 64}, 64 * 64, 0, (), ("embeddings",))
    return Survey(layers, 64 * 64, 8, True, "bfloat16", True, bytes_16=16, num_tokens=1, noise=0.0), None


class Coarser(Proposer):
    """Halves the bits of the smallest down to 4, round by round."""

    def propose(self, trials: Sequence[Trial]) -> Sequence[Scheme]:
        if not trials:  # the cast is among them, once it was tried
            return (Scheme(weight_bits=8), TOO_WIDE)
        done = [trial for trial in trials if isinstance(trial, DoneTrial)]
        smallest = Scheme.model_validate(min(done, key=lambda trial: trial.size_bytes).config)
        return [Scheme(weight_bits=max(4, smallest.weight_bits // 2))]


def test_logged_config_says_which_proposer_ran() -> None:
    for proposer in (Grid(), Coarser()):
        logged = json.loads(STAGE.model_copy(update={"proposer": proposer}).model_dump_json())["proposer"]
        assert logged["kind"] == type(proposer).__name__
        assert type(proposer).model_validate(logged) == proposer
    with pytest.raises(ValueError, match="kind is 'Grid', expected 'Coarser'"):
        Coarser(kind="Grid")


def try_quickly(
    config: Mapping[str, Any], *, schemes: Mapping[str, Scheme], job: SearchJob, **_: object
) -> dict[str, None]:
    scheme = schemes[config["scheme"]]
    trial = DoneTrial(
        scheme=scheme.name, config=scheme.model_dump(mode="json"), seconds=time.monotonic(), kl=1 / scheme.weight_bits,
        kl_p99=1.0, agreement=0.5, num_tokens=1, size_bytes=scheme.weight_bits, bits_per_weight=1.0,
        linear_bits_per_weight=1.0,
    )  # fmt: skip
    write_receipt(job.resume, Receipt(trial=trial, folder=scheme.name))
    return {"out_of_memory": None}


def remeasure_quickly(names: Sequence[str], *_: object) -> dict[str, float]:
    return {scheme.name: 1 / scheme.weight_bits for scheme in (INT8, INT4) if scheme.name in names}


def test_search_asks_its_proposer_again_with_what_it_found_and_the_same_after_a_crash(
    local_ray: None, model: Artifact, data: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second context has the first round's receipt only, as after a crash within the second."""
    for name, fake in {"_survey": survey_little, "_trial": try_quickly, "_remeasure": remeasure_quickly}.items():
        monkeypatch.setattr(quantize_stage, name, fake)
    stage = STAGE.model_copy(update={"proposer": Coarser()})
    search = Search(stage, fake_context(tmp_path / "one", {"model": model, "data": data}, workers=2))
    assert list(search.trials) == [CAST.name, INT8.name, TOO_WIDE.name, INT4.name]
    assert [trial["status"] for trial in search.json["trials"]] == ["done", "done", "failed", "done"]
    assert CAST.name not in search.finalists, "it is the model itself"
    assert search.json["chosen"] == INT4.name
    reporter = search.context.reporter
    assert isinstance(reporter, RecordingReporter)
    assert sorted(reporter.progressed) == [(1, 3, "trials"), (2, 3, "trials"), (3, 3, "trials"), (4, 4, "trials")]

    context = fake_context(tmp_path / "two", {"model": model, "data": data}, workers=2)
    receipt = f"trials/{INT8.name}.json"
    context.resume.put(receipt, search.context.resume.get(receipt))
    again = Search(stage, context)
    assert list(again.trials) == list(search.trials)
    assert again.trials[INT8.name] == search.trials[INT8.name]
    assert again.trials[INT4.name]["seconds"] > search.trials[INT4.name]["seconds"]


def remeasure_in_vain(names: Sequence[str], *_: object) -> dict[str, str]:
    return dict.fromkeys(names, "noise instead of weights")


@pytest.mark.parametrize("min_done", [0, 1])
def test_search_whose_finalists_do_not_survive_is_a_result_where_none_need_succeed(
    min_done: int, local_ray: None, model: Artifact, data: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, fake in {"_survey": survey_little, "_trial": try_quickly, "_remeasure": remeasure_in_vain}.items():
        monkeypatch.setattr(quantize_stage, name, fake)
    stage = STAGE.model_copy(update={"proposer": Grid(schemes=(INT8,)), "min_done": min_done})
    context = fake_context(tmp_path, {"model": model, "data": data}, workers=2)
    if min_done:
        with pytest.raises(StageFailed, match=r"none of 1 finalists survived its reload: .*noise instead of weights"):
            stage.run(context)
        return
    search = Search(stage, context)
    assert search.trials[INT8.name]["reload_error"] == "noise instead of weights"
    assert (search.json["finalists"], search.json["chosen"]) == ([], None)
    assert not context.out.entries("finalists")


def test_model_without_linear_layers_says_so_once(
    local_ray: None, model: Artifact, data: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def survey_none(job: object, evaluation: object) -> tuple[Survey, None]:
        layers = Layers({}, 0, 0, (), ("embeddings",))
        return Survey(layers, 64, 8, True, "bfloat16", True, bytes_16=16, num_tokens=1, noise=0.0), None

    monkeypatch.setattr(quantize_stage, "_survey", survey_none)
    context = fake_context(tmp_path, {"model": model, "data": data}, workers=2)
    search = Search(STAGE.model_copy(update={"min_done": 0}), context)
    assert [trial["status"] for trial in search.json["trials"]] == ["done", *["failed"] * len(SCHEMES)]
    assert isinstance(context.reporter, RecordingReporter)
    said = [note for note in context.reporter.notes if "no linear layers" in note]
    assert len(said) == 1
    assert ", ".join(scheme.name for scheme in SCHEMES) in said[0]


def try_in_vain(config: Mapping[str, Any], **_: object) -> dict[str, str]:
    if config["scheme"] == INT8.name:
        return {"out_of_memory": f"{INT8.name} ran out of memory"}
    os._exit(1)


@pytest.mark.parametrize(
    ("schemes", "error", "message"),
    [
        ((W8A8,), Transient, rf"1 trials ended without a receipt \({W8A8.name}\): .*died"),
        ((INT8, W8A8), OutOfMemory, "int8-channel-sym-rtn ran out of memory"),
    ],
    ids=["worker-died", "out-of-memory"],
)
def test_search_whose_trials_leave_no_receipt_can_go_on(
    schemes: tuple[Scheme, ...],
    error: type[StageFailed],
    message: str,
    local_ray: None,
    model: Artifact,
    data: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantize_stage, "_survey", survey_little)
    monkeypatch.setattr(quantize_stage, "_trial", try_in_vain)
    context = fake_context(tmp_path, {"model": model, "data": data}, workers=2)
    with pytest.raises(error, match=message) as caught:
        STAGE.model_copy(update={"proposer": Grid(schemes=schemes)}).run(context)
    assert type(caught.value) is error
    assert not context.resume.entries()
