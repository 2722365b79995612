"""Which trials the runtime that a search is for does not serve: by rule, from the checkpoints that they wrote."""

from collections.abc import Mapping

from stages.formats.search import DoneTrial
from stages.models.serving import RuntimeChoice, is_served
from stages.quantize.records import Receipt
from stages.storage import Folder

__all__ = ["find_refused"]


def find_refused(receipts: Mapping[str, Receipt], resume: Folder, runtime: RuntimeChoice | None) -> dict[str, str]:
    """Return the schemes that are no finalists, with the reason: a runtime refuses their checkpoints.

    What no rule covers may still be a finalist: it is tried where speed is measured.

    Args:
        receipts: of every scheme, by name.
        resume: where the trials' checkpoints lie.
        runtime: what the search is for; None refuses nothing.
    """
    if runtime is None:
        return {}
    refused = {}
    for name, receipt in receipts.items():
        if isinstance(receipt.trial, DoneTrial) and receipt.folder is not None:
            config = (resume / receipt.folder).find_json("config.json")
            found = is_served(config or {}, runtime)
            if found.answer == "refused":
                refused[name] = f"{runtime}: {found.text}"
    return refused
