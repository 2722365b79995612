"""From a trial's checkpoint to one of the search's artifact."""

import tempfile
from pathlib import Path

from stages.errors import StageFailed
from stages.quantize.records import Receipt
from stages.storage import File, Folder, fetch


def publish(receipt: Receipt, resume: Folder, out: Folder) -> tuple[File, ...]:
    """Copy one trial's checkpoint from `resume` to `finalists/<scheme>` of `out`.

    Raises:
        StageFailed: its bytes are not those of its receipt.
        FileNotFoundError: a file of it is gone. Either way nothing of it stays in `out`.
    """
    assert receipt.folder is not None, "a trial that failed has no checkpoint"
    source = resume / receipt.folder
    written: list[File] = []
    try:
        with tempfile.TemporaryDirectory(prefix="stillhouse-publish-") as scratch:
            for entry in receipt.files:
                file = File(entry.name, source.uri_of(entry.name), entry.size_bytes, entry.sha256)
                target = f"finalists/{receipt.trial.scheme}/{file.name}"
                written.append(out.upload(fetch(file, Path(scratch)), target))
                if written[-1].sha256 != file.sha256:
                    raise StageFailed(f"{file.uri} has changed since its trial")
    except BaseException:
        out.delete([done.name for done in written])
        raise
    return tuple(written)
