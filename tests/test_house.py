"""The house rules, as tests: who imports whom, what a file may be called and how long it may be, what resolves where."""

import ast
import importlib
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from stages import errors
from stages.formats.dataset import DatasetInfo
from stages.formats.derivation import Derivation
from stages.formats.report import Report
from stages.formats.scores import Scores
from stages.formats.search import Search
from stages.formats.signals import SignalsInfo
from stages.formats.speed import Speed
from stages.formats.training import TrainingInfo
from workflows.cli import app
from workflows.commands.find import workflow_names
from workflows.engine import store

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("stages/**/*.py"), *ROOT.glob("workflows/**/*.py")])
STAGES = sorted(path.parent.name for path in ROOT.glob("stages/*/stage.py"))
SHARED = {
    "stages.contract",
    "stages.storage",
    "stages.errors",
    "stages.candidates",
    "stages.formats",
    "stages.external",
    "stages.models",
    "stages.runtime",
}
HEAVY = {
    "ray",
    "torch",
    "transformers",
    "mlflow",
    "datasets",
    "llmcompressor",
    "compressed_tensors",
    "scipy",
    "matplotlib",
}
BANNED = {"utils", "helpers", "misc", "common", "base", "manager", "handler", "types"}
PURE = ("graph", "check", "identity", "plan", "schedule", "failures")
RAY_IMPORTERS = {
    "workflows/engine/ray_executor.py",
    "stages/runtime/workarounds.py",
    "stages/runtime/workers.py",
}
MAX_LINES = 330
MAX_FUNCTION_LINES = 60


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        node
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test)
        for node in ast.walk(guard)
    }
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("verb", STAGES)
def test_stage_imports_no_other_stage_and_nothing_above(verb: str) -> None:
    for path in (ROOT / "stages" / verb).rglob("*.py"):
        for module in imports(path):
            if module.split(".")[0] == "workflows":
                pytest.fail(f"{name_of(path)} imports {module}")
            if module.startswith("stages.") and not module.startswith(("stages.ops", f"stages.{verb}")):
                assert ".".join(module.split(".")[:2]) in SHARED, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "stage.py"], ids=name_of)
