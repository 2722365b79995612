"""Which files of a folder are data, as the Hugging Face hub tells them: by the card, by split, by name.

A dataset repository has a card, README.md, whose YAML head may name the data files of each configuration and split
(https://huggingface.co/docs/hub/datasets-manual-configuration); where it does not, a split is told by the names of
folders and files (https://huggingface.co/docs/hub/datasets-file-names-and-splits), as `datasets.data_files` does.

Promise: every file that is left out is named with its reason; files of a validation or test split are never taken for
training text, unless there are no others.
Does not: read a data file.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.errors import ExternalDataError

__all__ = ["CARD", "Selection", "glob_regex", "is_no_data", "select"]

CARD = "README.md"
METADATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""JSON about a dataset, of the hub or of `save_to_disk`."""
ABOUT = re.compile(
    r"(licen[cs]e|copying|notice|citation|contributing|changelog|code_of_conduct)(\.(txt|md|rst))?", re.I
)
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split → names, each a whole word between any of `-._ 0-9`."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Names that are read, and those that are not, by reason."""

    names: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def notes(self, source: str) -> list[str]:
        """Return one line on what is left out, or none."""
        if not self.left_out:
            return []
        reasons = "; ".join(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})"
            for reason, names in self.left_out.items()
        )
        return [f"of {source!r} {len(self.names)} files are read; left out: {reasons}. A file that is named is read"]


def is_no_data(name: str, pattern: str = "") -> bool:
    """Return whether a file tells about data and is none; a card is a text like others where a pattern asks for .md."""
    last = name.rpartition("/")[2]
    if last.lower() == CARD.lower():
        return not pattern.lower().endswith(".md")
    return last in METADATA or ABOUT.fullmatch(last) is not None


def select(names: Iterable[str], card: str | None, suffixes: tuple[str, ...], *, split: str, source: str) -> Selection:
    """Choose the data files of a folder.

    Args:
        names: of all files below the folder, hidden ones left out.
        card: the text of the folder's README.md; None where it has none.
        suffixes: of the formats that can be read.
        split: the split to read, where the folder has splits.
        source: the folder's name in errors.

    Raises:
        ExternalDataError: the card has several configurations and no default, or names no file of the split.
    """
    left_out: dict[str, list[str]] = {}
    candidates = []
    for name in sorted(names):
        if is_no_data(name):
            left_out.setdefault("about the data", []).append(name)
        elif not name.lower().endswith(suffixes):
            left_out.setdefault("of no format that is read", []).append(name)
        else:
            candidates.append(name)
    patterns = _patterns(card, source) if card else None
    if patterns is not None:
        splits = {key: [n for n in candidates if any(p.fullmatch(n) for p in found)] for key, found in patterns.items()}
        if not splits.get(split):
            known = ", ".join(sorted(splits))
            raise ExternalDataError(
                f"the card of {source!r} names no file of the split {split!r} that is there and can be read (its "
                f"splits: {known}); give the files by name or by a glob"
            )
        chosen = splits[split]
    else:
        splits = _splits_by_name(candidates)
        chosen = splits.get(split) or [n for n in candidates if not any(n in found for found in splits.values())]
        chosen = chosen or candidates
    taken = set(chosen)
    for name in candidates:
        if name not in taken:
            other = next((key for key, found in splits.items() if name in found), None)
            reason = f"split {other!r}" if other else "of no split" if patterns is None else "not named by the card"
            left_out.setdefault(reason, []).append(name)
    return Selection(tuple(chosen), {reason: tuple(found) for reason, found in left_out.items()})


def _splits_by_name(names: list[str]) -> dict[str, list[str]]:
    """Return the files of each split: by the names of their folders, or, where no folder has such a name, their own."""
    for depth in (slice(None, -1), slice(-1, None)):
        found: dict[str, list[str]] = {}
        for name in names:
            words = {word.lower() for part in name.split("/")[depth] for word in re.split(r"[-._ 0-9]+", part)}
            matching = [split for split, keywords in KEYWORDS.items() if words.intersection(keywords)]
            if matching:
                found.setdefault(matching[0], []).append(name)
        if found:
            return found
    return {}


def _patterns(card: str, source: str) -> dict[str, list[re.Pattern[str]]] | None:
    """Return split → patterns of the configuration that is the card's default; None where the card names no files."""
    configs = [config for config in _head(card).get("configs") or [] if isinstance(config, dict)]
    configs = [config for config in configs if config.get("data_files") or config.get("data_dir")]
    if not configs:
        return None
    named = {str(config.get("config_name", "default")): config for config in configs}
    preferred = [config for name, config in named.items() if config.get("default") or name == "default"]
    if len(configs) > 1 and not preferred:
        raise ExternalDataError(
            f"the card of {source!r} has the configurations {', '.join(sorted(named))} and no default; give the files "
            "of one of them by name or by a glob"
        )
    config = (preferred or configs)[0]
    folder = str(config.get("data_dir") or "").strip("/")
    files = config.get("data_files") or "**"
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    elif not isinstance(files, list) or not all(isinstance(entry, dict) for entry in files):
        files = [{"split": "train", "path": files}]
    found: dict[str, list[re.Pattern[str]]] = {}
    for entry in files:
        paths = entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            whole = f"{folder}/{path}" if folder else str(path)
            found.setdefault(str(entry.get("split", "train")), []).append(glob_regex(whole.removeprefix("./")))
    return found


def _head(card: str) -> dict[str, Any]:
    """Return the YAML head of a card; empty where it has none, or one that cannot be read."""
    import yaml

    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", card, re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Translate a glob as `glob.glob(recursive=True)` reads it: `*` stays within a folder, `**/` spans folders."""
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]*\]|[^*?\[]+|\[", pattern):
        known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        is_class = len(token) > 1 and token.startswith("[")
        out += known.get(token) or (token.replace("[!", "[^") if is_class else re.escape(token))
    return re.compile(out)
