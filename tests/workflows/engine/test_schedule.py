"""The state machine, one event at a time; and over random graphs, failures and crash points."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract import Resources
from tests.stages_for_tests import Join, Write
from workflows.engine import schedule as machine
from workflows.engine.failures import Failure, FailureKind
from workflows.engine.graph import Handle, Retry, Step
from workflows.engine.schedule import (
    Began,
    Committed,
    Event,
    Failed,
    Interrupted,
    Overtaken,
    Phase,
    Postponed,
    Schedule,
    StepState,
    Tick,
    new_schedule,
)

LOST = Failure(FailureKind.WORKER_LOST, "the node died")
BROKEN = Failure(FailureKind.PERMANENT, "no such column")


def step(name: str, *needs: str, cpus: float = 1, retry: Retry | None = None, required: bool = True) -> Step:
    stage = Join() if needs else Write()
    inputs = {"parts": {need: Handle(need, "model") for need in needs}} if needs else {}
    resources = Resources(cpus_per_worker=cpus)
    return Step(name, stage, inputs, resources, retry or Retry(attempts=3, backoff_seconds=10), required)


def schedule(*steps: Step, cpus: float = 2, committed: frozenset[str] = frozenset()) -> Schedule:
    return new_schedule({s.name: s for s in steps}, committed=committed, cpus=cpus, gpus=0)


def advance(state: Schedule, event: Event) -> tuple[Schedule, list[StepState]]:
    """Return the next schedule and the states that steps entered, and see that the one before stays as it was."""
    before = dict(state.steps)
    after = machine.advance(state, event)
    assert state.steps == before
    return after, after.entered


def entered(states: list[StepState], phase: Phase) -> list[str]:
    return [state.name for state in states if state.phase is phase]


def launched(states: list[StepState]) -> list[str]:
    return entered(states, Phase.RUNNING)


def test_advance_launches_only_what_is_ready() -> None:
    state, decisions = advance(schedule(step("a"), step("b", "a")), Tick(0))
    assert launched(decisions) == ["a"]
    state, decisions = advance(state, Committed("a", 1))
    assert launched(decisions) == ["b"]


def test_advance_admits_no_more_than_the_cluster_has() -> None:
    state, decisions = advance(schedule(step("a", cpus=2), step("b", cpus=1), step("c", cpus=1)), Tick(0))
    assert launched(decisions) == ["a"]
    state, decisions = advance(state, Committed("a", 1))
    assert launched(decisions) == ["b", "c"]


def test_advance_step_larger_than_the_cluster_runs_alone() -> None:
    state, decisions = advance(schedule(step("huge", cpus=9), step("small")), Tick(0))
    assert launched(decisions) == ["huge"]


def test_advance_committed_step_is_never_launched() -> None:
    _, decisions = advance(schedule(step("a"), step("b", "a"), committed=frozenset({"a"})), Tick(0))
    assert launched(decisions) == ["b"]


def test_advance_failed_attempt_is_tried_again_after_its_backoff() -> None:
    state, _ = advance(schedule(step("a")), Tick(0))
    state, decisions = advance(state, Failed("a", 5, LOST))
    assert state.steps["a"].phase is Phase.BACKING_OFF
    assert launched(decisions) == []
    state, decisions = advance(state, Tick(14.9))
    assert launched(decisions) == []
    state, decisions = advance(state, Tick(15))
    assert [(d.name, d.attempt, d.resources) for d in decisions] == [("a", 2, Resources())]
    assert launched(decisions) == ["a"]


def test_advance_permanent_failure_skips_what_needs_it_and_goes_on_elsewhere() -> None:
    state, _ = advance(schedule(step("a"), step("b", "a"), step("c", "b"), step("d"), cpus=1), Tick(0))
    state, decisions = advance(state, Failed("a", 1, BROKEN))
    assert {name: s.phase for name, s in state.steps.items()} == {
        "a": Phase.FAILED,
        "b": Phase.SKIPPED,
        "c": Phase.SKIPPED,
        "d": Phase.RUNNING,
    }
    state, _ = advance(state, Committed("d", 2))
    assert state.over
    assert not state.succeeded


def test_advance_optional_step_failing_leaves_the_run_succeeded() -> None:
    state, _ = advance(schedule(step("a"), step("b", required=False)), Tick(0))
    state, _ = advance(state, Failed("b", 1, BROKEN))
    state, _ = advance(state, Committed("a", 2))
    assert state.over
    assert state.succeeded


def test_advance_out_of_memory_leaves_the_other_attempts_as_they_were() -> None:
    retry = Retry(attempts=2, backoff_seconds=0)
    state, _ = advance(schedule(step("a", retry=retry)), Tick(0))
    for at, rows in ((1, 8), (2, 4), (3, 2)):
        full = Failure(FailureKind.OUT_OF_MEMORY, "full", micro_batch=rows)
        state, decisions = advance(state, Failed("a", at, full))
        assert launched(decisions) == ["a"]
    state, decisions = advance(state, Failed("a", 4, LOST))
    assert launched(decisions) == ["a"]
    state, decisions = advance(state, Failed("a", 5, LOST))
    assert state.steps["a"].phase is Phase.FAILED
    assert "at attempt 2 of 2" in state.steps["a"].reason


def test_advance_attempt_past_its_timeout_is_stopped_and_tried_again() -> None:
    state, _ = advance(schedule(step("a", retry=Retry(attempts=2, backoff_seconds=0, timeout_seconds=30))), Tick(0))
    state, _ = advance(state, Began("a", 10))
    state, decisions = advance(state, Tick(39))
    assert decisions == []
    state, decisions = advance(state, Tick(41))
    assert [d.phase for d in decisions] == [Phase.STOPPING]
    state, decisions = advance(state, Failed("a", 42, Failure(FailureKind.TRANSIENT, "cancelled")))
    (failed, _) = decisions
    assert "ran past its timeout at attempt 1 of 2" in failed.reason
    assert launched(decisions) == ["a"]


def test_advance_attempt_that_never_begins_fails_naming_what_it_asks_for() -> None:
    state, _ = advance(schedule(step("a", retry=Retry(pending_timeout_seconds=60))), Tick(0))
    state, decisions = advance(state, Tick(61))
    assert [d.phase for d in decisions] == [Phase.STOPPING]
    state, _ = advance(state, Failed("a", 62, Failure(FailureKind.TRANSIENT, "cancelled")))
    assert state.steps["a"].phase is Phase.FAILED
    assert "1 × 1 CPU" in state.steps["a"].reason


def test_advance_blocked_optional_step_is_skipped_with_what_needs_it_and_the_rest_runs() -> None:
    steps = {s.name: s for s in (step("a", required=False), step("b", "a", required=False), step("c"))}
    blocked = {"a": "it needs 1 GPU"}
    made = new_schedule(steps, committed=frozenset(), cpus=2, gpus=0, blocked=blocked)
    state, decisions = advance(made, Tick(0))
    assert launched(decisions) == ["c"]
    assert (state.steps["a"].phase, state.steps["a"].reason) == (Phase.SKIPPED, "it needs 1 GPU")
    state, _ = advance(state, Committed("c", 1))
    assert state.steps["b"].phase is Phase.SKIPPED
    assert state.over
    assert state.succeeded


@pytest.mark.parametrize("phase", [Phase.HELD, Phase.BACKING_OFF])
def test_advance_postponed_step_waits_and_spends_no_attempt(phase: Phase) -> None:
    state, _ = advance(schedule(step("a")), Tick(0))
    state, decisions = advance(state, Postponed("a", 0, phase, "not yet", 2))
    assert [(d.name, d.phase, d.reason) for d in decisions] == [("a", phase, "not yet")]
    state, decisions = advance(state, Tick(1))
    assert (decisions, state.steps["a"].phase) == ([], phase)
    state, decisions = advance(state, Tick(2))
    assert launched(decisions) == ["a"]
    assert state.steps["a"].attempt == 1


def test_advance_step_that_another_run_took_over_is_stopped_once_and_tried_again_as_such() -> None:
    state, _ = advance(schedule(step("a")), Tick(0))
    state, decisions = advance(state, Overtaken("a", 1))
    assert [(d.phase, d.reason) for d in decisions] == [(Phase.STOPPING, "another run took it over while it ran")]
    assert advance(state, Overtaken("a", 2))[1] == []
    state, _ = advance(state, Failed("a", 3, BROKEN))
    assert state.steps["a"].phase is Phase.BACKING_OFF
    assert "was overtaken by another run at attempt 1 of 3" in state.steps["a"].reason
    state, decisions = advance(state, Overtaken("a", 4))
    assert (decisions, state.steps["a"].phase) == ([], Phase.BACKING_OFF), "of what does not run nothing is stopped"


def test_advance_interruption_stops_what_runs_and_launches_nothing_more() -> None:
    state, _ = advance(schedule(step("a"), step("b", "a")), Tick(0))
    state, decisions = advance(state, Interrupted(1))
    assert entered(decisions, Phase.STOPPING) == ["a"]
    assert state.steps["b"].phase is Phase.CANCELLED
    state, decisions = advance(state, Failed("a", 2, LOST))
    assert launched(decisions) == []
    assert state.over
    assert not state.succeeded


def test_advance_interrupted_step_that_ended_well_stays_committed() -> None:
    state, _ = advance(schedule(step("a")), Tick(0))
    state, _ = advance(state, Interrupted(1))
    state, _ = advance(state, Committed("a", 1))
    assert state.steps["a"].phase is Phase.COMMITTED


# Random graphs ------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Plays the cluster and the store: attempts end at random, drivers die at random, commits stay."""

    steps: tuple[Step, ...]
    committed: set[str] = field(default_factory=set)
    launches_after_commit: int = 0
    failures_left: int = 20
    now: float = 0.0

    def drive(self, data: st.DataObject, *, may_die: bool) -> Schedule | None:
        """Run a driver to its end, or until it dies (returns None)."""
        state = schedule(*self.steps, committed=frozenset(self.committed))
        running: set[str] = set()
        state, decisions = advance(state, Tick(self.now))
        for _ in range(1000):
            for name in launched(decisions):
                self.launches_after_commit += name in self.committed
                assert all(need in self.committed for need in state.steps[name].needs)
                running.add(name)
            demand = sum(state.steps[name].resources.total_cpus for name in running)
            assert demand <= state.cpus or len(running) == 1
            if state.over:
                return state
            if may_die and data.draw(st.integers(0, 9), label="die") == 9:
                return None
            self.now += 1
            if not running:
                self.now += 1000
                state, decisions = advance(state, Tick(self.now))
                continue
            name = data.draw(st.sampled_from(sorted(running)), label="ends")
            running.discard(name)
            if self.failures_left and data.draw(st.integers(0, 9), label="overtaken") == 9:
                self.failures_left -= 1
                state, stopped = advance(state, Overtaken(name, self.now))
                assert name in entered(stopped, Phase.STOPPING)
                state, decisions = advance(state, Failed(name, self.now, LOST))
                decisions = stopped + decisions
            elif self.failures_left and data.draw(st.integers(0, 9), label="postponed") == 9:
                self.failures_left -= 1
                state, decisions = advance(state, Postponed(name, self.now, Phase.HELD, "not yet", 2))
            elif self.failures_left and data.draw(st.integers(0, 4), label="fails") == 4:
                self.failures_left -= 1
                failure = data.draw(st.sampled_from([LOST, Failure(FailureKind.PREEMPTED, "p")]))
                state, decisions = advance(state, Failed(name, self.now, failure))
            else:
                self.committed.add(name)
                state, decisions = advance(state, Committed(name, self.now))
        raise AssertionError("the schedule does not end")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Step, ...]:
    names = [f"s{index}" for index in range(draw(st.integers(1, 7)))]
    return tuple(
        step(name, *draw(st.sets(st.sampled_from(names[:index]), max_size=3) if index else st.just(set())), cpus=draw(st.sampled_from([0.5, 1, 2, 5])),
             retry=Retry(attempts=50, backoff_seconds=0.5))
        for index, name in enumerate(names)
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(graphs(), st.data())
def test_advance_random_graph_with_crashes_commits_each_step_and_repeats_none(
    steps: tuple[Step, ...], data: st.DataObject
) -> None:
    world = World(steps)
    for _ in range(5):
        final = world.drive(data, may_die=True)
        if final is not None:
            break
    final = final or world.drive(data, may_die=False)
    assert final is not None
    assert final.succeeded
    assert world.committed == {s.name for s in steps}
    assert world.launches_after_commit == 0


@settings(max_examples=100, deadline=None)
@given(graphs(), st.data())
def test_advance_random_permanent_failures_skip_exactly_what_needs_them(
    steps: tuple[Step, ...], data: st.DataObject
) -> None:
    doomed = data.draw(st.sets(st.sampled_from([s.name for s in steps])))
    state, decisions = advance(schedule(*steps), Tick(0))
    now, running = 0.0, launched(decisions)
    while running:
        name, now = running.pop(), now + 1
        state, decisions = advance(state, Failed(name, now, BROKEN) if name in doomed else Committed(name, now))
        running += launched(decisions)
    assert state.over
    lost: set[str] = set()
    for s in steps:  # built in topological order
        if s.needs() & (lost | doomed):
            lost.add(s.name)
    for s in steps:
        expected = Phase.SKIPPED if s.name in lost else Phase.FAILED if s.name in doomed else Phase.COMMITTED
        assert state.steps[s.name].phase is expected
