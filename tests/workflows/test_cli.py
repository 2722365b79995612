"""The command: what it prints, what it refuses and with which exit code. Nothing here starts Ray."""

import json
import os
from pathlib import Path

import pytest

from stages.errors import ConfigError
from stages.measure.device import describe_gpu
from tests.mlflow_stub import USER_LOGIN, mlflow_stub
from tests.workflows.engine.tracking.nights import started
from workflows.cli import run_command
from workflows.commands.find import find_workflow
from workflows.engine.events import EventLog
from workflows.engine.heartbeat import Holder
from workflows.engine.plan import PlanInterrupted
from workflows.engine.store import ArtifactStore
from workflows.engine.tracking.connection import connect
from workflows.engine.tracking.tracking_uri import default_tracking_uri

FLOW = '''
"""A workflow for the tests of the command."""

from typing import Annotated

from pydantic import Field

from tests.stages_for_tests import Join, Write
from workflows.engine.graph import Workflow


def flow(*, text: str = "x", count: Annotated[int, Field(ge=1)] = 1) -> Workflow:
    """Join some text.

    Args:
        text: what is written.
        count: how many are joined.
    """
    made = Workflow("flow")
    data = made.step("data", Write(text=text))
    for number in range(count):
        made.step(f"join.{number}", Join(mark=str(number)), data=data)
    return made
'''


@pytest.fixture
def flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "flow.py"
    path.write_text(FLOW)
    monkeypatch.chdir(tmp_path)
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must be refused, with and without --json, and return its message."""
    assert run_command(argv) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert run_command([*argv, "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["error"]) == {"kind", "message"}
    assert text.startswith("error: ")
    return text


def test_run_unknown_workflow_names_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'quickstart'?" in refused(capsys, "run", "quikstart")


def test_run_missing_file_names_nearest(capsys: pytest.CaptureFixture[str], flow: str) -> None:
    assert "did you mean 'flow.py'?" in refused(capsys, "run", "flw.py")


def test_run_unknown_parameter_names_nearest(capsys: pytest.CaptureFixture[str], flow: str) -> None:
    assert "Did you mean --count?" in refused(capsys, "run", flow, "--coutn", "2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--teacher-steps", "0"), "--teacher-steps: Input should be greater than or equal to 1; got 0"),
        (("--teacher.rope-theta", "-1"), "--teacher.rope-theta: Input should be greater than 0; got '-1'"),
        (("--teacher.heads", "7"), "--teacher: width 192 over 7 heads is no even whole number"),
        (("--schemes", '{"weight_bits": 17}'), "--schemes.weight-bits: Input should be less than or equal to 16"),
    ],
    ids=["plain", "nested", "together", "in a list"],
)
def test_run_value_out_of_range_names_option_value_and_bound(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, str], message: str
) -> None:
    assert f"error: {message}" in refused(capsys, "run", "quickstart", *argv)


def test_plan_unknown_step_names_nearest(capsys: pytest.CaptureFixture[str], flow: str) -> None:
    assert "did you mean 'data'?" in refused(capsys, "plan", flow, "--only", "dada")


def test_run_quickstart_without_students_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no students" in refused(capsys, "run", "quickstart", "--empty-students")


def test_run_quickstart_temperature_not_on_offer_names_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected one that the signals were made for: 1, 2, 4" in refused(
        capsys, "run", "quickstart", "--temperature", "3"
    )


def test_run_compress_gpus_on_a_host_without_one_asks_for_the_device(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    request = ("--teacher", str(tmp_path), "--documents", "x.txt", "--students", '{"name": "a", "layers": 1}')
    assert "--hardware.device" in refused(capsys, "run", "compress", *request, "--hardware.gpus-per-worker", "1")


def test_quickstart_on_a_host_with_a_gpu_measures_the_cpu_that_it_asks_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert describe_gpu() == "NVIDIA H200"
    assert run_command(["explain", "quickstart", "speed", "--store", str(tmp_path / "s"), "--json"]) == 0
    assert "NVIDIA" not in capsys.readouterr().out


def test_run_workflow_function_that_raises_is_refused_with_what_it_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "flow.py"
    path.write_text(FLOW.replace("    made = Workflow", "    raise ValueError('no malt')\n    made = Workflow"))
    line = path.read_text().split("\n").index("    raise ValueError('no malt')") + 1
    assert f"ValueError: no malt ({path}, line {line})" in refused(capsys, "plan", str(path))


def test_run_workflow_function_that_returns_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "flow.py"
    path.write_text(FLOW.replace("    return made", "    made.in_order()"))
    assert "'flow' returned None, expected a Workflow" in refused(capsys, "plan", str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("plan", "flow.py", "--store", ""), "'' names no place; expected a path, or a URI such as s3://BUCKET/PREFIX"),
        (("plan", "flow.py", "--store", "s3://"), "'s3://' names no place"),
        (("plan", "flow.py", "--address", "head"), "'head' is no address; expected HOST:PORT"),
        (("artifacts", "list", "--store", "gone"), "there is no store at 'gone'; run a workflow first"),
        (("artifacts", "gc", "--keep-runs", "-1"), 'Invalid value "-1" for --keep-runs. Must be >= 0.'),
        (("compare", "--store", "gone"), "there is no store at 'gone'"),
    ],
    ids=["no-store", "no-bucket", "no-port", "no-artifacts", "negative", "nothing-to-compare"],
)
def test_place_that_is_none_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], flow: str, tmp_path: Path, argv: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *argv)
    assert {path.name for path in tmp_path.iterdir()} <= {"flow.py", "__pycache__"}


def test_ui_port_out_of_range_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["ui", "--port", "99999"]) == 2
    assert "--port. Must be <= 65535" in " ".join(capsys.readouterr().err.split())


def test_plan_in_a_store_that_is_a_file_says_so_in_json_too(capsys: pytest.CaptureFixture[str], flow: str) -> None:
    assert run_command(["plan", flow, "--store", flow, "--json"]) in (1, 2)
    assert json.loads(capsys.readouterr().out)["error"]["message"]


def test_run_compress_student_that_is_nothing_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    request = ("--teacher", str(tmp_path), "--documents", "x.txt", "--students", '{"name": "a"}')
    assert "needs either a checkpoint or at least one of layers" in refused(capsys, "run", "compress", *request)


def compress_request(tmp_path: Path, *more: str) -> tuple[str, ...]:
    """A request whose inputs are there, as far as planning looks at them."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text('{"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 64}')
    (teacher / "tokenizer.json").write_text("{}")
    (teacher / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "x.txt").write_text("text")
    places = ("--documents", str(tmp_path / "x.txt"), "--store", str(tmp_path / "store"))
    return ("compress", "--teacher", str(teacher), *places, *more)


