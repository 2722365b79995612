"""Small stages that tests wire into graphs: they write what their config says, and fail when it says so."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from stages.contract import Context, Input, Outcome, Shards, Stage
from stages.errors import OutOfMemory, StageFailed, Transient


class Write(Stage):
    """Leaves a dataset of one file."""

    KIND = "dataset"
    REVISION = "2026-11-21 first"
    text: str = "x"

    def run(self, context: Context) -> Outcome:
        context.reporter.progress(1, 1, "files")
        context.out.put("text.txt", self.text.encode())
        return Outcome({"characters": float(len(self.text))})


class Join(Stage):
    """Leaves a model of one file: the text of its inputs, joined."""

    KIND = "model"
    REVISION = "2026-11-21 first"
    INPUTS: ClassVar[Mapping[str, Input]] = {
        "data": Input(("dataset",)),
        "parts": Input(("model",), many=True, required=False),
    }
    mark: str = ""

    def run(self, context: Context) -> Outcome:
        texts = [path.read_text() for path in context.one("data").paths("*.txt")]
        texts += [path.read_text() for part in context.many("parts").values() for path in part.paths("*.txt")]
        context.out.put("text.txt", (self.mark + "+".join(texts)).encode())
        return Outcome({"parts": float(len(texts))})


class Odd(Stage):
    """Leaves a dataset and a metric that is no number."""

    KIND = "dataset"
    REVISION = "2026-11-21 first"

    def run(self, context: Context) -> Outcome:
        context.out.put("text.txt", b"odd")
        return Outcome({"loss": float("nan")})


class Stumble(Stage):
    """Fails as its config says until a file says that it has failed so often."""

    KIND = "dataset"
    REVISION = "2026-11-21 first"
    how: str
    """`permanent`, `transient`, `memory`, `kill` or `sleep`."""
    times: int = 1
    counter: str
    """Path of the file that counts the tries."""

    def run(self, context: Context) -> Outcome:
        path = Path(self.counter)
        tries = int(path.read_text()) if path.exists() else 0
        path.write_text(str(tries + 1))
        if tries < self.times:
            match self.how:
                case "permanent":
                    raise StageFailed("the flask broke")
                case "transient":
                    raise Transient("the flask slipped")
                case "memory":
                    raise OutOfMemory("the flask ran over")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "sleep":
                    context.reporter.note("asleep")
                    time.sleep(60)
        context.out.put("text.txt", f"tries={tries + 1} micro_batch={context.resources.micro_batch}".encode())
        return Outcome()


class Pour(Stage):
    """Leaves shards, each with a receipt, and appends a line to a log for each that it pours."""

    KIND = "dataset"
    REVISION = "2026-11-21 first"
    num_shards: int = 4
    seconds_each: float = 0.0
    log: str

    def run(self, context: Context) -> Outcome:
        shards = Shards(context.out, context.resume)
        done = shards.done()
        for index in range(self.num_shards):
            name = f"shards/{index}.txt"
            if name not in done:
                time.sleep(self.seconds_each)
                shards.write(name, f"shard {index}".encode(), {"rows": 1})
                with Path(self.log).open("a") as log:
                    log.write(f"{index}\n")
            context.reporter.progress(index + 1, self.num_shards, "shards")
        return Outcome({"shards": float(self.num_shards)})
