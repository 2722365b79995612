"""Steps as Ray tasks: start a cluster or join one, submit, poll, cancel. The only engine file that imports ray.

A step's task holds no CPU and no GPU: the library inside it (Ray Data, Train, Tune) takes the real ones. Retries are
the engine's, so Ray's are off. What a stage reports goes to one actor without CPUs that the driver drains.
"""

import logging
import math
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from stages.errors import ConfigError
from stages.runtime import workarounds
from stages.runtime.processes import preserve_signal_handlers
from stages.storage import Folder, is_remote
from workflows.engine import worker
from workflows.engine.executor import Attempt, AttemptResult, ProgressUpdates
from workflows.engine.failures import Failure, FailureKind
from workflows.engine.plan import ClusterResources
from workflows.engine.provenance import ROOT
from workflows.engine.retrying import brief

logger = logging.getLogger(__name__)

PROBE_SECONDS = 3.0
"""How long an address may take to accept a connection; a dead one costs Ray itself 30 to 100 s."""
CANCEL_GRACE_SECONDS = 4.0
"""How long a cancelled task may take to end before its worker is killed."""
ORPHAN_SECONDS = 30.0
"""How long after an attempt's failure to look for placement groups that it left; Ray notes an owner's death in 1 s."""


def local_resources() -> ClusterResources:
    """Return what this machine has, as a Ray started here would offer it."""
    cpus = max(2, os.cpu_count() or 2)  # two training ranks on a one-core machine are slow, not wrong
    gpus = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    return ClusterResources(cpus, gpus, cpus, gpus)