@pytest.mark.parametrize(
    ("students", "message"),
    [
        (('{"name": "teacher", "layers": 1}',), "a student is named 'teacher', which is the name of another candidate"),
        (
            ('{"name": "a", "layers": 1}', '{"name": "a-quantized", "layers": 2}'),
            "a student is named 'a-quantized', which is the name of another candidate",
        ),
        (
            ('{"name": "a", "layers": 1}', '{"name": "b", "layers": 1}'),
            "the students 'a' and 'b' are the same model; leave one out",
        ),
        (('{"name": "Half", "layers": 1}',), "--students.name: String should match pattern"),
        (('{"name": "half", "layers": 9}',), "Smaller.layers is 9, expected at most the origin's 4"),
        (('{"name": "thin", "width": 96}',), "Smaller.width is 96, expected at most the origin's 64"),
    ],
    ids=["teacher", "quantized", "same", "capital", "deeper", "wider"],
)
def test_run_compress_students_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, students: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, "plan", *compress_request(tmp_path, "--students", *students))


def test_compress_without_students_quantizes_the_teacher_and_trains_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(["plan", *compress_request(tmp_path), "--json"]) == 0
    planned = [step["name"] for step in json.loads(capsys.readouterr().out)["steps"]]
    assert planned == ["corpus", "quantize.teacher", "scores", "speed", "verdict"]


