"""`Train` on a real Ray: files, equal results on one and two workers, going on, and errors of ours."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.contract import Artifact
from stages.errors import ConfigError, StageFailed, WorkerLost
from stages.external.documents import PythonDocs
from stages.formats.training import TrainingInfo
from stages.models.checkpoints import load_model, stored_dtype
from stages.models.tokenization import load_tokenizer
from stages.prepare.stage import ByteLevelBPE, Prepare
from stages.teach.stage import Teach, TopK
from stages.train import snapshots
from stages.train import stage as train_stage
from stages.train.loop import Ranks
from stages.train.objectives import CrossEntropy, ReverseKL, SoftTarget
from stages.train.objectives.loss import Loss
from stages.train.stage import AdamW, Continue, Llama, Smaller, Train, Validation
from stages.train.work import TrainJob, train_rank
from tests.fakes import RecordingReporter, artifact_of, fake_context
from tests.stages.tiny import tiny_llama, write_dataset, write_model
from tests.stages.train.signals import write_signals
from workflows.engine.check import check as check_graph
from workflows.engine.graph import Workflow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("inputs")
    data = write_dataset(folder / "data", shards=(5, 7, 6, 5), num_calibration=1)
    teacher = tiny_llama(layers=3, max_position_embeddings=32)
    return {
        "data": data,
        "origin": write_model(folder / "teacher", teacher, folder / "data" / "tokenizer"),
        "signals": write_signals(folder / "signals", data, teacher),
    }


def _train(**changes: Any) -> Train:
    settings = {
        "model": Smaller(layers=2), "objectives": (CrossEntropy(weight=0.3), SoftTarget(weight=0.7, temperature=2.0)),
        "optimizer_steps": 6, "batch_rows": 5, "seed": 1,
    }  # fmt: skip
    return Train(**{**settings, **changes})


def _job(stage: Train, context: Any) -> TrainJob:
    """Return what a worker of Ray Train would be given."""
    jobs: list[TrainJob] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage, "_fit", jobs.append)
        with pytest.raises(Exception, match=r"training\.json"):  # nothing was trained
            stage.run(context)
    return jobs[0]


@pytest.mark.ray
def test_train_on_two_workers_gives_the_weights_of_one_and_goes_on_from_its_end(
    local_ray: None, tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    contexts = [fake_context(tmp_path / f"{workers}", inputs, workers=workers, cpus_per_worker=1) for workers in (1, 2)]
    outcomes = [_train(keep="best", validation=Validation(times=3)).run(context) for context in contexts]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    made = [artifact_of("model", Path(context.out.uri)) for context in contexts]
    one, two = (load_model(artifact.folder("model")).state_dict() for artifact in made)
    start = load_model(inputs["origin"].folder("model")).state_dict()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(one["lm_head.weight"], start["lm_head.weight"])
    assert len(load_tokenizer(made[0].folder("model"))) == 96
    done = TrainingInfo.read(made[1])
    assert (done.optimizer_steps, done.tokens) == (6, 6 * 5 * 16)
    for name in ("train/final_loss", "validation/cross_entropy"):
        assert outcomes[0].metrics[name] == pytest.approx(outcomes[1].metrics[name], rel=1e-4)

    # The attempt died after its last step: the next one finds the final snapshot and only saves.
    again = fake_context(tmp_path / "2", inputs, workers=2)
    found = snapshots.newest(again.resume)
    assert found is not None
    assert found.step == 6
    _train(keep="best", validation=Validation(times=3)).run(again)
    rerun = load_model(artifact_of("model", Path(again.out.uri)).folder("model")).state_dict()
    assert all(torch.equal(rerun[name], value) for name, value in two.items())


@pytest.mark.ray
def test_train_of_a_broken_checkpoint_fails_with_an_error_of_ours(
    local_ray: None, tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    broken = {"data": inputs["data"], "origin": write_model(tmp_path / "broken", model)}
    stage = _train(model=Continue(), objectives=(CrossEntropy(),))
    with pytest.raises(StageFailed, match="the loss is nan and the gradient's norm nan at optimizer step 0") as caught:
        stage.run(fake_context(tmp_path / "step", broken))
    assert type(caught.value) is StageFailed


class _Killer(RecordingReporter):
    """Kills the process that reports, once training is under way."""

    def progress(self, done: float, total: float, unit: str) -> None:
        if done >= 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_train_whose_worker_is_killed_is_lost_and_may_be_tried_again(
    local_ray: None, tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    context = replace(fake_context(tmp_path, inputs, workers=2), reporter=_Killer())
    with pytest.raises(WorkerLost):
        _train().run(context)


SOURCES = {"data": Continue(), "signals": Teach(method=TopK(temperatures=(1.0, 2.0))), "origin": Continue()}
FRESH = Llama(layers=1, width=8, heads=2)


def test_check_of_a_train_that_fits_passes() -> None:
    _train().check(SOURCES)  # type: ignore[arg-type]
    _train(model=FRESH, objectives=(CrossEntropy(),)).check({})
    _train(model=FRESH, objectives=(ReverseKL(),)).check({"data": Continue(), "teacher": Continue()})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("changes", "absent", "message"),
    [
        ({"objectives": ()}, "", "objectives is empty"),
        ({}, "signals", "SoftTarget learns from the input 'signals', and none is wired; pass signals="),
        ({}, "origin", "Smaller, which is cut from the input 'origin', and none is wired; pass origin="),
        ({"model": Continue()}, "origin", "Continue, which goes on from the input 'origin', and none is wired"),
        ({"model": FRESH}, "", "weights are fresh, and the input 'origin' is wired; leave origin= out"),
        ({"objectives": (SoftTarget(temperature=3.0),)}, "", "temperature is 3, expected one .*: 1, 2;"),
        (
            {"objectives": (ReverseKL(),)},
            "",
            "ReverseKL learns from the input 'teacher', and none is wired; pass teach",
        ),
    ],
)
def test_check_of_a_train_that_does_not_fit_is_refused(changes: dict[str, Any], absent: str, message: str) -> None:
    sources = {name: source for name, source in SOURCES.items() if name != absent}
    with pytest.raises(ConfigError, match=message):
        _train(**changes).check(sources)  # type: ignore[arg-type]


def test_check_of_a_teacher_that_no_objective_asks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'teacher' is wired, and no objective asks .*'origin'"):
        _train().check({**SOURCES, "teacher": Continue()})  # type: ignore[dict-item]


def test_planning_reverse_kl_without_a_teacher_is_refused() -> None:
    flow = Workflow("flow")
    prepare = Prepare(source=PythonDocs(), tokenizer=ByteLevelBPE(vocabulary_size=300), sequence_length=32)
    data = flow.step("data", prepare)
    flow.step("train", _train(model=FRESH, objectives=(ReverseKL(),)), data=data)
    with pytest.raises(ConfigError, match="ReverseKL learns from the input 'teacher', and none is wired"):
        check_graph(flow)


@pytest.mark.ray
def test_train_by_a_live_teacher_leaves_a_model(local_ray: None, tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    given = {"data": inputs["data"], "teacher": inputs["origin"]}
    stage = _train(
        model=Llama(layers=1, width=16, heads=2), objectives=(ReverseKL(),), optimizer=AdamW(learning_rate=1e-2)
    )
    context = fake_context(tmp_path, given)
    stage.run(context)
    assert TrainingInfo.read(artifact_of("model", Path(context.out.uri))).final["train/reverse_kl"] > 0


def test_no_objective_is_named_where_training_is_done() -> None:
    names = {kind.__name__ for kind in Loss.__subclasses__() if kind.__module__.startswith("stages.")}
    assert names >= {"CrossEntropy", "SoftTarget", "ReverseKL"}
    for path in Path(train_stage.__file__).parent.glob("*.py"):
        assert not [name for name in names if name in path.read_text()], path.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "best", "validation": None}, "keep is 'best' and validation is None"),
        ({"split": "calibration"}, "split is 'calibration', which is the text that validation measures"),
        ({"keep": "best"}, "need held-out text, and the dataset's calibration_fraction is 0"),
        ({"validation": Validation(patience=2)}, "need held-out text, and the dataset's calibration_fraction is 0"),
    ],
)
def test_check_of_a_validation_without_text_for_it_is_refused(changes: dict[str, Any], message: str) -> None:
    prepare = Prepare(
        source=PythonDocs(), tokenizer=ByteLevelBPE(vocabulary_size=300), sequence_length=32, calibration_fraction=0.0
    )
    with pytest.raises(ConfigError, match=message):
        _train(**changes).check({**SOURCES, "data": prepare})  # type: ignore[dict-item]


def test_train_that_keeps_the_best_of_a_dataset_without_held_out_text_is_refused(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    context = fake_context(tmp_path, {**inputs, "data": write_dataset(tmp_path / "without")})
    job = _job(_train(keep="best"), context)
    with pytest.raises(StageFailed, match=r"no text of split 'calibration', .* raise Prepare\.calibration_fraction"):
        train_rank(job, Ranks())


def test_train_of_a_dataset_without_held_out_text_says_so_and_counts_its_epochs(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    context = fake_context(tmp_path, {"data": write_dataset(tmp_path / "without")})
    train_rank(_job(_train(model=FRESH, objectives=(CrossEntropy(),)), context), Ranks())
    assert context.reporter.notes == ["no validation loss: the dataset has no text of split 'calibration'"]  # type: ignore[attr-defined]
    made = artifact_of("model", Path(context.out.uri))
    done = TrainingInfo.read(made)
    assert (done.epochs, done.kept_step, done.held_out_cross_entropy) == (pytest.approx(6 * 5 / 18), 6, None)
    assert stored_dtype(made.folder("model")) == torch.bfloat16  # fresh weights


@pytest.mark.parametrize("rate", [0.01, 10.0], ids=["some steps help", "none does"])
def test_train_tells_the_loss_on_held_out_text_of_the_weights_that_it_keeps(
    tmp_path: Path, inputs: dict[str, Artifact], rate: float
) -> None:
    context = fake_context(tmp_path, {"data": inputs["data"]})
    eager = _train(
        model=FRESH, objectives=(CrossEntropy(),), keep="best", optimizer_steps=8, validation=Validation(times=8),
        optimizer=AdamW(learning_rate=rate),
    )  # fmt: skip
    train_rank(_job(eager, context), Ranks())
    points = context.reporter.points  # type: ignore[attr-defined]
    losses = {step: m["validation/cross_entropy"] for step, m in points if "validation/cross_entropy" in m}
    best = min(losses, key=lambda step: losses[step])
    assert (best == 0) is (rate == 10)
    *more, note = context.reporter.notes  # type: ignore[attr-defined]
    assert [each.startswith("no step lowered the loss on held-out text") for each in more] == [True] * (best == 0)
    assert note.startswith(f"loss on held-out text {losses[best]:.4f} nats/token after {best} steps")
    done = TrainingInfo.read(artifact_of("model", Path(context.out.uri)))
    assert (done.kept_step, done.held_out_cross_entropy) == (best, losses[best])
    assert done.optimizer_steps == 8


def test_train_without_the_input_of_an_objective_is_refused(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    given = {"data": inputs["data"], "origin": inputs["origin"]}
    with pytest.raises(StageFailed, match="SoftTarget learns from the input 'signals', and there is none"):
        _train().run(fake_context(tmp_path / "step", given))


def test_train_with_signals_of_another_dataset_is_refused(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    other = write_dataset(tmp_path / "other", vocabulary=95)
    with pytest.raises(StageFailed, match=r"of the signals is .*, expected the dataset's"):
        _train().run(fake_context(tmp_path / "step", {**inputs, "data": other}))


def test_train_with_a_temperature_that_was_not_stored_is_refused(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    with pytest.raises(StageFailed, match="temperature is 4"):
        _train(objectives=(SoftTarget(temperature=4.0),)).run(fake_context(tmp_path / "step", inputs))


def test_train_with_fewer_rows_than_workers_is_refused(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    with pytest.raises(StageFailed, match="at least one row for each of 3 workers"):
        _train(batch_rows=2).run(fake_context(tmp_path / "step", inputs, workers=3))
