"""`stillhouse workflows`: which workflows come with stillhouse."""

from rich.text import Text

from workflows.commands.find import find_workflow, workflow_names
from workflows.commands.options import Json
from workflows.commands.output import console, print_json


def workflows(*, json: Json = False) -> None:
    """List the workflows that come with stillhouse."""
    described = {name: (find_workflow(name).build.__doc__ or "").strip().split("\n")[0] for name in workflow_names()}
    if json:
        print_json({"workflows": [{"name": name, "summary": summary} for name, summary in described.items()]})
        return
    out = console()
    for name, summary in described.items():
        out.print(Text.assemble((f"{name:12}", "bold"), f" {summary}"))
    out.print("\nparameters: stillhouse run WORKFLOW --help · a file of your own: stillhouse init DIR", style="dim")
