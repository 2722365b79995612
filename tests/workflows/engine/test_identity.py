"""Fingerprints: equal for equal work everywhere, different for any change that matters, refused where unstable."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.contract import Config, Resources, Stage
from stages.errors import ConfigError
from stages.external.checkpoints import Checkpoint
from tests.stages_for_tests import Join, Write
from workflows.engine.graph import Retry, Workflow
from workflows.engine.identity import Identity, Unknown, canonical, differences, identities


def fingerprint(flow: Workflow, step: str) -> str:
    identity = identities(flow)[step]
    assert isinstance(identity, Identity)
    return identity.fingerprint


def graph(text: str = "x", mark: str = "", **options: Any) -> Workflow:
    flow = Workflow("w")
    flow.step("join", Join(mark=mark), data=flow.step("data", Write(text=text), **options))
    return flow


def test_identity_resources_and_retries_change_nothing() -> None:
    other = graph(
        resources=Resources(workers=7, gpus_per_worker=2, micro_batch=3), retry=Retry(attempts=9, timeout_seconds=1)
    )
    assert fingerprint(graph(), "join") == fingerprint(other, "join")


def test_identity_step_name_changes_nothing() -> None:
    flow = Workflow("another")
    flow.step("renamed", Join(), data=flow.step("corpus", Write()))
    assert fingerprint(flow, "renamed") == fingerprint(graph(), "join")


def test_identity_upstream_config_changes_downstream() -> None:
    assert fingerprint(graph(text="x"), "join") != fingerprint(graph(text="y"), "join")


def test_identity_candidate_name_counts() -> None:
    def named(name: str) -> str:
        flow = Workflow("w")
        data = flow.step("data", Write())
        flow.step("all", Join(), data=data, parts={name: flow.step("a", Join(), data=data)})
        return fingerprint(flow, "all")

    assert named("teacher") != named("student")


def test_identity_every_field_of_every_stage_counts() -> None:
    """Generated from the models' fields, so that a new field cannot be forgotten."""
    for stage in (Write(), Join()):
        for name in type(stage).model_fields:
            changed = stage.model_copy(update={name: "something else"})
            assert canonical(changed) != canonical(stage), f"{type(stage).__name__}.{name}"


def test_identity_revision_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(graph(), "data")
    monkeypatch.setattr(Write, "REVISION", "2027-01-01 results changed")
    assert fingerprint(graph(), "data") != before


def test_identity_of_a_users_own_stage_of_the_same_name_is_another() -> None:
    theirs = type(
        "Write",
        (Write,),
        {"__module__": "stillhouse_user_mine", "__qualname__": "Write", "run": Write.run, "__annotations__": {}},
    )
    flow = Workflow("w")
    flow.step("data", theirs())
    assert fingerprint(flow, "data") != fingerprint(graph(), "data")
    record = identities(graph())["data"]
    assert isinstance(record, Identity)
    assert record.record["stage"] == "tests.stages_for_tests.Write"


def test_canonical_external_data_of_the_same_name_in_another_module_is_another(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    theirs = type("Checkpoint", (Checkpoint,), {"__module__": "stillhouse_user_mine", "__qualname__": "Checkpoint"})
    assert canonical(Checkpoint(source=str(tmp_path))) != canonical(theirs(source=str(tmp_path)))


def test_identity_equal_in_other_processes_and_hash_seeds() -> None:
    code = "from tests.workflows.engine.test_identity import fingerprint, graph; print(fingerprint(graph(), 'join'))"
    found = {fingerprint(graph(), "join")}
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        root = Path(__file__).parents[3]
        found.add(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, cwd=root).strip())
    assert len(found) == 1


def test_identity_dict_order_changes_nothing() -> None:
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    assert json.dumps(canonical({"b": {"d": 1, "c": 2}, "a": 1})) == json.dumps(
        canonical({"a": 1, "b": {"c": 2, "d": 1}})
    )


class Held(Config):
    """Holds anything, for the test below."""

    model_config = {"arbitrary_types_allowed": True}
    value: Any


@pytest.mark.parametrize(
    "value",
    [lambda: 0, object(), Path("/data"), math.nan, math.inf, b"bytes", print],
    ids=["lambda", "object", "path", "nan", "inf", "bytes", "builtin"],
)
def test_canonical_value_without_stable_form_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="no stable form"):
        canonical(Held(value=value))


def test_identity_same_checkpoint_in_two_places_is_one(tmp_path: Path) -> None:
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    found = set()
    for name in ("here", "there"):
        flow = Workflow("w")
        data = flow.step("data", Write())
        flow.step(
            "join", Join(), data=data, parts={"t": flow.external("teacher", Checkpoint(source=str(tmp_path / name)))}
        )
        found.add(fingerprint(flow, "join"))
    assert len(found) == 1


def test_identity_missing_checkpoint_leaves_it_and_what_follows_unknown(tmp_path: Path) -> None:
    flow = Workflow("w")
    data = flow.step("data", Write())
    first = flow.step(
        "join", Join(), data=data, parts={"t": flow.external("teacher", Checkpoint(source=str(tmp_path / "gone")))}
    )
    flow.step("after", Join(), data=data, parts={"j": first})
    found = identities(flow)
    own, after = found["join"], found["after"]
    assert isinstance(own, Unknown)
    assert own.own
    assert "gone" in own.reason
    assert isinstance(after, Unknown)
    assert not after.own
    assert after.reason == "waits for join"
    assert isinstance(found["data"], Identity)


def test_differences_name_the_field_and_both_values() -> None:
    old, new = identities(graph(text="x"))["data"], identities(graph(text="y"))["data"]
    assert isinstance(old, Identity)
    assert isinstance(new, Identity)
    assert differences(old.record, new.record) == ['config.text: "x" → "y"']


def test_differences_go_into_lists_of_equal_length() -> None:
    old, new = {"losses": [{"w": 1.0}, {"t": 1.0}]}, {"losses": [{"w": 1.0}, {"t": 2.0}]}
    assert differences(old, new) == ["losses[1].t: 1.0 → 2.0"]
    assert differences(old, {"losses": []}) == ['losses: [{"w": 1.0}, {"t": 1.0}] → []']


def test_stage_without_run_cannot_be_made() -> None:
    class Idle(Stage):
        KIND = "model"
        REVISION = "1"

    with pytest.raises(TypeError):
        Idle()  # type: ignore[abstract]