def test_compress_with_a_student_keeps_the_quantized_teacher_as_a_candidate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    half = ("--students", '{"name": "half", "layers": 2}')
    assert run_command(["plan", *compress_request(tmp_path, *half), "--json"]) == 0
    planned = {step["name"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert {"signals", "train.half", "quantize.half", "quantize.teacher"} <= planned


def test_compress_at_a_temperature_that_is_not_usual_stores_it_with_the_signals(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--students", '{"name": "half", "layers": 2}', "--training.temperature", "3")
    name, *request = compress_request(tmp_path, *options)
    assert run_command(["explain", name, "signals", *request, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["method"]["temperatures"] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--no-quantize-teacher",), "nothing to do: there are no students and the teacher is not to be quantized"),
        (("--training.w-ce", "0", "--training.w-kd", "0"), "w_ce and w_kd are both 0"),
        (("--preset", "nightly"), "quick"),
        (("--training.optimizer-steps", "0"), "--training.optimizer-steps"),
    ],
    ids=["nothing", "weights", "preset", "steps"],
)
def test_compress_request_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, "plan", *compress_request(tmp_path, *options))


def test_plan_takes_several_values_after_one_option_as_a_shells_glob_gives_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for name in files:
        Path(name).write_text(name)
    students = ('{"name": "a", "layers": 1}', '{"name": "b", "layers": 2}')
    options = ("--documents", *files, "--students", *students, "--store", str(tmp_path / "store"))
    assert run_command(["plan", "compress", "--teacher", str(tmp_path), *options, "--json"]) == 0
    planned = {step["name"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert {"train.a", "train.b"} <= planned


def test_run_compress_pickled_teacher_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 4, "n_head": 4, "n_embd": 64}')
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "x.txt").write_text("text")
    request = ("--teacher", "teacher", "--documents", "x.txt", "--students", '{"name": "a", "layers": 1}')
    assert "safetensors" in refused(capsys, "run", "compress", *request)


def test_run_gpus_that_are_not_there_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.engine.ray_executor.os.listdir", lambda path: [])
    path = tmp_path / "flow.py"
    text = FLOW.replace("data=data)", "data=data, resources=Resources(gpus_per_worker=2))")
    path.write_text(text.replace("from pydantic", "from stages.contract import Resources\nfrom pydantic"))
    message = refused(capsys, "run", str(path), "--store", str(tmp_path / "s"))
    assert "nothing was started: - join.0 is blocked: each of its workers needs 2 GPU" in message


def test_run_store_that_cannot_be_written_is_refused(
    capsys: pytest.CaptureFixture[str], flow: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused(capsys, "run", flow, "--store", str(tmp_path / "file"))


def test_run_dead_address_is_refused_at_once(capsys: pytest.CaptureFixture[str], flow: str, tmp_path: Path) -> None:
    message = refused(capsys, "run", flow, "--address", "127.0.0.1:1", "--store", str(tmp_path / "s"))
    assert "no Ray cluster answers at '127.0.0.1:1'" in message


def test_plan_json_has_every_step(capsys: pytest.CaptureFixture[str], flow: str) -> None:
    assert run_command(["plan", flow, "--count", "2", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [(step["name"], step["stage"], step["status"]) for step in steps] == [
        ("data", "Write", "MISS"),
        ("join.0", "Join", "MISS"),
        ("join.1", "Join", "MISS"),
    ]
    assert all(len(step["fingerprint"]) == 64 and step["reason"] for step in steps)


def test_plan_params_file_sets_parameters_and_options_override_it(
    capsys: pytest.CaptureFixture[str], flow: str, tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text("count: 3\ntext: malt\n")

    def num_steps(*options: str) -> int:
        assert run_command(["plan", flow, "--params", str(tmp_path / "p.yaml"), "--json", *options]) == 0
        return len(json.loads(capsys.readouterr().out)["steps"])

    assert num_steps() == 4
    assert num_steps("--count", "1") == 2
    for text, message in (
        ("cuont: 3", "has 'cuont', which is no parameter; did you mean 'count'?"),
        ("count: [3", "is not YAML: while parsing a flow sequence"),
        ("", "holds None, expected `name: value` for each parameter"),
    ):
        (tmp_path / "p.yaml").write_text(text)
        assert message in refused(capsys, "plan", flow, "--params", "p.yaml")


def test_plan_one_nested_option_keeps_the_other_defaults(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def teacher(*options: str) -> dict[str, object]:
        assert run_command(["explain", "quickstart", "teacher", "--store", str(tmp_path), "--json", *options]) == 0
        config: dict[str, object] = json.loads(capsys.readouterr().out)["config"]["model"]
        return config

    before, after = teacher(), teacher("--teacher.layers", "5")
    assert after == {**before, "layers": 5}


def test_explain_shows_what_a_fingerprint_is_made_of(capsys: pytest.CaptureFixture[str], flow: str) -> None:
    assert run_command(["explain", flow, "data", "--text", "malt", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["config"] == {"text": "malt"}
    assert answer["committed"] == "no"
    assert "no run 'gone'" in refused(capsys, "explain", flow, "data", "--against", "gone")


def test_run_help_lists_parameters_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "quickstart", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--teacher-steps" in text
    assert "optimizer steps of the teacher" in " ".join(text.split())


@pytest.mark.parametrize("option", ["--address=a:1", "--only=data", "--strict-code", "--tracking-uri=x", "--verbose"])
def test_explain_takes_no_option_that_it_would_ignore(
    capsys: pytest.CaptureFixture[str], flow: str, option: str
) -> None:
    assert "Unknown option" in refused(capsys, "explain", flow, "data", option)


@pytest.mark.parametrize("argv", [("run", "quickstart"), ("plan", "quickstart"), ("explain", "quickstart", "teacher")])
def test_help_after_a_workflow_lists_its_parameters(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    assert run_command([*argv, "--help"]) == 0
    after = capsys.readouterr().out
    assert "--teacher-steps" in after
    assert "--store" in after
    assert run_command([argv[0], "--help"]) == 0
    before = capsys.readouterr().out
    assert "WORKFLOW" in before
    assert "--teacher-steps" not in before


def test_plan_interrupted_while_it_verifies_exits_as_interrupted(
    capsys: pytest.CaptureFixture[str], flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise PlanInterrupted("interrupted while text.txt of data was verified; nothing was started")

    monkeypatch.setattr("workflows.commands.plan.plan_only", interrupted)
    assert run_command(["plan", flow, "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "Interrupted"


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["plan"], ["workflows"], ["--version"]])
def test_command_that_only_prints_succeeds(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert run_command(argv) == 0
    assert capsys.readouterr().out.strip()


def test_artifacts_of_an_empty_store_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(["artifacts", "list", "--store", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"artifacts": []}


def test_gc_without_a_registry_to_ask_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(["artifacts", "gc", "--store", str(tmp_path), "--json"]) != 0
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "TrackingUnavailable"


def test_init_writes_a_workflow_that_plans_and_overwrites_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["init", "mine"]) == 0
    assert run_command(["plan", "mine/my_workflow.py", "--layers", "1", "--layers", "3"]) == 0
    assert "train.layers3" in capsys.readouterr().out
    assert run_command(["init", "mine"]) == 2


def test_doctor_finds_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run_command(["doctor", "--store", str(tmp_path / "file"), "--address", "127.0.0.1:1", "--json"]) == 1
    found = {finding["subject"]: finding["state"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["Ray"] == "wrong"
    assert found["store"] == "wrong"
    assert found["torch"] == "fine"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("postgresql+nodriver://reader:hunter2hunter2@127.0.0.1:1/db", "is no database's"),
        ("http://reader:hunter2hunter2@127.0.0.1:1", "no MLflow server answers at 127.0.0.1:1"),
        ("foo://reader:hunter2hunter2@127.0.0.1:1", "expected http(s)://host:port or sqlite"),
        ("sqlite:///mlflow.db", "is relative to the current folder"),
    ],
    ids=["database", "server", "unknown", "relative"],
)
def test_doctor_finds_what_is_wrong_with_a_tracking_uri_and_never_prints_its_password(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, uri: str, message: str
) -> None:
    options = ("--store", str(tmp_path), "--tracking-uri", uri)
    assert run_command(["doctor", *options, "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = [finding for finding in findings if finding["subject"] == "MLflow"]
    assert found["state"] == "wrong"
    assert message in found["text"]
    assert run_command(["doctor", *options]) == 1
    assert "hunter2" not in json.dumps(findings) + capsys.readouterr().out


@pytest.mark.parametrize(
    ("login", "state", "message"),
    [(USER_LOGIN, "wrong", "MLFLOW_TRACKING_USERNAME"), (None, "note", "--serve-artifacts")],
    ids=["no credentials", "no proxy"],
)
def test_doctor_finds_what_a_tracking_server_does_not_take(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, login: str | None, state: str, message: str
) -> None:
    with mlflow_stub(login=login, locations={"other": "/srv/mlruns/0"}) as uri:
        run_command(["doctor", "--store", str(tmp_path), "--tracking-uri", uri, "--json"])
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["MLflow"]["state"] == state
    assert message in findings["MLflow"]["text"]


@pytest.mark.parametrize("command", [["compare"], ["runs", "publish"]], ids=" ".join)
def test_command_that_needs_mlflow_says_which_credentials_to_set(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    root = ArtifactStore(str(tmp_path)).root
    EventLog(root / "runs" / "r" / "events").append([started("r")])
    with mlflow_stub(login=USER_LOGIN) as uri:
        assert run_command([*command, "--store", str(tmp_path), "--tracking-uri", uri, "--json"]) != 0
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], "MLFLOW_TRACKING_USERNAME" in error["message"]) == ("TrackingUnavailable", True)


def test_doctor_of_a_store_in_s3_without_a_tracking_uri_says_to_pass_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(ArtifactStore, "check_writable", lambda store: None)
    monkeypatch.setattr(ArtifactStore, "fingerprints", lambda store: [])
    assert run_command(["doctor", "--store", "s3://bucket/store", "--json"]) == 1
    findings = {f["subject"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert "pass a tracking URI" in findings["MLflow"]["text"]


@pytest.fixture
def store_with_garbage(tmp_path: Path) -> ArtifactStore:
    made = ArtifactStore(str(tmp_path / "store"))
    made.folder("ab" * 32).put("out/000001/text.txt", b"malt")
    connect(default_tracking_uri(made.uri))
    return made


def test_gc_lists_what_it_would_delete_with_bytes_of_each_kind_and_deletes_with_yes(
    capsys: pytest.CaptureFixture[str], store_with_garbage: ArtifactStore
) -> None:
    gc = ("artifacts", "gc", "--store", store_with_garbage.uri, "--min-age-hours", "0")
    assert run_command([*gc, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["size_bytes"], answer["size_bytes_by_kind"], answer["deleted"]) == (4, {"artifact": 4}, False)
    assert [(row["kind"], row["fingerprint"]) for row in answer["collected"]] == [("artifact", "ab" * 32)]
    assert run_command(gc[:-2]) == 0, "it is younger than a day"
    assert "0 bytes would be deleted" in capsys.readouterr().out.lower()
    assert run_command([*gc, "--yes"]) == 0
    assert "1 artifacts, 4 bytes\n4 bytes deleted; 0 artifacts kept" in capsys.readouterr().out
    assert store_with_garbage.fingerprints() == []


def test_gc_while_a_run_is_starting_fails_with_its_name(
    capsys: pytest.CaptureFixture[str], store_with_garbage: ArtifactStore
) -> None:
    run = "20260101-000000-aaaaaa"
    holder = Holder.of_this_process(run)
    (store_with_garbage.root / "runs" / run).put_json("heartbeat.json", holder.to_json())
    assert run_command(["artifacts", "gc", "--store", store_with_garbage.uri, "--yes", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "StoreBusy"
    assert run in error["message"]


def test_find_workflow_file_that_does_not_import_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_package")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        find_workflow(str(path))
    path.write_text("x = 1")
    with pytest.raises(ConfigError, match="no function that returns a Workflow"):
        find_workflow(str(path))
