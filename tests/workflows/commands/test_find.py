"""A user's own workflow file: what of where it lies enters the identity of the stages in it."""

import pickle
from pathlib import Path

import pytest

from workflows.commands.find import find_workflow
from workflows.engine.identity import Identity, identities

MINE = """
from stages.contract import Context, Outcome, Stage
from workflows.engine.graph import Workflow

class Mine(Stage):
    KIND = "scores"
    REVISION = "2026-01-01 first"

    def run(self, context: Context) -> Outcome:
        return Outcome({"x": 1})

def mine() -> Workflow:
    flow = Workflow("mine")
    flow.step("a", Mine())
    return flow
"""


def fingerprint(file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(MINE)
    graph = find_workflow(str(file)).graph({})
    identity = identities(graph)["a"]
    assert isinstance(identity, Identity)
    assert pickle.loads(pickle.dumps(graph.steps["a"].stage)) == graph.steps["a"].stage
    return identity.fingerprint


@pytest.mark.parametrize("mark", [".git/HEAD", "pyproject.toml"])
def test_stage_of_a_file_in_a_project_is_known_by_its_path_in_it(tmp_path: Path, mark: str) -> None:
    for clone in ("here", "there"):
        (tmp_path / clone / mark).parent.mkdir(parents=True)
        (tmp_path / clone / mark).touch()
    first = fingerprint(tmp_path / "here/flows/a/mine.py")
    assert fingerprint(tmp_path / "there/flows/a/mine.py") == first
    assert fingerprint(tmp_path / "here/flows/b/mine.py") != first
    assert fingerprint(tmp_path / "here/flows/a.mine.py") != first


def test_stage_of_a_file_outside_of_a_project_is_known_by_its_folders_name(tmp_path: Path) -> None:
    first = fingerprint(tmp_path / "here/a/mine.py")
    assert fingerprint(tmp_path / "there/a/mine.py") == first
    assert fingerprint(tmp_path / "here/b/mine.py") != first
