"""Which trials the runtime that a search is for does not serve: by rule, from the checkpoints that they wrote."""

from collections.abc import Mapping

from stages.contract import Context
from stages.formats.search import DoneTrial
from stages.models.serving import RuntimeChoice, is_served
from stages.quantize.records import Receipt

__all__ = ["find_refused"]


def find_refused(receipts: Mapping[str, Receipt], context: Context, runtime: RuntimeChoice | None) -> dict[str, str]:
    """Return the schemes that are no finalists, with the reason: a runtime refuses their checkpoints.

    What no rule covers may still be a finalist: it is tried where speed is measured.

    Args:
        receipts: of every scheme, by name.
        context: of the step; the trials' checkpoints lie in its `resume`, and each refusal is noted.
        runtime: what the search is for; None refuses nothing.
    """
    if runtime is None:
        return {}
    refused = {}
    for name, receipt in receipts.items():
        if isinstance(receipt.trial, DoneTrial) and receipt.folder is not None:
            config = (context.resume / receipt.folder).find_json("config.json")
            found = is_served(config or {}, runtime)
            if found.answer == "refused":
                refused[name] = f"{runtime}: {found.text}"
                context.reporter.note(f"{name} is no finalist: {refused[name]}")
    return refused