def probe(address: str) -> None:
    """Connect to a cluster's address by TCP.

    Raises:
        ConfigError: nothing answers there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{address!r} is no address; expected HOST:PORT of a running Ray head, e.g. 10.0.0.5:6379")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r} ({error}); expected HOST:PORT of a running head, e.g. "
            "10.0.0.5:6379; leave --address out to run on this machine"
        ) from error


@dataclass(slots=True)
class _Running:
    step: str
    actor: Any | None
    """The process that the attempt has to itself."""
    kill_at: float = math.inf


class RayExecutor:
    """Runs attempts on a Ray cluster."""

    def __init__(
        self, *, address: str | None = None, verbose: bool = False, by_value: ModuleType | None = None
    ) -> None:
        """Start Ray on this machine, or join the cluster at an address.

        Args:
            address: `HOST:PORT` of a running cluster's head; None starts Ray here.
            verbose: let Ray's and the workers' own output through to the terminal.
            by_value: the user's own workflow module, which workers cannot import and are sent.
        """
        if address:
            probe(address)
        _set_environment(local=address is None)
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._address = ray, address
        where: dict[str, Any]
        if address is None:
            cpus, folder = int(local_resources().cpus), workarounds.short_temp_dir(os.environ)
            where = {"address": "local", "num_cpus": cpus, "_temp_dir": folder, "_node_ip_address": "127.0.0.1"}
            where["include_dashboard"] = False
        else:
            packages = [str(ROOT / name) for name in ("stages", "workflows")]
            where = {"address": address, "runtime_env": {"py_modules": packages}}
        where |= {"namespace": f"stillhouse-{secrets.token_hex(4)}", "configure_logging": verbose}
        with preserve_signal_handlers():
            ray.init(log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR, **where)
        if not verbose:
            workarounds.silence_ray_stdout()
        if by_value is not None:
            ray.cloudpickle.register_pickle_by_value(by_value)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        once = ray.remote(num_cpus=0, max_concurrency=1, max_restarts=-1, scheduling_strategy=here)
        self._collector = once(worker.ProgressCollector).remote()
        self._run = ray.remote(num_cpus=0, num_gpus=0, max_retries=0)(worker.run_attempt)
        self._fresh = ray.remote(num_cpus=0, num_gpus=0, max_restarts=0)(worker.FreshWorker)
        self._running: dict[Any, _Running] = {}
        self._orphans_until = 0.0

    def cluster_resources(self) -> ClusterResources:
        """Return what the cluster's living nodes have."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus, gpus = [node.get("CPU", 0.0) for node in nodes], [node.get("GPU", 0.0) for node in nodes]
        name = f"the cluster at {self._address}" if self._address else "this machine"
        return ClusterResources(sum(cpus), sum(gpus), max(cpus, default=0.0), max(gpus, default=0.0), name)

    def check_store_is_shared(self, store: Folder) -> None:
        """See that every node can read what this driver writes into the store.

        Raises:
            ConfigError: a node cannot.
        """
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        if is_remote(store.uri) or len(nodes) < 2:
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        mark = f"probe-{secrets.token_hex(8)}"
        look = self._ray.remote(num_cpus=0)(lambda: store.has(mark))
        store.put(mark, b"stillhouse")
        try:
            places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
            sees = self._ray.get([look.options(scheduling_strategy=at).remote() for at in places])
        finally:
            store.delete([mark])
        if blind := [node["NodeManagerHostname"] for node, seen in zip(nodes, sees, strict=True) if not seen]:
            problem = f"the store {store.uri} is not the same folder on node {', '.join(blind)}"
            raise ConfigError(f"{problem}; use a shared file system or s3:// or gs://")

    def submit(self, attempt: Attempt) -> None:
        """Start an attempt."""
        actor = self._fresh.remote() if attempt.stage.FRESH_PROCESS else None
        ref = (actor.run if actor else self._run).remote(attempt, self._collector)
        self._running[ref] = _Running(attempt.step, actor)

    def poll(self, timeout_seconds: float) -> list[tuple[str, AttemptResult | Failure]]:
        """Wait for attempts to end, at most so long, and return those that did, by step."""
        if time.monotonic() < self._orphans_until:
            try:
                workarounds.remove_orphaned_groups()
            except self._ray.exceptions.RayError as error:
                logger.warning("cannot look for placement groups that a lost step left: %s", error)
        if not self._running:
            time.sleep(timeout_seconds)
            return []
        for ref, running in self._running.items():
            if time.monotonic() > running.kill_at:
                self._ray.cancel(ref, force=True)
                running.kill_at = math.inf
        refs = list(self._running)
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=timeout_seconds)
        if ready:  # take all that are ready, not only the first
            ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        ended = [(self._running[ref].step, self._result(ref)) for ref in ready]
        if any(isinstance(result, Failure) for _, result in ended):
            self._orphans_until = time.monotonic() + ORPHAN_SECONDS
        return ended

    def _result(self, ref: Any) -> AttemptResult | Failure:
        if actor := self._running.pop(ref).actor:
            self._ray.kill(actor)
        try:
            result: AttemptResult | Failure = self._ray.get(ref)
        except self._ray.exceptions.TaskCancelledError:
            return Failure(FailureKind.TRANSIENT, "it was cancelled")
        except self._ray.exceptions.OutOfMemoryError as error:
            problem = f"its node ran out of memory and Ray ended its worker: {brief(error)}"
            return Failure(FailureKind.OUT_OF_MEMORY, problem)
        except self._ray.exceptions.RayTaskError as error:
            logger.info("%s", error)
            last = str(error.cause).strip().splitlines()[-1]
            if "No module" in last:
                last += "; workers have stillhouse and the workflow's own file, nothing beside it"
            return Failure(FailureKind.PERMANENT, f"its worker could not run it: {last}")
        except self._ray.exceptions.RayError as error:
            problem = f"its worker or node died ({type(error).__name__}: {brief(error)})"
            return Failure(FailureKind.WORKER_LOST, problem)
        return result

    def reports(self) -> ProgressUpdates:
        """Return what stages reported since the last call; nothing where the actor does not answer in time."""
        try:
            found: ProgressUpdates = self._ray.get(self._collector.drain.remote(), timeout=2.0)
        except self._ray.exceptions.RayError as error:
            logger.warning("no reports from the stages: %s", error)
            return ProgressUpdates()
        return found

    def cancel(self, step: str) -> None:
        """End a running attempt: its library first, its worker if that does not end in time."""
        for ref, running in self._running.items():
            if running.step != step:
                continue
            if running.actor:  # what it owns (Train's controller, Tune's trials) ends with it
                self._ray.kill(running.actor)
            else:
                self._ray.cancel(ref, force=False)
                running.kill_at = time.monotonic() + CANCEL_GRACE_SECONDS

    def close(self) -> None:
        """Leave the cluster; what still runs there for us ends."""
        with workarounds.killing_workers_left_behind(local=self._address is None):
            self._ray.shutdown()


def _set_environment(*, local: bool) -> None:
    """Set what Ray reads at import: quiet, and a token of our own for a Ray that we start."""
    quiet = {
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_DEDUP_LOGS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if local and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
