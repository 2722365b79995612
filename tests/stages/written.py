"""Files for tests to read, `__` in an argument's name standing for the dot of a file's."""

from pathlib import Path


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder
