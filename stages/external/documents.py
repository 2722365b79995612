"""Documents from outside: which files or datasets they are, and their identity before any of them is read.

Promises: as in `stages.external.checkpoints`, equal data has an equal identity wherever it lies, and a hub id
is pinned to its commit.
Does not: read documents (that is `stages.prepare`).
"""

import json
import platform
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob, has_magic
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from stages.contract import ExternalData
from stages.errors import ConfigError, ExternalDataError
from stages.external.checkpoints import COMMIT, hub_info
from stages.external.digests import digest_files, digest_objects, list_objects, nearest_path
from stages.external.layout import CARD, Selection, glob_regex, is_no_data, select
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
    """Paths, folders (taken with all below), globs (`**` too), on local disk or `s3://`, `gs://`, `az://`. Of a folder
    the data files are taken, as the hub tells them (`stages/external/layout.py`)."""
    split: str = "train"
    """The split to read of a folder that has splits by its card or by its names, as a clone of a dataset has."""

    def files(self) -> tuple[File, ...]:
        """Return the files under names relative to the folder or the glob's fixed part, sorted by name and digest.

        Raises:
            ExternalDataError: a path is missing, a glob matches nothing, or a file's format is not known.
        """
        found: dict[str, File] = {}
        for path in self.paths:
            for file in self._found(path).digested():
                found.setdefault(file.uri, file)
        return tuple(sorted(found.values(), key=lambda file: (file.name, file.sha256)))

    def check_apart(self, held_out: "Files") -> None:
        """Refuse texts to compare models on that are among those to train on.

        Raises:
            ConfigError: a file is among both, by what it holds.
        """
        with suppress(ExternalDataError):  # raised where their identity is asked for
            ours = {file.sha256: file for file in self.files()}
            for file in held_out.files():
                if file.sha256 in ours:
                    raise ConfigError(
                        f"{file.uri!r} is among the texts to compare models on, and {ours[file.sha256].uri!r}, which "
                        "holds the same, among those to train on: take it out of one of them"
                    )

    def notes(self) -> list[str]:
        """Say of each folder and glob which files are left out, and why.

        Raises:
            ExternalDataError: as `files`.
        """
        return [note for path in self.paths for note in self._found(path).selection.notes(path)]

    def _found(self, path: str) -> "_FoundFiles":
        return _remote_files(path, self.split) if is_remote(path) else _local_files(path, self.split)

    def identity(self) -> dict[str, Any]:
        """Return names and digests."""
        return {"kind": self.kind, "files": [[file.name, file.sha256] for file in self.files()]}

    def resolved(self) -> Self:
        """Return it with absolute paths."""
        return self.model_copy(update={"paths": tuple(map(_absolute, self.paths))})


@dataclass(frozen=True, slots=True)
class _FoundFiles:
    """Files below a local or remote folder."""

    root: Path | Folder
    selection: Selection

    def digested(self) -> tuple[File, ...]:
        names = self.selection.names
        if isinstance(self.root, Folder):
            return digest_objects(self.root, names)
        return digest_files({name: self.root / name for name in names})


def _absolute(path: str) -> str:
    return path if is_remote(path) else str(Path(path.removeprefix("file://")).expanduser().absolute())


def _fixed_part(pattern: str) -> tuple[str, str]:
    """Divide a glob into the folder before its first wildcard and the rest; a folder may have brackets in its name."""
    parts = pattern.split("/")
    magic = [i for i, part in enumerate(parts) if has_magic(part)]
    first = next((i for i in magic[:-1] if not Path("/".join(parts[: i + 1])).is_dir()), magic[-1])
    return "/".join(parts[:first]), "/".join(parts[first:])