def test_stage_adapter_imports_nothing_heavy_at_the_top(path: Path) -> None:
    heavy = {module for module in imports(path, top_level_only=True) if module.split(".")[0] in HEAVY}
    assert not heavy


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_ray_is_imported_by_adapters_and_the_engines_tasks_only(path: Path) -> None:
    if path.name == "stage.py" or name_of(path) in RAY_IMPORTERS:
        return
    assert not [module for module in imports(path) if module.split(".")[0] == "ray"]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_mlflow_is_imported_by_trackings_connection_only(path: Path) -> None:
    if name_of(path) != "workflows/engine/tracking/connection.py":
        assert not [module for module in imports(path) if module.split(".")[0] == "mlflow"]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_private_names_of_libraries_are_used_by_workarounds_only(path: Path) -> None:
    if name_of(path) == "stages/runtime/workarounds.py":
        return
    private = re.compile(r"(^|\.)_(?!_)")
    used = {module for module in imports(path) if private.search(module)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and private.match(node.attr) and node.attr not in DOCUMENTED:
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls") and not own_private(path, node.attr):
                used.add(f"{owner}.{node.attr}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "._internal" in node.value:
            used.add(node.value)
    assert used == set()


DOCUMENTED = {"_exit", "_replace"}
"""Public names of the standard library (`os`, named tuples) that look private."""


def own_private(path: Path, name: str) -> bool:
    """Return whether a file itself defines a private name: a class may use its other instances' and its classes'."""
    return re.search(rf"(def {name}\b|self\.{name}\b|^    {name}\b)", path.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_threads_of_torch_are_set_in_one_place(path: Path) -> None:
    if name_of(path) != "stages/runtime/workers.py":
        assert "torch.set_num_threads" not in path.read_text()


@pytest.mark.parametrize("name", PURE)
def test_pure_engine_file_imports_nothing_heavy(name: str) -> None:
    assert not {module for module in imports(ROOT / f"workflows/engine/{name}.py") if module.split(".")[0] in HEAVY}


def keyed_reads(source: str) -> list[str]:
    """Return the places in a program's text where an artifact's or a manifest's JSON is read by string key.

    Three signs: the name of an artifact's JSON file as a string, which only its model needs; a call of `json.loads` or
    `json.load`; and a string key of JSON, which is what a name in JSON_NAMES holds, what a call in JSON_CALLS returns,
    and what is taken out of either, also by way of a variable.
    """
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    scopes = [list(ast.walk(function)) for function in functions]
    scopes.append([node for node in ast.walk(tree) if node not in inside])
    found = {place: None for scope in scopes for place in _keyed_reads_of_scope(scope)}
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in ARTIFACT_FILES and id(node) not in prose:
            found[f"line {node.lineno}: {node.value!r}"] = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in JSON_PARSERS:
            found[f"line {node.lineno}: {ast.unparse(node)}"] = None
    return list(found)


def _keyed_reads_of_scope(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the string keys of JSON in one function, or in a module outside of its functions."""
    holders = set(JSON_NAMES)
    bound = [pair for node in nodes for pair in _bindings(node)]
    while grown := {
        name.id
        for target, value in bound
        if _is_json(value, holders)
        for name in ast.walk(target)
        if isinstance(name, ast.Name) and name.id not in holders
    }:
        holders |= grown
    for node in nodes:
        holder, key = _lookup(node)
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and _is_json(holder, holders):
            yield f"line {node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]


def _bindings(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """Yield (target, value) where a node gives names to values: assignments, `:=`, loops and comprehensions."""
    if isinstance(node, ast.Assign):
        yield from ((target, node.value) for target in node.targets)
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
        yield node.target, node.value
    elif isinstance(node, ast.For | ast.comprehension):
        yield node.target, node.iter


def _lookup(node: ast.AST) -> tuple[ast.AST | None, ast.AST | None]:
    """Return (holder, key) of `holder[key]`, `holder.get(key, …)` or `holder.pop(key, …)`."""
    if isinstance(node, ast.Subscript):
        return node.value, node.slice
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
        return node.func.value, node.args[0] if node.args else None
    return None, None


def _is_json(node: ast.AST | None, holders: set[str]) -> bool:
    """Return whether an expression is JSON as it was parsed or dumped, or a part of it."""
    if isinstance(node, ast.Name):
        return node.id in holders
    if isinstance(node, ast.Attribute):
        return node.attr in JSON_NAMES
    if isinstance(node, ast.BoolOp):
        return any(_is_json(value, holders) for value in node.values)
    if isinstance(node, ast.IfExp):
        return _is_json(node.body, holders) or _is_json(node.orelse, holders)
    if isinstance(node, ast.NamedExpr):
        return _is_json(node.value, holders)
    if isinstance(node, ast.Call):
        if ast.unparse(node.func) in JSON_PARSERS or ast.unparse(node.func).rpartition(".")[2] in JSON_CALLS:
            return True
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("items", "values"):
            return _is_json(node.func.value, holders)
    holder, _ = _lookup(node) if node is not None else (None, None)
    return holder is not None and _is_json(holder, holders)


ARTIFACT_FILES = {
    format_.FILE for format_ in (DatasetInfo, Derivation, Report, Scores, Search, SignalsInfo, Speed, TrainingInfo)
}
JSON_NAMES = {"manifest", "report", "verdict"}
JSON_PARSERS = {"json.loads", "json.load"}
JSON_CALLS = {"read_json", "find_json", "get_json", "to_json", "model_dump"}
JSON_READERS = {
    "stages/formats/": "the artifacts' models",
    "workflows/engine/manifest.py": "the manifest's model",
    "stages/external/": "checkpoints and data sets that others wrote, and the cache of digests",
    "stages/candidates.py": "a checkpoint's config.json",
    "stages/models/checkpoints.py": "a checkpoint's config.json",
    "stages/models/tokenization.py": "a tokenizer's files",
    "stages/prepare/chats.py": "JSON text inside a user's rows",
    "stages/runtime/serving_process.py": "what a runtime's process answers",
    "stages/runtime/vllm_environment.py": "what was installed",
    "stages/runtime/vllm_worker.py": "what it is asked, and a checkpoint's config.json",
    "stages/prepare/reading.py": "a user's rows",
    "stages/storage.py": "JSON of any kind, handed on whole",
    "workflows/engine/tracking/tracker.py": "what the publisher's process says",
    "workflows/engine/tracking/tracking_uri.py": "the URIs that a store was used with",
}
"""Who parses JSON and reads it by key, by the start of the file's name, and which."""
OTHER_KEYS = {
    ("stages/contract.py", "found['path']"): "an attempt's receipt of a shard",
    ("workflows/engine/store.py", "found.get('reason')"): "why a commit was withdrawn",
}
"""Single keys of JSON that is neither an artifact's nor a manifest's."""


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_artifacts_json_is_read_through_its_format_only(path: Path) -> None:
    if not name_of(path).startswith(tuple(JSON_READERS)):
        found = [place.partition(": ")[2] for place in keyed_reads(path.read_text())]
        assert [key for key in found if (name_of(path), key) not in OTHER_KEYS] == []


@pytest.mark.parametrize(
    "source",
    [
        "artifact.read_bytes('scores.json')",
        "commit.manifest['files']",
        "outcome = execution.report.get('verdict')",
        "artifact.read_json(name)['champion']",
        "Report.read(artifact).to_json()['verdict']",
        "x = json.loads(artifact.read_bytes(name))",
        "scores = Scores.read(artifact).model_dump()\nscores['models']",
        "def read(folder):\n    value: dict = folder.find_json(name)\n    return value['champion']",
        "if (value := folder.find_json(name)) is not None:\n    value.pop('schema')",
        "whole = report.model_dump()\nfor one in whole.values():\n    one['kl']",
        "[one['kl'] for one in folder.get_json(name)]",
        "def read(a):\n    found = a.to_json() or {}\n    def inner():\n        return found.get('kl')",
    ],
)
def test_keyed_reads_finds_each_way_to_read_by_key(source: str) -> None:
    assert len(keyed_reads(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "'scores.json'",
        "manifest.files",
        "inputs['report']",
        "reports[name]",
        "manifest[index]",
        "value = Scores.read(artifact)\nvalue.models['a']",
        "def write(a):\n    value = a.to_json()\ndef other(value):\n    return value['a']",
        "value = pickle.loads(row['result'])\nvalue['a']",
    ],
)
def test_keyed_reads_leaves_prose_attributes_and_other_keys_alone(source: str) -> None:
    assert keyed_reads(source) == []


def test_readers_of_json_are_there() -> None:
    for name in JSON_READERS:
        assert (ROOT / name).exists(), name


def test_importing_the_command_loads_nothing_heavy() -> None:
    code = f"import sys, workflows.cli; print([m for m in {sorted(HEAVY)!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


def test_engine_imports_no_workflow() -> None:
    for path in ROOT.glob("workflows/engine/**/*.py"):
        above = tuple(f"workflows.{name}" for name in [*workflow_names(), "cli", "commands"])
        assert not [module for module in imports(path) if module.startswith(above)], name_of(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_has_a_docstring_a_good_name_and_a_readable_length(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert ast.get_docstring(ast.parse(path.read_text())), "every module says what it is for"
    assert path.stem not in BANNED
    assert lines <= MAX_LINES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_short_but_for_those_that_are_workflows(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.returns or ast.Constant(None)) != "Workflow":
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_class_names_are_defined_once() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name_of(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_errors_survive_pickling() -> None:
    for kind in [*vars(errors).values(), store.Fenced]:
        if inspect.isclass(kind) and issubclass(kind, Exception):
            copy = pickle.loads(pickle.dumps(kind("what failed")))
            assert type(copy) is kind
            assert str(copy) == "what failed"


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in app:
        if not name.startswith("-"):
            assert f"stillhouse {name}" in readme, name


def test_readme_names_only_files_that_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:workflows|stages|tests|benchmarks)/[\w/.]+\.(?:py|md))`", readme):
        assert (ROOT / path).is_file(), path


def test_no_tracked_file_names_a_path_of_a_machine() -> None:
    found = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^a-zA-Z0-9_.~])/(work|root|farm)/", "--", ".", ":!tests/test_house.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout == ""


def test_packages_resolve_to_this_repository() -> None:
    """Another package of the index also imports as `workflows`."""
    for name in ("workflows", "stages"):
        file = importlib.import_module(name).__file__
        assert file is not None
        assert Path(file).parent.parent == ROOT


@pytest.mark.ray
def test_packages_resolve_to_this_repository_in_a_ray_worker(local_ray: None) -> None:
    import ray

    def where() -> list[str]:
        import stages
        import workflows

        return [str(stages.__file__), str(workflows.__file__)]

    found = ray.get(ray.remote(num_cpus=0)(where).remote())
    assert {Path(file).parent.parent for file in found} == {ROOT}
