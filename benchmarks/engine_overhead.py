"""What the engine costs: no-op steps beside bare Ray tasks, with MLflow on; and planning a thousand steps.

Prints, for one run on this machine: milliseconds a step for 200 no-op steps on reused workers; for 20 steps that each
take a process of their own, beside bare Ray tasks with `max_calls=1`; and seconds to plan 1,000 steps, before and
after they are committed.
"""

import contextlib
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from stages.contract import Context, Outcome, Stage
from workflows.engine.graph import Workflow
from workflows.engine.heartbeat import beating
from workflows.engine.plan import make_plan
from workflows.engine.results import Watcher
from workflows.engine.run import Settings, execute, run_started
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.tracker import RunTracker
from workflows.engine.tracking.tracking_uri import default_tracking_uri

STEPS, FRESH_STEPS, PLANNED_STEPS = 200, 20, 1000


class Nothing(Stage):
    """Leaves one small file."""

    KIND = "dataset"
    REVISION = "2026-11-21 first"
    number: int

    def run(self, context: Context) -> Outcome:
        context.out.put("number.txt", str(self.number).encode())
        return Outcome({"number": float(self.number)})


class NothingFresh(Nothing):
    """The same in a process of its own."""

    FRESH_PROCESS = True


def chain(kind: type[Nothing], num_steps: int, salt: int = 0) -> Workflow:
    flow = Workflow("bench")
    for number in range(num_steps):
        flow.step(f"step.{number}", kind(number=number + salt))
    return flow


def drive_seconds(flow: Workflow, store: ArtifactStore, tasks, *, mlflow: bool) -> float:
    """Time a run from its plan to its last commit and, with MLflow, to its last event."""
    from workflows.engine.driver import Driver

    runs, run = store.root / "runs", f"bench-{time.time_ns()}"
    root = store.root.uri_of("mlflow/artifacts")
    plan = make_plan(flow, store)
    began = time.perf_counter()
    tracker = None
    if mlflow:
        tracker = RunTracker(tracking_uri=default_tracking_uri(store.uri), artifact_root=root, runs=runs, run=run)
        tracker.record(run_started(run, flow, {}, "bench", store))
    record = tracker.record if tracker else lambda event: None
    with beating(runs, run):
        result = Driver(plan, store, tasks, run, record, Watcher()).go()
    if tracker:
        state = tracker.close(120)
        assert not state.waiting, state
    assert result.succeeded
    return time.perf_counter() - began


def bare_fresh_seconds(num_tasks: int) -> float:
    import ray

    task = ray.remote(num_cpus=0, max_calls=1)(lambda number: number)
    began = time.perf_counter()
    ray.get([task.remote(number) for number in range(num_tasks)])
    return time.perf_counter() - began


def main() -> None:
    from workflows.engine.ray_executor import RayExecutor

    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(str(Path(folder) / "store"))
        # The first run makes MLflow's database and warms Ray's workers up.
        execute(
            chain(Nothing, 2, salt=10**6),
            Settings(store=store.uri),
            watch=lambda plan: contextlib.nullcontext(Watcher()),
            interrupt=threading.Event(),
            params={},
            command="bench",
            by_value=sys.modules[__name__] if __name__ != "__main__" else None,
        )
        tasks = RayExecutor()
        with contextlib.closing(tasks):
            drive_seconds(chain(Nothing, 20, salt=10**5), store, tasks, mlflow=False)
            without = drive_seconds(chain(Nothing, STEPS, salt=1000), store, tasks, mlflow=False)
            with_mlflow = drive_seconds(chain(Nothing, STEPS), store, tasks, mlflow=True)
            print(
                f"{STEPS} no-op steps on reused workers: {with_mlflow / STEPS * 1e3:.1f} ms a step with MLflow (sqlite), {without / STEPS * 1e3:.1f} ms without; asked: at most 60 ms with"
            )
            pairs = []
            for turn in range(3):
                ours = drive_seconds(
                    chain(NothingFresh, FRESH_STEPS, salt=2000 + 100 * turn), store, tasks, mlflow=False
                )
                pairs.append((ours, bare_fresh_seconds(FRESH_STEPS)))
            ours, bare = (statistics.median(side) / FRESH_STEPS * 1e3 for side in zip(*pairs, strict=True))
            print(
                f"{FRESH_STEPS} steps in processes of their own: {ours:.0f} ms a step, a bare Ray task with max_calls=1 {bare:.0f} ms; ratio {ours / bare:.2f}"
            )
            flow = chain(Nothing, PLANNED_STEPS)
            began = time.perf_counter()
            make_plan(flow, store)
            planned = time.perf_counter() - began
            drive_seconds(flow, store, tasks, mlflow=False)
            began = time.perf_counter()
            plan = make_plan(flow, store)
            replanned = time.perf_counter() - began
            assert len(plan.having("HIT")) == PLANNED_STEPS
            print(
                f"{PLANNED_STEPS} steps planned in {planned:.2f} s ({STEPS} of them committed), in {replanned:.2f} s once all are committed; asked: under 2 s"
            )


if __name__ == "__main__":
    main()
