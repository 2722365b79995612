"""Documents from outside: which files or datasets they are, and their identity before any of them is read.

Promises: as in `stages.external.checkpoints`, equal data has an equal identity wherever it lies, and a hub id
is pinned to its commit.
Does not: read documents (that is `stages.prepare`).
"""

import json
import os
import platform
import re
from collections.abc import Callable
from difflib import get_close_matches
from glob import glob, has_magic
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from stages.contract import ExternalData
from stages.errors import ExternalDataError
from stages.external.checkpoints import COMMIT, hub_info
from stages.external.digests import digest_files, digest_objects, list_objects, nearest_path
from stages.storage import File, Folder, is_remote

PYTHON_DOCS_REVISION = "2026-11-21 topics and docstrings by ast"
"""Changed with each edit of `stages/prepare/python_docs.py` that changes what it extracts."""
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
DOCUMENT_SUFFIXES = TEXT_SUFFIXES + LINE_SUFFIXES + PARQUET_SUFFIXES
COMPRESSED = ("gz", "bz2", "xz", "zst", "zip")
"""Suffixes of documents that would be left out without a word, and are meant to be read."""


class PythonDocs(ExternalData):
    """The documentation that Python brings along: about 2 MB of English in which nothing need be downloaded."""

    kind: Literal["python-docs"] = "python-docs"

    def identity(self) -> dict[str, Any]:
        """Return Python's version and the extractor's revision: what the text follows from, without reading it."""
        return {"kind": self.kind, "python": platform.python_version(), "revision": PYTHON_DOCS_REVISION}


class Files(ExternalData):
    """Files of text (.txt, .md, .rst), of JSON lines (.jsonl, .ndjson, .json) or Parquet."""

    kind: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    """Paths, folders (taken with all below), globs (`**` too), on local disk or `s3://`, `gs://`, `az://`."""

    def files(self) -> tuple[File, ...]:
        """Return the files under names relative to the folder or the glob's fixed part, sorted by name and digest.

        Raises:
            ExternalDataError: a path is missing, a glob matches nothing, or a file's format is not known.
        """
        found: dict[str, File] = {}
        for path in self.paths:
            for file in _remote_files(path) if is_remote(path) else _local_files(path):
                found.setdefault(file.uri, file)
        return tuple(sorted(found.values(), key=lambda file: (file.name, file.sha256)))

    def identity(self) -> dict[str, Any]:
        """Return names and digests."""
        return {"kind": self.kind, "files": [[file.name, file.sha256] for file in self.files()]}

    def resolved(self) -> Self:
        """Return it with absolute paths."""
        return self.model_copy(update={"paths": tuple(map(_absolute, self.paths))})


def _absolute(path: str) -> str:
    return path if is_remote(path) else str(Path(path.removeprefix("file://")).expanduser().absolute())


