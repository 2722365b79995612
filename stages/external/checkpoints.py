"""Checkpoints and tokenizers from outside: what they are (digests, hub revisions) and where their files lie.

Promises: equal data has an equal identity wherever it lies (a path, an object store) and whatever its folder is
called; a hub id is pinned to the commit that it names at the moment. Pickled weights are never listed, so nothing
downstream can open one.
Does not: load models (that is `stages.models.checkpoints`).
"""

import json
import logging
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

from stages.contract import Artifact, ExternalData
from stages.errors import ExternalDataError
from stages.external.digests import digest_files, digest_objects, list_objects, nearest_path
from stages.storage import File, Folder, cache_root, fetch, is_remote

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
VOCABULARY_FILES = frozenset(
    {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
)
TOKENIZER_FILES = VOCABULARY_FILES | {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
}
MODEL_FILES = {"config.json", "generation_config.json"}
"""Of a model besides its weights: what else lies beside them (logs, a trainer's state) is no part of it."""
WEIGHTS_INDEX = "model.safetensors.index.json"
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A revision that is a commit already."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def hub_info(kind: Literal["model", "dataset"], repo_id: str, revision: str | None) -> Any:
    """Ask the hub for a repository's commit and files.

    Raises:
        ExternalDataError: no such repository or revision, no permission, or the hub is out of reach.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"hub {kind} {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        if kind == "model":
            return HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        return HfApi().dataset_info(repo_id, revision=revision)
    except GatedRepoError as error:
        raise ExternalDataError(f"{what} is gated: accept its terms on its page, then set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ExternalDataError(
            f"{what}: no such revision; expected a branch, a tag or a commit of that repository"
        ) from error
    except RepositoryNotFoundError as error:
        raise ExternalDataError(f"{what} does not exist, or is private; check the id, or set HF_TOKEN") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        detail = next(iter(str(error).splitlines()), "no detail")
        raise ExternalDataError(
            f"{what} cannot be reached ({type(error).__name__}: {detail}); "
            "give a local path instead, or check the network, HF_TOKEN and HF_HUB_OFFLINE"
        ) from error


class _Repository:
    """A folder, a remote prefix or a hub repository as one listing: names, JSON reading and files."""

    def __init__(self, source: str, revision: str | None) -> None:
        self.source = source
        self.commit: str | None = None
        """The commit of a hub repository, else None."""
        self._where: Path | Folder | None = None
        """Where the files lie; None where they are on the hub."""
        path = Path(source).expanduser()
        if path.is_dir():
            self._open_folder(path.absolute())
        elif is_remote(source):
            self._where = Folder.at(source)
            self.names = {entry.name for entry in list_objects(self._where)}
        elif path.exists():
            raise ExternalDataError(f"{source!r} is a file, expected the folder of a checkpoint")
        elif _looks_like_hub_id(source):
            self._open_hub(revision)
        else:
            raise ExternalDataError(f"the checkpoint folder {source!r} does not exist; {nearest_path(path.absolute())}")
        if revision is not None and self.commit is None:
            raise ExternalDataError(
                f"revision={revision!r} is for hub ids, but {source!r} is a folder; leave revision out"
            )

    def _open_folder(self, path: Path) -> None:
        self._where = path
        self.names = {child.name for child in path.iterdir() if child.is_file()}

    def _open_hub(self, revision: str | None) -> None:
        try:
            info = hub_info("model", self.source, revision)
        except ExternalDataError as error:
            cached = _cached_snapshot(self.source, revision)
            if cached is None:
                hint = nearest_path(Path(self.source).absolute())
                raise ExternalDataError(f"{error} (there is no folder of that name either: {hint})") from error
            self.commit = revision
            self._open_folder(cached)
            return
        self.commit = info.sha
        self._siblings = {sibling.rfilename: sibling for sibling in info.siblings}
        self.names = set(self._siblings)

    def read_json(self, name: str) -> Any:
        """Read one of its small JSON files."""
        if isinstance(self._where, Folder):
            return self._where.get_json(name)
        if self._where is not None:
            return json.loads((self._where / name).read_text())
        from huggingface_hub import hf_hub_download

        return json.loads(Path(hf_hub_download(self.source, name, revision=self.commit)).read_text())

    def local(self, names: Iterable[str]) -> Path | None:
        """Return a local folder that holds at least these files; None where the hub gives one of them not for now."""
        if isinstance(self._where, Path):
            return self._where
        if self._where is not None:
            files = self.files(names, "model")
            key = sha256("".join(file.sha256 for file in files).encode()).hexdigest()[:16]
            paths = [fetch(file, cache_root() / "described" / key) for file in files]
            return paths[0].parent if paths else None
        import httpx
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            paths = [Path(hf_hub_download(self.source, name, revision=self.commit)) for name in sorted(names)]
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
            logger.warning("cannot fetch what describes %s, so it is checked later: %s", self.source, error)
            return None
        return paths[0].parent if paths else None

    def files(self, names: Iterable[str], prefix: str) -> tuple[File, ...]:
        """Return files under logical names `prefix/name`; the hub knows a sha256 only of what lies in git-lfs."""
        ordered = sorted(names)
        if isinstance(self._where, Folder):
            found = digest_objects(self._where, ordered)
            return tuple(File(f"{prefix}/{f.name}", f.uri, f.size_bytes, f.sha256) for f in found)
        if self._where is not None:
            return digest_files({f"{prefix}/{name}": self._where / name for name in ordered})
        base = f"hf://{self.source}@{self.commit}"
        known = [(name, self._siblings[name]) for name in ordered]
        return tuple(File(f"{prefix}/{n}", f"{base}/{n}", s.size or 0, s.lfs.sha256 if s.lfs else "") for n, s in known)

    def identity(self, kind: str, names: Iterable[str]) -> dict[str, Any]:
        """Return the identity: the hub's commit, or names and digests."""
        if self.commit is not None:
            return {
                "kind": "hub" if kind == "checkpoint" else f"hub-{kind}",
                "id": self.source,
                "revision": self.commit,
            }
        return {"kind": kind, "files": [[f.name.partition("/")[2], f.sha256] for f in self.files(names, kind)]}


def _looks_like_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and not source.startswith(".") and source.count("/") <= 1


def _cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """Return the hub cache's folder of an exact commit, else None: a branch's cached state may be old."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if revision is None or not COMMIT.fullmatch(revision):
        return None
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _checkpoint_names(names: set[str], read_json: Callable[[str], Any], source: str) -> set[str]:
    """Choose a checkpoint's files: config, the safetensors that transformers would load, tokenizer, templates.

    Raises:
        ExternalDataError: it has no config, only pickled weights, or a shard is missing.
    """
    if "config.json" not in names:
        close = get_close_matches("config.json", sorted(names), n=1, cutoff=0.6)
        hint = f"; the nearest name is {close[0]!r}" if close else ""
        raise ExternalDataError(f"{source!r} has no config.json{hint}; expected a model as `save_pretrained` writes it")
    index = WEIGHTS_INDEX
    if "model.safetensors" in names:  # what transformers prefers, though an earlier save may have left shards
        weights = {"model.safetensors"}
    elif index in names:
        weights = set(read_json(index)["weight_map"].values())
        if weights - names:
            raise ExternalDataError(
                f"{source!r} lacks the weights {sorted(weights - names)} that {index} names; copy the checkpoint again"
            )
        weights |= {index}
    else:
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        found = f"only pickled weights ({', '.join(pickles[:3])})" if pickles else "no weights"
        raise ExternalDataError(
            f"{source!r} has {found}; expected model.safetensors: safetensors only, since a pickle can run code. "
            "Where you trust it, convert it with `AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)`"
        )
    return weights | (names & (MODEL_FILES | TOKENIZER_FILES))


def _pinned(found: _Repository) -> dict[str, str]:
    """Return the fields that name it for good: the hub's commit, or a folder's absolute path."""
    if found.commit is not None:
        return {"revision": found.commit}
    path = Path(found.source).expanduser()
    return {"source": str(path.absolute())} if path.is_dir() else {}


class Checkpoint(ExternalData):
    """A model from outside: a folder, an `s3://`, `gs://` or `az://` prefix, or a hub id. Safetensors only."""

    source: str
    """A folder's path or URI, or a hub id such as `Qwen/Qwen3-0.6B`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None is the default branch. Resolved to its commit in the identity."""

    def identity(self) -> dict[str, Any]:
        """Return names and digests of the files, or the hub's commit."""
        found = _Repository(self.source, self.revision)
        return found.identity("checkpoint", _checkpoint_names(found.names, found.read_json, self.source))

    def resolved(self) -> Self:
        """Return it with an absolute path, or pinned to the hub's commit."""
        return self.model_copy(update=_pinned(_Repository(self.source, self.revision)))

    def described(self) -> Path | None:
        """Return a local folder with what describes it: config, tokenizer, the weights' index; perhaps its weights too.

        Of what lies elsewhere these files are fetched, less than 50 MB; None where the hub gives none of them for now.

        Raises:
            ExternalDataError: the checkpoint is missing, out of reach, or has no weights that may be read.
        """
        found = _Repository(self.source, self.revision)
        names = _checkpoint_names(found.names, found.read_json, self.source)
        return found.local(names & (TOKENIZER_FILES | MODEL_FILES | {WEIGHTS_INDEX}))

    def config(self, *, ask_hub: bool = False) -> dict[str, Any] | None:
        """Return its `config.json`; None where there is none, or only the hub has it, unless the hub is to be asked.

        Raises:
            ExternalDataError: the checkpoint is missing or out of reach.
        """
        found = _Repository(self.source, self.revision)
        if "config.json" not in found.names or (found.commit is not None and not ask_hub):
            return None
        try:
            return dict(found.read_json("config.json"))
        except (OSError, ValueError) as error:
            raise ExternalDataError(f"cannot read config.json of {self.source!r}: {error}") from error

    def artifact(self, fingerprint: str) -> Artifact:
        """Return it as a model artifact whose files lie where they are."""
        found = _Repository(self.source, self.revision)
        names = _checkpoint_names(found.names, found.read_json, self.source)
        return Artifact("model", fingerprint, found.files(names, "model"))


class PretrainedTokenizer(ExternalData):
    """A tokenizer from outside: a folder or prefix that holds one (a checkpoint's will do), or a hub id."""

    source: str
    """A folder's path or URI, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None is the default branch."""

    def _open(self) -> tuple[_Repository, set[str]]:
        found = _Repository(self.source, self.revision)
        if not found.names & VOCABULARY_FILES:
            expected = ", ".join(sorted(VOCABULARY_FILES))
            raise ExternalDataError(f"{self.source!r} has no tokenizer: expected one of {expected}")
        return found, found.names & (TOKENIZER_FILES | {"config.json"})

    def described(self) -> Path | None:
        """Return a local folder with its files; None where the hub gives them not for now.

        Raises:
            ExternalDataError: it is missing or out of reach.
        """
        found, names = self._open()
        return found.local(names)

    def identity(self) -> dict[str, Any]:
        """Return names and digests of the tokenizer's files, or the hub's commit."""
        found, names = self._open()
        return found.identity("tokenizer", names)

    def resolved(self) -> Self:
        """Return it with an absolute path, or pinned to the hub's commit."""
        return self.model_copy(update=_pinned(self._open()[0]))

    def artifact(self, fingerprint: str) -> Artifact:
        """Return it as an artifact with files `tokenizer/…` that lie where they are."""
        found, names = self._open()
        return Artifact("dataset", fingerprint, found.files(names, "tokenizer"))
