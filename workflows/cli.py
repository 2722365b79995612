"""The `stillhouse` command: its subcommands, exit codes, and the border at which errors become messages.

Exit codes: 0 every required step is committed; 1 a step failed; 2 the request is wrong; 130 interrupted by Ctrl-C, 143
by SIGTERM.
With `--json`, standard output is one JSON document and nothing else.
"""

import logging
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from pydantic import ValidationError
from rich.text import Text

from stages.errors import ConfigError, StillhouseError, Transient
from stages.runtime.translation import translate
from workflows.commands.artifacts import artifacts
from workflows.commands.compare import compare
from workflows.commands.doctor import doctor
from workflows.commands.explain import explain
from workflows.commands.init import init
from workflows.commands.list_workflows import workflows
from workflows.commands.options import FAILED, INTERRUPTED, OK, WRONG
from workflows.commands.output import console, print_json
from workflows.commands.parameters import format_validation_error
from workflows.commands.plan import plan
from workflows.commands.run import run
from workflows.commands.runs import runs
from workflows.commands.runtimes import runtimes
from workflows.commands.ui import ui
from workflows.engine.plan import PlanInterrupted

app = App(
    name="stillhouse",
    help="Distils, prunes and quantizes language models on a Ray cluster, and tracks them in MLflow.",
    version_flags=["--version"],
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
for simple in (artifacts, compare, doctor, init, runs, runtimes, ui, workflows):
    app.command(simple)
for dynamic in (run, plan, explain):
    app.command(dynamic, help_flags=())  # `run WORKFLOW --help` is the workflow's
OWN_WORDS = {"run": 1, "plan": 1, "explain": 2}
"""How many words a command takes before those that the workflow's parameters decide the meaning of."""


def main() -> None:
    """Run the command and leave with its exit code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(argv: Sequence[str]) -> int:
    """Run the command on some arguments and return its exit code."""
    as_json = "--json" in argv
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if _asks_for_own_help(argv):
        app.help_print([argv[0]])
        return OK
    try:
        result = app(list(argv), exit_on_error=False, print_error=False)
    except ValidationError as error:
        return _fail("ConfigError", format_validation_error(error, error.title), WRONG, as_json)
    except CycloptsError as error:
        cause, argument = error.__cause__, error.argument
        if isinstance(cause, ValidationError) and argument is not None:
            return _fail("ConfigError", format_validation_error(cause, argument.name), WRONG, as_json)
        return _fail("ConfigError", str(error), WRONG, as_json)
    except (KeyboardInterrupt, PlanInterrupted) as error:
        code = getattr(error, "exit_code", INTERRUPTED)
        return _fail("Interrupted", "interrupted; run the same command again to go on", code, as_json)
    except ConfigError as error:
        return _fail(type(error).__name__, str(error), WRONG, as_json)
    except StillhouseError as error:
        return _fail(type(error).__name__, str(error), FAILED, as_json)
    except Exception as error:  # noqa: BLE001  the border of the command: a store out of reach, or a flaw of ours
        translated = translate(error)
        if not isinstance(translated, Transient):
            logging.getLogger(__name__).error("%s", traceback.format_exc())
        return _fail(type(error).__name__, str(translated), FAILED, as_json)
    return result if isinstance(result, int) else OK


def _asks_for_own_help(argv: Sequence[str]) -> bool:
    """Return whether a command with a workflow's parameters is asked for its own help, not the workflow's."""
    words = OWN_WORDS.get(argv[0], 0) if argv else 0
    return bool(words) and (len(argv) == words == 1 or not {"--help", "-h"}.isdisjoint(argv[1 : 1 + words]))


def _fail(kind: str, message: str, code: int, as_json: bool) -> int:
    if as_json:
        print_json({"error": {"kind": kind, "message": message}, "exit_code": code})
    else:
        console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    return code


if __name__ == "__main__":
    main()
