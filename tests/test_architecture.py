"""ARCHITECTURE.md and the code say the same: the tree, and the limits on their size."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREE = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
LISTED_WHOLE = ("workflows", "workflows/engine", "stages")
"""Folders each of whose files and folders the tree must name."""
MAX_ENGINE_LINES = 6_480
"""The engine and the commands together; may only be lowered (5,200 is the aim)."""


def named_paths(tree: str) -> Iterator[str]:
    """Yield the paths that a tree names: names stand before two spaces or more, folders end with a slash."""
    above: list[tuple[int, str]] = []
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not names:
            continue
        indent = len(line) - len(line.lstrip())
        above = [(depth, name) for depth, name in above if depth < indent]
        parent = above[-1][1] if above else ""
        yield from (f"{parent}{name}" for name in names)
        if names[0].endswith("/"):
            above.append((indent, f"{parent}{names[0]}"))


def test_named_paths_of_a_small_tree_are_joined_to_their_folders() -> None:
    tree = "a/    things\n  one two    files\n  b/    inside\n    three\nc/"
    assert list(named_paths(tree)) == ["a/", "a/one", "a/two", "a/b/", "a/b/three", "c/"]


def test_tree_names_only_what_is_there() -> None:
    for path in named_paths(TREE):
        real = ROOT / path
        assert real.is_dir() if path.endswith("/") else real.with_suffix(".py").is_file(), path


@pytest.mark.parametrize("folder", LISTED_WHOLE)
def test_tree_names_all_of_a_folder(folder: str) -> None:
    there = {
        f"{path.relative_to(ROOT)}/" if path.is_dir() else str(path.relative_to(ROOT).with_suffix(""))
        for path in (ROOT / folder).iterdir()
        if path.name not in ("__init__.py", "__pycache__") and (path.is_dir() or path.suffix == ".py")
    }
    assert there - set(named_paths(TREE)) == set()


def test_architecture_is_short() -> None:
    assert (ROOT / "ARCHITECTURE.md").read_text().count("\n") <= 200


def test_engine_and_commands_stay_small() -> None:
    files = [
        ROOT / "workflows/cli.py",
        *ROOT.glob("workflows/engine/**/*.py"),
        *ROOT.glob("workflows/commands/**/*.py"),
    ]
    assert sum(path.read_text().count("\n") for path in files) <= MAX_ENGINE_LINES
