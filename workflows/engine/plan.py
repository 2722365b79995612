"""Fingerprints + store → HIT, MISS or BLOCKED for every step, with the reason. Reads the store; starts nothing.

HIT: the newest commit of this fingerprint is not withdrawn, its files are there, and its inputs are its inputs' newest
commits. MISS: it must run; the reason names the field, file, input or commit that changed since this step last had a
result. BLOCKED: it could not run even once its inputs exist.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event as Flag
from typing import Any, Literal

from stages.contract import Resources
from stages.errors import StillhouseError
from workflows.engine.check import check, find_step
from workflows.engine.graph import Handle, Source, Step, Workflow
from workflows.engine.identity import Fingerprint, Identity, Unknown, differences, identities
from workflows.engine.manifest import InputCommit
from workflows.engine.provenance import code_digest
from workflows.engine.store import ArtifactStore, Commit

PlanStatus = Literal["HIT", "MISS", "BLOCKED"]
WatchFile = Callable[[str, str, int], None]
"""Is called with a step, a path and the bytes of it that were just read, while files are hashed."""

STORE_READERS = 8
"""Steps looked up at once: a look-up is two to four requests, which on S3 take some 20 ms each."""


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """What a cluster has, as far as planning needs it."""

    cpus: float
    gpus: float
    largest_node_cpus: float
    largest_node_gpus: float
    name: str = "this machine"


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What would happen to one step."""

    step: Step
    status: PlanStatus
    reason: str
    identity: Identity | None = None
    commit: Commit | None = None
    seconds_estimate: float | None = None
    """How long the step took the last time it had a result."""
    seen_generation: int = 0
    """The newest commit that planning saw, counted or refused: a newer one is another run's and can be shared."""

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The step's fingerprint, or None where data from outside is out of reach."""
        return self.identity.fingerprint if self.identity else None

    @property
    def known(self) -> Identity:
        """The identity of a step that has one."""
        assert self.identity is not None
        return self.identity

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        need = self.step.resources
        return {
            "name": self.step.name,
            "stage": type(self.step.stage).__name__,
            "status": self.status,
            "reason": self.reason,
            "fingerprint": self.fingerprint,
            "seconds_estimate": self.seconds_estimate,
            "resources": {"workers": need.workers, "cpus": need.total_cpus, "gpus": need.total_gpus},
            "required": self.step.required,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What would happen to every step of a workflow, in order."""

    workflow: Workflow
    steps: Mapping[str, StepPlan]

    def having(self, status: PlanStatus) -> list[StepPlan]:
        """Return the steps of a status."""
        return [plan for plan in self.steps.values() if plan.status == status]


@dataclass(frozen=True, slots=True)
class _Found:
    """What the store has for one step."""

    commit: Commit | None
    flaw: str | None
    """Why its commit does not count."""
    previous: Commit | None
    """The step's last result: its commit, else what `by-name/<workflow>/<step>` names under another fingerprint."""


class PlanInterrupted(StillhouseError):
    """A signal came while a run was planned: nothing was started."""

    exit_code: int = 130


def make_plan(
    workflow: Workflow,
    store: ArtifactStore,
    *,
    only: str | None = None,
    strict_code: bool = False,
    cluster: ClusterResources | None = None,
    watch: WatchFile | None = None,
) -> Plan:
    """Plan a workflow, or what one step of it needs.

    Args:
        workflow: the graph.
        store: what is committed already.
        only: plan this step and what it needs.
        strict_code: a HIT whose stage's code has changed since is a MISS.
        cluster: what there is to run on; None skips that check.
        watch: hash the files that steps to be run will read, rather than only compare sizes; once, while they stay.

    Raises:
        ConfigError: the graph cannot run, or there is no step `only`.
        PlanInterrupted: by `watch`, while files were hashed.
    """
    check(workflow)
    wanted = workflow.upstream(find_step(workflow, only).name) if only else set(workflow.steps)
    known = {name: identity for name, identity in identities(workflow).items() if name in wanted}
    while True:
        with ThreadPoolExecutor(STORE_READERS) as pool:
            found = pool.map(lambda item: _look_up(workflow, store, *item), known.items())
            looked_up = dict(zip(known, found, strict=True))
        plan: dict[str, StepPlan] = {}
        for step in workflow.in_order():
            if (name := step.name) in wanted:
                plan[name] = _plan_step(step, known[name], looked_up[name], plan, cluster, strict_code)
        if watch is None or not _withdraw_corrupt_inputs(store, plan, watch):
            return Plan(workflow, plan)


def _look_up(workflow: Workflow, store: ArtifactStore, name: str, identity: Identity | Unknown) -> _Found:
    fingerprint = identity.fingerprint if isinstance(identity, Identity) else None
    if fingerprint and (commit := store.newest(fingerprint)):
        problems = store.problems(commit)
        return _Found(commit, f"its commit does not verify: {problems[0]}" if problems else None, commit)
    withdrawal = store.withdrawal(fingerprint) if fingerprint else None
    pointer = store.pointed(workflow.name, name)
    previous = store.newest(pointer.fingerprint) if pointer and pointer.fingerprint != fingerprint else None
    return _Found(None, f"its commit was withdrawn: {withdrawal}" if withdrawal else None, previous)


def _plan_step(
    step: Step,
    identity: Identity | Unknown,
    found: _Found,
    before: Mapping[str, StepPlan],
    cluster: ClusterResources | None,
    strict_code: bool,
) -> StepPlan:
    estimate = found.previous.manifest.seconds if found.previous else None
    if isinstance(identity, Unknown):
        return StepPlan(step, "BLOCKED" if identity.own else "MISS", identity.reason, seconds_estimate=estimate)
    miss = _why_miss(step, identity, found, before, strict_code)
    if miss is None and found.commit is not None:
        changed = found.commit.manifest.provenance.code_digest != code_digest(type(step.stage))
        reason = "committed" + (", code changed since" if changed else "")
        return StepPlan(step, "HIT", reason, identity, found.commit, estimate)
    seen = found.commit.generation if found.commit else 0
    lack = _lacking(step.resources, cluster) if cluster else None
    return StepPlan(step, "BLOCKED" if lack else "MISS", lack or miss or "never run", identity, None, estimate, seen)


def _why_miss(
    step: Step, identity: Identity, found: _Found, before: Mapping[str, StepPlan], strict_code: bool
) -> str | None:
    if found.flaw:
        return found.flaw
    if (commit := found.commit) is None:
        if found.previous is None:
            waits = sorted(need for need in step.needs() if before[need].status != "HIT")
            return "never run" + (f"; waits for {', '.join(waits)}" if waits else "")
        return _changed(step, found.previous.manifest.identity, identity.record)
    for need in sorted(step.needs()):
        if before[need].commit is None:
            return f"{need} is run again"
    commits = {name: plan.commit for name, plan in before.items() if plan.commit}
    if outdated := commit.manifest.outdated_input(input_commits(step, identity, commits)):
        return f"{_source_name(dict(step.sources())[outdated])} has a newer commit than the one this was made from"
    if strict_code and commit.manifest.provenance.code_digest != code_digest(type(step.stage)):
        return f"the code of {type(step.stage).__name__} changed (--strict-code)"
    return None


def _changed(step: Step, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say what differs from the step's last result: its own fields first, else the inputs by their step's name."""
    if own := [text for text in differences(old, new) if not text.startswith("inputs.")]:
        shown = "; ".join(text.removeprefix("config.") for text in own[:3])
        return f"changed: {shown}" + (f" and {len(own) - 3} more" if len(own) > 3 else "")
    before, after = old["inputs"], new["inputs"]
    inputs = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    sources = dict(step.sources())
    return "changed: input " + ", ".join(
        f"{name} ({_source_name(sources[name]) if name in sources else 'removed'})" for name in inputs[:3]
    )


def _source_name(source: Source) -> str:
    return source.step if isinstance(source, Handle) else f"external {source.name}"


def input_commits(step: Step, identity: Identity, commits: Mapping[str, Commit]) -> dict[str, InputCommit]:
    """Return the commits that a step would read, given the commit of each step that it needs."""
    generations = {
        name: commits[source.step].generation if isinstance(source, Handle) else 0 for name, source in step.sources()
    }
    return {name: InputCommit(fingerprint=identity.inputs[name], generation=g) for name, g in generations.items()}


def _lacking(need: Resources, cluster: ClusterResources) -> str | None:
    """Say what a cluster lacks for a step, or None."""
    for what, each, total, largest, have in (
        ("GPU", need.gpus_per_worker, need.total_gpus, cluster.largest_node_gpus, cluster.gpus),
        ("CPU", need.cpus_per_worker, need.total_cpus, cluster.largest_node_cpus, cluster.cpus),
    ):
        if each > largest:
            return f"each of its workers needs {each:g} {what}, and the largest node of {cluster.name} has {largest:g}"
        if total > have:
            return f"it needs {total:g} {what} ({need.workers} workers × {each:g}), and {cluster.name} has {have:g}"
    return None


def watch_hashing(progress: Callable[[str], None] | None, interrupt: Flag | None = None) -> WatchFile:
    """Return what shows how far hashing is, as a line for people; it raises once `interrupt` is set."""
    total = 0

    def watch(step: str, path: str, num_bytes: int) -> None:
        nonlocal total
        total += num_bytes
        if interrupt is not None and interrupt.is_set():
            raise PlanInterrupted(f"interrupted while {path} of {step} was verified; nothing was started")
        if progress is not None:
            progress(f"verifying {step}: {path.split('/', 2)[2]} ({total / 1e6:,.0f} MB read)")

    return watch


def _withdraw_corrupt_inputs(store: ArtifactStore, plan: Mapping[str, StepPlan], watch: WatchFile) -> bool:
    """Withdraw commits that steps to be run would read and whose files do not verify; return whether there were any."""
    corrupt = False
    for name in sorted({need for step in plan.values() if step.status == "MISS" for need in step.step.needs()}):
        commit = plan[name].commit
        if commit is not None and (problems := store.problems(commit, partial(watch, name))):
            store.withdraw(commit, problems[0])
            corrupt = True
    return corrupt
