"""When a workaround for a library can go: these fail where its reason, or what it leans on, may have gone."""

import inspect
import logging
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import ray
import torch

from stages.errors import ConfigError
from stages.runtime.workarounds import (
    MAX_SOCKET_PATH_BYTES,
    SEEN_IN,
    SESSION,
    allocations,
    deprecated_options,
    num_scaled_by_awq,
    rounded_to_nearest,
    short_temp_dir,
    silence_progress_bars,
    trainer_class,
)


@pytest.mark.parametrize("package", SEEN_IN)
def test_workarounds_were_looked_at_for_this_version(package: str) -> None:
    """When this fails, read `workarounds.py`, delete what has lost its reason, and raise the version in SEEN_IN."""
    assert metadata.version(package).startswith(SEEN_IN[package])


def test_names_that_workarounds_lean_on_are_there_in_ray() -> None:
    from ray._private import node, services, worker
    from ray._private.state import GlobalState, state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group

    assert list(inspect.signature(worker.print_to_stdstream).parameters) == ["data", "ignore_prefix"]
    assert issubclass(services.ConsolePopen, subprocess.Popen)
    assert "process_group" not in inspect.getsource(services), "Ray's processes are in groups of their own"
    assert "os.path.abspath(os.path.curdir)" in inspect.getsource(worker.connect)
    assert callable(state._connect_and_get_accessor)
    assert {"creator_actor_dead", "creator_actor_id", "is_detached"} <= set(Group.DESCRIPTOR.fields_by_name)
    assert "creator" not in inspect.getsource(GlobalState._gen_placement_group_info), (
        "the public table names the creator: use it"
    )
    assert 'f"session_{date_str}_{os.getpid()}"' in inspect.getsource(node.Node)


def test_cleaner_of_ray_train_needs_the_dashboard_still() -> None:
    """When this fails, Ray Train's own cleaner may do, and ours may serve Tune alone."""
    from ray.train.v2._internal.execution.controller import placement_group_cleaner as cleaner

    assert "RayStateApiException" in inspect.getsource(cleaner)


def test_progress_bars_that_are_off_warn_still_and_are_silenced() -> None:
    """When the first line fails, `silence_progress_bars` can go."""
    from ray.data._internal import progress

    assert "Progress bars disabled" in inspect.getsource(progress)
    logger = logging.getLogger(progress.__name__)
    before = logger.level
    try:
        silence_progress_bars()
        assert not logger.isEnabledFor(logging.WARNING)
    finally:
        logger.setLevel(before)


def test_allocations_come_in_order_and_torch_has_no_public_list_of_them() -> None:
    """When the last line fails, torch's own table may do, and `allocations` can go."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        torch.empty(5000, dtype=torch.uint8)
    assert allocations(profiler) == [1000, -1000, 5000, -5000]
    assert not [event for event in profiler.events() if event.name == "[memory]" and event.cpu_memory_usage == 1000]


def test_modifier_of_gptq_has_no_public_list_of_what_it_rounded_to_nearest() -> None:
    """When this fails, the public name may do, and `rounded_to_nearest` can go."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    modifier = GPTQModifier()
    assert rounded_to_nearest(modifier) == []
    assert not [name for name in dir(modifier) if "fallback" in name and not name.startswith("_")]


def test_short_temp_dir_where_the_usual_one_is_short_is_ray_s_own() -> None:
    assert short_temp_dir({}) is None
    assert short_temp_dir({"TMPDIR": "/tmp"}) is None
    longest = "/" + "x" * (MAX_SOCKET_PATH_BYTES - len(SESSION) - len("/ray") - 1)
    assert short_temp_dir({"TMPDIR": longest}) is None
    assert short_temp_dir({"TMPDIR": longest + "x"}) is not None


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_short_temp_dir_below_a_long_folder_is_a_short_one(name: str) -> None:
    long = f"/tmp/{'folder-of-a-job/' * 10}"
    assert short_temp_dir({name: long}) == f"/tmp/ray-{os.getuid()}"
    assert short_temp_dir({name: long, "XDG_RUNTIME_DIR": "/dev/shm"}) == f"/dev/shm/ray-{os.getuid()}"


def test_short_temp_dir_where_none_can_be_written_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"a socket's may have \d+; set RAY_TMPDIR to a short folder"):
        short_temp_dir({"TMPDIR": "/tmp/" + "x" * 90})


def test_awq_of_llm_compressor_still_pins_its_cache_without_an_accelerator() -> None:
    """When this fails, `unpinned_cache` can go."""
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.awq import base as awq

    assert "cache.pin_memory(batch_index)" in inspect.getsource(awq)
    assert num_scaled_by_awq(AWQModifier()) == 0


def test_conversions_that_experts_are_split_by_are_there_in_transformers() -> None:
    """Where a family's checkpoints name each expert's `gate_proj`, split experts load back; Mixtral's are `w1`."""
    from transformers import conversion_mapping

    def names(model_type: str) -> str:
        found = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
        return " ".join(pattern for rule in found for pattern in rule.source_patterns)

    assert "gate_proj" in names("qwen3_moe")
    assert "w1" in names("mixtral")
    assert "gate_proj" not in names("mixtral")


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_ray_under_a_long_temp_dir_starts(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60) / ("y" * 60)
    long.mkdir(parents=True)
    code = (
        "from workflows.engine.ray_executor import RayExecutor\n"
        "executor = RayExecutor()\nexecutor.start()\nprint(executor.cluster_resources().cpus > 0)\nexecutor.close()\n"
    )
    environment = {**os.environ, "TMPDIR": str(long)}
    environment.pop("RAY_TMPDIR", None)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.strip().endswith("True"), found.stderr[-2000:]


@pytest.mark.ray
def test_trainer_leaves_out_just_the_unwanted_callbacks(tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def callbacks(kind: type) -> list[str]:
        run = RunConfig(storage_path=str(tmp_path), name="run")
        trainer = kind(lambda: None, scaling_config=ScalingConfig(num_workers=1), run_config=run)
        return [type(callback).__name__ for callback in trainer._create_default_callbacks()]

    unwanted = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    default = callbacks(TorchTrainer)
    assert unwanted < set(default), "Ray starts them no longer: trainer_class can go"
    assert callbacks(trainer_class()) == [name for name in default if name not in unwanted]


@pytest.mark.ray
def test_ray_data_still_deprecates_every_way_to_switch_off_its_retries(local_ray: None) -> None:
    from ray.util.annotations import RayDeprecationWarning

    data = ray.data.from_items([{"item": 1}])
    with pytest.warns(RayDeprecationWarning):  # else deprecated_options can go
        data.map(lambda row: row, max_retries=0)
    with deprecated_options():
        data.map(lambda row: row, max_retries=0)
