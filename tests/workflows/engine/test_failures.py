"""What follows a failure."""

import pytest

from stages.contract import Resources
from stages.errors import ConfigError, OutOfMemory, StageFailed, Transient
from workflows.engine.failures import Failure, FailureKind, GiveUp, TryAgain, decide
from workflows.engine.graph import Retry
from workflows.engine.worker import classify


def after(kind: FailureKind, *, attempt: int = 1, resources: Resources | None = None) -> TryAgain | GiveUp:
    retry = Retry(attempts=3, backoff_seconds=5)
    return decide(Failure(kind, "m"), attempt=attempt, retry=retry, resources=resources or Resources(micro_batch=16))


@pytest.mark.parametrize(
    "kind", [kind for kind in FailureKind if kind.retriable and kind is not FailureKind.OUT_OF_MEMORY]
)
def test_decide_retriable_tries_until_attempts_are_spent(kind: FailureKind) -> None:
    assert isinstance(after(kind, attempt=2), TryAgain)
    assert isinstance(after(kind, attempt=3), GiveUp)


@pytest.mark.parametrize("kind", [FailureKind.PERMANENT, FailureKind.PENDING])
def test_decide_permanent_gives_up_at_once(kind: FailureKind) -> None:
    assert isinstance(after(kind), GiveUp)


def test_decide_backoff_doubles() -> None:
    waits = [
        decision.wait_seconds
        for n in (1, 2)
        if isinstance(decision := after(FailureKind.WORKER_LOST, attempt=n), TryAgain)
    ]
    assert waits == [5.0, 10.0]


def test_decide_preempted_goes_on_at_once() -> None:
    decision = after(FailureKind.PREEMPTED)
    assert isinstance(decision, TryAgain)
    assert decision.wait_seconds == 0


def test_decide_out_of_memory_halves_the_micro_batch_and_nothing_else() -> None:
    resources = Resources(workers=4, gpus_per_worker=1, micro_batch=16)
    decision = after(FailureKind.OUT_OF_MEMORY, resources=resources)
    assert isinstance(decision, TryAgain)
    assert decision.resources == resources.model_copy(update={"micro_batch": 8})


def test_decide_out_of_memory_with_one_row_gives_up() -> None:
    assert isinstance(after(FailureKind.OUT_OF_MEMORY, resources=Resources(micro_batch=1)), GiveUp)


def test_decide_out_of_memory_of_the_stages_own_rows_halves_those_until_one_does_not_fit() -> None:
    rows, tried = [4], Resources()
    for attempt in range(1, 10):
        full = classify(OutOfMemory("full", micro_batch=rows[-1]))
        decision = decide(full, attempt=attempt, retry=Retry(attempts=2), resources=tried)
        if isinstance(decision, GiveUp):
            break
        tried = decision.resources
        assert tried.micro_batch is not None
        rows.append(tried.micro_batch)
    assert rows == [4, 2, 1]
    assert "cannot be made smaller" in decision.reason


def test_decide_out_of_memory_that_claims_more_rows_than_it_was_given_shrinks_all_the_same() -> None:
    full = Failure(FailureKind.OUT_OF_MEMORY, "full", micro_batch=64)
    decision = decide(full, attempt=1, retry=Retry(), resources=Resources(micro_batch=4))
    assert isinstance(decision, TryAgain)
    assert decision.resources.micro_batch == 2


def test_decide_out_of_memory_of_a_worker_that_could_not_say_its_rows_tries_one() -> None:
    decision = after(FailureKind.OUT_OF_MEMORY, resources=Resources())
    assert isinstance(decision, TryAgain)
    assert decision.resources.micro_batch == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StageFailed("broken"), FailureKind.PERMANENT),
        (ConfigError("wrong"), FailureKind.PERMANENT),
        (Transient("slipped"), FailureKind.TRANSIENT),
        (OutOfMemory("full"), FailureKind.OUT_OF_MEMORY),
        (MemoryError(), FailureKind.OUT_OF_MEMORY),
        (ConnectionResetError("reset"), FailureKind.TRANSIENT),
        (OSError(28, "No space left on device"), FailureKind.PERMANENT),
        (KeyError("bug"), FailureKind.PERMANENT),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234"), FailureKind.WORKER_LOST),
    ],
)
def test_classify_error_gives_its_kind(error: Exception, kind: FailureKind) -> None:
    assert classify(error).kind is kind


def test_classify_wrapped_error_of_ours_decides() -> None:
    try:
        try:
            raise Transient("the store answered 503")
        except Transient as cause:
            raise RuntimeError("training failed") from cause
    except RuntimeError as error:
        failure = classify(error)
    assert failure == Failure(FailureKind.TRANSIENT, "the store answered 503")


def test_classify_error_that_came_through_ray_keeps_its_own_text() -> None:
    class RayTaskError(StageFailed):
        """Shaped like what Ray makes of a task's StageFailed."""

        cause = StageFailed("the flask broke")

    assert classify(RayTaskError("ray::task()\n  Traceback …")) == Failure(FailureKind.PERMANENT, "the flask broke")


def test_classify_dead_actor_inside_a_worker_group_is_a_lost_worker() -> None:
    class ActorDiedError(Exception):
        """Named like Ray's."""

    class WorkerGroupError(Exception):
        """Shaped like Ray Train's."""

        worker_failures = {0: RuntimeError("barrier broke"), 1: ActorDiedError("killed")}

    assert classify(WorkerGroupError("group")).kind is FailureKind.WORKER_LOST


def test_classify_full_disk_says_what_to_do() -> None:
    assert "gc" in classify(OSError(28, "No space left on device")).message
