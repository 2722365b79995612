"""What keeping near duplicates together costs: signing documents, beside reading them alone; and grouping them.

Prints, on one core: tokens a second of reading rows and of reading and signing them (a token is 4.2 characters, as in
English of GPT-2's tokenizer); seconds of grouping 200,000 signatures, a tenth of them near duplicates; and
the share of planted near duplicates that are found, by their similarity.
"""

import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from stages.external.documents import Files
from stages.prepare.division import Division
from stages.prepare.documents import PartReader
from stages.prepare.duplicates import PERMUTATIONS, RECORD, find_clusters, keep_together, sign_part, sketch
from stages.prepare.parts import plan_parts
from stages.storage import Folder

CHARACTERS_PER_TOKEN = 4.2
DOCUMENTS, GROUPED = 3_000, 200_000


def write_corpus(path: Path) -> int:
    """Write documents of log-normal lengths (median 300 words); return their tokens."""
    rng = np.random.default_rng(0)
    vocabulary = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(20_000)]
    lengths = np.exp(rng.normal(np.log(300), 0.8, DOCUMENTS)).astype(int) + 1
    characters = 0
    with path.open("w") as file:
        for length in lengths:
            text = " ".join(vocabulary[i] for i in (rng.zipf(1.3, length) - 1) % len(vocabulary))
            characters += len(text)
            file.write(json.dumps({"text": text}) + "\n")
    return int(characters / CHARACTERS_PER_TOKEN)


def sign(folder: Path) -> None:
    num_tokens = write_corpus(folder / "a.jsonl")
    parts = plan_parts(Files(paths=(str(folder / "a.jsonl"),)), 8 * 1024 * 1024)
    signatures = Folder.at(folder / "signatures")

    def read() -> None:
        for part in parts:
            for _ in PartReader(part, "text", "text"):
                pass

    def read_and_sign() -> None:
        for part in parts:
            sign_part(part, schema="text", text_field="text", folder=signatures)

    read_and_sign()
    seconds = {"read": [], "sign": []}
    for _ in range(3):
        for name, work in (("read", read), ("sign", read_and_sign)):
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    best = {name: num_tokens / min(found) for name, found in seconds.items()}
    print(
        f"{num_tokens:,} tokens: read {best['read']:,.0f}, read and sign {best['sign']:,.0f} tokens a second of CPU time"
    )


def group(folder: Path) -> None:
    rng = np.random.default_rng(0)
    records = np.zeros(GROUPED, RECORD)
    records["digest"] = rng.integers(0, 2**63, (GROUPED, 4), np.uint64)
    records["sketch"] = rng.integers(0, 2**32, (GROUPED, PERMUTATIONS), np.uint64)
    records["words"] = True
    copied = rng.permutation(GROUPED)[: GROUPED // 5].reshape(2, -1)
    records["sketch"][copied[1]] = records["sketch"][copied[0]]
    records["sketch"][copied[1], :13] += np.uint32(1)  # a similarity of 0.9
    sink = io.BytesIO()
    np.save(sink, records)
    Folder.at(folder / "grouped").put("00000.npy", sink.getvalue())
    del records, sink
    start = time.perf_counter()
    _, found = keep_together(Folder.at(folder / "grouped"), Division(0, 0.05, 0.05), 0.8)
    seconds = time.perf_counter() - start
    print(f"{GROUPED:,} documents grouped in {seconds:.1f} s; {found.near} of {GROUPED // 10} near duplicates found")


def recall() -> None:
    rng = np.random.default_rng(0)
    for similarity in (0.6, 0.7, 0.75, 0.8, 0.85, 0.9):
        records = np.zeros(400, RECORD)
        records["digest"] = np.arange(1600).reshape(400, 4)
        records["words"] = True
        for i in range(0, 400, 2):
            common = rng.integers(0, 2**32, round(600 * similarity / (1 + similarity)), np.uint64)
            for j in range(2):
                own = rng.integers(0, 2**32, 300 - len(common), np.uint64)
                records["sketch"][i + j] = sketch(np.concatenate([common, own]))
        num_found = 400 - len(np.unique(find_clusters(records, 0.8).cluster_N))
        print(f"pairs of similarity {similarity}: {num_found / 2:.0f} % taken for near duplicates at 0.8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sign(Path(temporary))
        group(Path(temporary))
    recall()