def _local_files(text: str, split: str) -> _FoundFiles:
    path = Path(text.removeprefix("file://")).expanduser()
    if has_magic(str(path)) and not path.exists():
        base, pattern = _fixed_part(str(path.absolute()))
        root = Path(base or "/")
        names = [name for name in glob(pattern, root_dir=root, recursive=True) if (root / name).is_file()]
        selection = _of_glob(names, text)
    elif path.is_dir():
        root = path
        names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        card = (path / CARD).read_text("utf-8", "replace") if CARD in names else None
        selection = _of_folder(names, card, split, text)
    elif path.exists():
        _check_suffix(text)
        root, selection = path.parent, Selection((path.name,))
    else:
        raise ExternalDataError(f"the source {text!r} does not exist; {nearest_path(path.absolute())}")
    hint = nearest_path(root / "*") if not root.exists() else ""
    return _FoundFiles(root, _checked(selection, text, hint))


def _is_hidden(name: str) -> bool:
    *folders, last = name.split("/")
    return last.startswith(".") or any(part.startswith((".", "__")) for part in folders)


def _remote_files(uri: str, split: str) -> _FoundFiles:
    if has_magic(uri):
        base, pattern = _fixed_part(uri)
        folder, matches = Folder.at(base), glob_regex(pattern)
        found = [entry.name for entry in list_objects(folder) if matches.fullmatch(entry.name)]
        selection = _of_glob([name for name in found if not _is_hidden(name)], uri)
    elif uri.lower().endswith(DOCUMENT_SUFFIXES):
        parent, _, name = uri.rpartition("/")
        folder = Folder.at(parent)
        siblings = [entry.name for entry in list_objects(folder)]
        if name not in siblings:
            close = get_close_matches(name, siblings, n=1, cutoff=0.5)
            hint = f"; did you mean {folder.uri_of(close[0])!r}?" if close else ""
            raise ExternalDataError(f"the source {uri!r} does not exist{hint}")
        selection = Selection((name,))
    else:
        folder = Folder.at(uri)
        names = [entry.name for entry in list_objects(folder)]
        card = folder.get(CARD).decode("utf-8", "replace") if CARD in names else None
        selection = _of_folder(names, card, split, uri)
    return _FoundFiles(folder, _checked(selection, uri, ""))


def _check_suffix(text: str) -> None:
    if not text.lower().endswith(DOCUMENT_SUFFIXES):
        raise ExternalDataError(f"cannot read documents from {text!r}; expected one of {', '.join(DOCUMENT_SUFFIXES)}")


def _of_glob(names: list[str], text: str) -> Selection:
    """Choose what a glob asks for, less what is no data."""
    known = [name for name in names if name.lower().endswith(DOCUMENT_SUFFIXES)]
    chosen = tuple(sorted(name for name in known if not is_no_data(name, text)))
    reasons = {
        "about the data": tuple(sorted(set(known) - set(chosen))),
        "of no format that is read": tuple(sorted(set(names) - set(known))),
    }
    return Selection(chosen, {reason: found for reason, found in reasons.items() if found})


def _of_folder(names: list[str], card: str | None, split: str, text: str) -> Selection:
    visible = [name for name in names if not _is_hidden(name)]
    return select(visible, card, DOCUMENT_SUFFIXES, split=split, source=text)


def _checked(selection: Selection, text: str, hint: str) -> Selection:
    """Refuse a source that has no file to read, or that has compressed documents too."""
    others = [name for names in selection.left_out.values() for name in names]
    packed = sorted(name for name in others if _is_compressed(name))
    if packed:
        raise ExternalDataError(
            f"the source {text!r} holds {len(packed)} compressed files, such as {packed[0]!r}, which cannot be read; "
            "unpack them (or leave them out by a glob such as '*.jsonl')"
        )
    if not selection.names:
        found = f" ({len(others)} other files, such as {min(others)!r})" if others else ""
        more = f"; {hint}" if hint else ""
        raise ExternalDataError(
            f"the source {text!r} matches no file to read{found}; expected {', '.join(DOCUMENT_SUFFIXES)}{more}"
        )
    return selection


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
