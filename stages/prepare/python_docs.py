"""English text out of Python's own documentation: `pydoc`'s topics and the docstrings of the standard library.

Promise: the same Python version gives the same documents, in a few seconds, without importing what is described.
One document a topic, one a module (its docstrings, in the order of the source). About 2 MB in all.
Does not: read tests, generated tables or third-party packages.

A result-changing edit here needs a new `PYTHON_DOCS_REVISION` in `stages/sources.py`.
"""

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"}
) | {
    "site-packages",
    "dist-packages",
    "lib-dynload",
    "__pycache__",
    "__phello__",
}
"""Folders of the standard library without prose of their own."""
MIN_DOCSTRING_CHARACTERS = 30
"""Shorter ones are labels ("See PEP 302.", "Internal."), not sentences."""


def stdlib_folder() -> Path:
    """Return the folder of the standard library's sources."""
    return Path(sysconfig.get_path("stdlib"))


def list_modules() -> list[tuple[str, int]]:
    """Return (relative path, bytes) of every module that is read, sorted by path."""
    root = stdlib_folder()
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if SKIPPED_FOLDERS.isdisjoint(folders) and not any(folder.startswith("config-") for folder in folders):
            found.append((relative.as_posix(), path.stat().st_size))
    return sorted(found)


def read_topics() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each of `pydoc`'s topics, sorted by name."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield name, text.strip()


@lru_cache(maxsize=1024)
def read_module(relative: str) -> str:
    """Return one module's docstrings, joined by blank lines; empty where there are none.

    Cached, since a tokenizer's training and the dataset both read it, and parsing is most of the work.
    """
    source = (stdlib_folder() / relative).read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return ""
    return "\n\n".join(extract_docstrings(ast.parse(source)))


def extract_docstrings(tree: ast.Module) -> list[str]:
    """Return the docstrings of a module, its classes and functions that hold prose, in the order of the source."""
    found: list[str] = []
    seen: set[str] = set()
    for node in _definitions(tree):
        text = ast.get_docstring(node)
        if text and text not in seen and _is_prose(text):
            seen.add(text)
            found.append(inspect.cleandoc(text).strip())
    return found


def _definitions(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Walk statements only: expressions hold no docstrings, and are most of a tree."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for field in ("finalbody", "orelse", "handlers", "body"):
            children = getattr(node, field, None)
            if isinstance(children, list):
                stack.extend(child for child in reversed(children) if isinstance(child, ast.stmt | ast.ExceptHandler))


def _is_prose(text: str) -> bool:
    """Return whether a docstring is mostly text rather than an interactive session."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    session = sum(line.startswith((">>>", "...")) for line in lines)
    return len(text) >= MIN_DOCSTRING_CHARACTERS and session * 3 < len(lines)