def _fixed_part(pattern: str) -> tuple[str, str]:
    """Divide a glob into the folder before its first wildcard and the rest; what is there as it is written is none."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if has_magic(part) and not os.path.lexists("/".join(parts[: i + 1])))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _local_files(text: str) -> tuple[File, ...]:
    path = Path(text.removeprefix("file://")).expanduser()
    if has_magic(str(path)) and not path.exists():
        base, pattern = _fixed_part(str(path.absolute()))
        root = Path(base or "/")
        names = [name for name in glob(pattern, root_dir=root, recursive=True) if (root / name).is_file()]
    elif path.is_dir():
        below = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        root, names = path, [name for name in below if not _is_hidden(name)]
    elif path.exists():
        _check_suffix(text)
        root, names = path.parent, [path.name]
    else:
        raise ExternalDataError(f"the source {text!r} does not exist; {nearest_path(path.absolute())}")
    chosen = _readable(names, text, lambda: nearest_path(root / "*") if not root.exists() else "")
    return digest_files({name: root / name for name in chosen})


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _remote_files(uri: str) -> tuple[File, ...]:
    if has_magic(uri):
        base, pattern = _fixed_part(uri)
        folder, matches = Folder.at(base), _glob_regex(pattern)
        found = [entry.name for entry in list_objects(folder) if matches.fullmatch(entry.name)]
        names = [name for name in found if not _is_hidden(name)]
    elif uri.lower().endswith(DOCUMENT_SUFFIXES):
        parent, _, name = uri.rpartition("/")
        folder = Folder.at(parent)
        siblings = [entry.name for entry in list_objects(folder)]
        names = [n for n in siblings if n == name]
        if not names:
            close = get_close_matches(name, siblings, n=1, cutoff=0.5)
            hint = f"; did you mean {folder.uri_of(close[0])!r}?" if close else ""
            raise ExternalDataError(f"the source {uri!r} does not exist{hint}")
    else:
        folder = Folder.at(uri)
        names = [entry.name for entry in list_objects(folder) if not _is_hidden(entry.name)]
    return digest_objects(folder, _readable(names, uri, lambda: ""))


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """Translate a glob as `glob.glob(recursive=True)` reads it: `*` stays within a folder, `**/` spans folders."""
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]*\]|[^*?\[]+|\[", pattern):
        known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        is_class = len(token) > 1 and token.startswith("[")
        out += known.get(token) or (token.replace("[!", "[^") if is_class else re.escape(token))
    return re.compile(out)


def _check_suffix(text: str) -> None:
    if not text.lower().endswith(DOCUMENT_SUFFIXES):
        raise ExternalDataError(f"cannot read documents from {text!r}; expected one of {', '.join(DOCUMENT_SUFFIXES)}")


def _readable(names: list[str], text: str, hint: Callable[[], str]) -> list[str]:
    """Keep the names whose format is known; refuse a source that has none, or that has compressed documents too."""
    chosen = sorted(name for name in names if name.lower().endswith(DOCUMENT_SUFFIXES))
    packed = sorted(name for name in names if _is_compressed(name))
    if packed:
        raise ExternalDataError(
            f"the source {text!r} holds {len(packed)} compressed files, such as {packed[0]!r}, which cannot be read; "
            "unpack them (or leave them out by a glob such as '*.jsonl')"
        )
    if not chosen:
        others = f" ({len(names)} other files, such as {sorted(names)[0]!r})" if names else ""
        more = f"; {hint()}" if hint() else ""
        raise ExternalDataError(
            f"the source {text!r} matches no file to read{others}; expected {', '.join(DOCUMENT_SUFFIXES)}{more}"
        )
    return chosen


def _is_compressed(name: str) -> bool:
    stem, _, suffix = name.lower().rpartition(".")
    return suffix in COMPRESSED and stem.endswith(DOCUMENT_SUFFIXES)


class HubDataset(ExternalData):
    """A dataset of the Hugging Face hub, one split of one configuration."""

    kind: Literal["hub-dataset"] = "hub-dataset"
    id: str
    """The hub's id, e.g. `Salesforce/wikitext`."""
    config: str | None = None
    """The dataset's configuration, e.g. `wikitext-2-raw-v1`; None is its default."""
    split: str = "train"
    """The hub's split to read; stillhouse makes its own three splits of it."""
    revision: str | None = None
    """Branch, tag or commit; None is the default branch. Resolved to its commit in the identity."""

    def resolved(self) -> Self:
        """Return it pinned to the commit; a revision that is a commit already needs no network."""
        if self.revision is not None and COMMIT.fullmatch(self.revision):
            return self
        return self.model_copy(update={"revision": hub_info("dataset", self.id, self.revision).sha})

    def identity(self) -> dict[str, Any]:
        """Return the id, configuration, split and commit."""
        return self.resolved().model_dump()


class LocalDataset(ExternalData):
    """A folder that `datasets.Dataset.save_to_disk` wrote."""

    kind: Literal["local-dataset"] = "local-dataset"
    path: str
    """The folder; of a `DatasetDict` with `split`."""
    split: str | None = None
    """The split to read of a `DatasetDict`; None for a plain `Dataset`."""

    def resolved(self) -> Self:
        """Return it with an absolute path."""
        return self.model_copy(update={"path": _absolute(self.path)})

    def folder(self) -> Path:
        """Return the folder of the Arrow files.

        Raises:
            ExternalDataError: no such folder, no dataset in it, or a `DatasetDict` without a known split.
        """
        root = Path(self.path).expanduser().absolute()
        if not root.is_dir():
            raise ExternalDataError(f"the dataset folder {self.path!r} does not exist; {nearest_path(root)}")
        if (root / "dataset_dict.json").exists():
            splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
            if self.split not in splits:
                raise ExternalDataError(
                    f"{self.path!r} is a DatasetDict, but split={self.split!r} is none of {splits}; set split"
                )
            return root / str(self.split)
        if self.split is not None:
            raise ExternalDataError(
                f"{self.path!r} is a plain Dataset, but split={self.split!r} is set; leave split out"
            )
        if not (root / "state.json").exists():
            raise ExternalDataError(
                f"{self.path!r} is no dataset: expected what `Dataset.save_to_disk` wrote; for other files use `files`"
            )
        return root

    def identity(self) -> dict[str, Any]:
        """Return names and digests of the Arrow files: `state.json` holds a random fingerprint besides."""
        folder = self.folder()
        names = sorted(entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"])
        return {"kind": self.kind, "files": [[f.name, f.sha256] for f in digest_files({n: folder / n for n in names})]}


DocumentSource = Annotated[PythonDocs | Files | HubDataset | LocalDataset, Field(discriminator="kind")]
"""Where documents come from."""
