"""Calls to the store that are tried again: one lost answer must not end a run while its other steps work."""

import logging
from collections.abc import Callable
from threading import Event as Flag
from typing import TypeVar

from stages.storage import STORE_ERRORS

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAUSES_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Some 20 s, on top of what obstore itself does (it tries a request to an object store for up to 3 minutes)."""


def persist(what: str, call: Callable[[], T], interrupt: Flag) -> T:
    """Return what a call returns, tried again while the store fails; doing it twice must be as good as once.

    Once `interrupt` is set, it is tried one last time without waiting.

    Raises:
        Exception: the last one of `STORE_ERRORS`, or any other at once.
    """
    for seconds in PAUSES_SECONDS:
        try:
            return call()
        except STORE_ERRORS as error:
            logger.warning("cannot %s: %s; trying again in %g s", what, brief(error), seconds)
            if interrupt.wait(seconds):
                break
    return call()


def attempt_once(what: str, call: Callable[[], object]) -> None:
    """Do what a run can do without; log why where the store fails."""
    try:
        call()
    except STORE_ERRORS as error:
        logger.warning("cannot %s: %s; the run goes on without", what, brief(error))


def brief(error: BaseException) -> str:
    """Return an error's first line: obstore's go on with a dump of the request."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
