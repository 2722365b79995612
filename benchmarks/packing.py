"""How full packed rows are, and how fast they are made; with a real model, what a text's first token is worth.

Chats are made up: log-normal lengths, median 300 tokens, σ 1 (a mix as in public chat data), those longer than a row left
out; what is timed is cutting and packing on one core, tokens in memory. With `--model FOLDER` a checkpoint whose tokenizer
puts a token before each text scores windows of Python's documentation, once begun with it and once without.

    python -m benchmarks.packing --model path/to/gemma-3-270m
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from stages.formats.tokens import TokenRows, predicts
from stages.models.checkpoints import load_model
from stages.models.heads import observe_head
from stages.models.tokenization import load_tokenizer
from stages.prepare.documents import document_of
from stages.prepare.encoding import Encoded, build_encoder
from stages.prepare.packing import Cutting, Packer
from stages.prepare.python_docs import read_topics
from stages.prepare.tokenizer import describe_tokenizer

SHARD_TOKENS = 65_536


def pack(documents: list[Encoded], cutting: Cutting, *, whole: bool) -> Iterator[TokenRows]:
    packer = Packer(sequence_length=cutting.sequence_length, shard_tokens=SHARD_TOKENS, pad_token_id=0)
    for document in documents:
        yield from packer.add(cutting.whole(document) if whole else cutting.windows(document))
    yield from packer.finish()


def fill(sequence_length: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(np.exp(rng.normal(np.log(300), 1.0, tokens // 495)), 8).astype(int)
    chats = [Encoded(np.zeros(n, np.int32), np.ones(n, np.bool_), i) for i, n in enumerate(lengths)]
    cutting = Cutting(sequence_length=sequence_length, prefix=(1,), overlong="reject", context_fraction=0.5)
    began = time.process_time()
    shards = list(pack(chats, cutting, whole=True))
    seconds = time.process_time() - began
    filled = sum(int((rows.document_ids_RT >= 0).sum()) for rows in shards)
    print(
        f"rows of {sequence_length}: {filled / 1e6:.2f} M tokens of chats in {len(shards)} shards, "
        f"{filled / sum(rows.ids_RT.size for rows in shards):.2%} of positions filled (asked: 97 %), "
        f"{filled / seconds / 1e6:.1f} M tokens/s a core (asked: 0.2), {np.mean(lengths > sequence_length):.1%} too long"
    )


@torch.inference_mode()
def score(folder: Path, rows: TokenRows, dtype: str, vocabulary_size: int) -> tuple[float, int]:
    """Return nats per token, and how many tokens that are."""
    model = load_model(folder, dtype=dtype)
    ids_BT, positions_BT = torch.from_numpy(rows.ids_RT).long(), torch.from_numpy(rows.positions_RT).long()
    head = observe_head(model, ids_BT, vocabulary_size)
    total, count = 0.0, 0
    for row in range(len(rows)):
        one = slice(row, row + 1)
        chosen_BT = torch.from_numpy(predicts(rows.mask_RT[one]))
        log_p_NV = head.log_probs(head.states(model, ids_BT[one], positions_BT[one], chosen_BT))
        total -= float(log_p_NV.gather(1, ids_BT[one].roll(-1)[chosen_BT][:, None]).sum())
        count += len(log_p_NV)
    return total / count, count


def begin(folder: Path, sequence_length: int, num_rows: int, dtype: str) -> None:
    state, facts = describe_tokenizer(load_tokenizer(folder), folder)
    if not state.prefix:
        print(f"the tokenizer in {folder} puts nothing before a text")
        return
    documents = [document_of(text, "text", "text") for _, text in read_topics()]
    encoded = build_encoder(state).encode([document for document in documents if document])
    cutting = Cutting(sequence_length=sequence_length, prefix=state.prefix, overlong="reject", context_fraction=0.5)
    windows = [window for document in encoded if isinstance(document, Encoded) for window in cutting.windows(document)]
    packer = Packer(sequence_length=sequence_length, shard_tokens=SHARD_TOKENS, pad_token_id=0)
    full = [each for each in windows if len(each.ids) == sequence_length][:num_rows]
    (rows,) = [*packer.add(full), *packer.finish()]
    skipped = slice(len(state.prefix), None)
    bare_mask = rows.mask_RT[:, skipped].copy()
    bare_mask[:, 0] = False
    bare = TokenRows(
        rows.ids_RT[:, skipped], rows.document_ids_RT[:, skipped], bare_mask, rows.positions_RT[:, : -skipped.start]
    )
    for name, chosen in (("begun with it", rows), ("without", bare)):
        nats, count = score(folder, chosen, dtype, facts.vocabulary_size)
        print(f"{folder.name}, windows of {sequence_length}, {name}: {nats:.3f} nats/token over {count} ({dtype})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    for sequence_length in (512, 2048):
        fill(sequence_length, options.tokens)
    if options.model:
        begin(options.model, options.length, options.rows, options.dtype)


if __name__ == "__main__":
    main()
