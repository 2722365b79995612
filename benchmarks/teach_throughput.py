"""Teach's throughput against a bare forward pass of the same teacher on the same rows, interleaved in one process.

What is timed as Teach is what one of its actors does with a shard: read it, run the teacher, capture top-k, tail and
log-partitions, write Parquet bytes. The bare pass is `model(input_ids, position_ids).logits` under `inference_mode`, rows
in memory; the rows hold several segments, so that both have the block mask.
Start-up (Ray, loading) is left out of both.

    python -m benchmarks.teach_throughput --vocabulary 32000 --width 512 --layers 8
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch

from stages.teach.engines.local import LocalTeacher
from stages.teach.shards import teach_shard
from tests.stages.tiny import tiny_llama, write_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "vocabulary": 32_000, "width": 512, "layers": 8, "length": 256, "rows": 32, "batch": 8, "k": 32, "rounds": 5,
        "segments": 4,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(
            Path(folder),
            vocabulary=options.vocabulary,
            length=options.length,
            shards=(options.rows,),
            segments=options.segments,
        )
        (path,) = data.paths("tokens/*.parquet")
        model = tiny_llama(
            vocabulary=options.vocabulary,
            width=options.width,
            layers=options.layers,
            num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 64,
            intermediate_size=options.width * 8 // 3 // 64 * 64,
            max_position_embeddings=options.length,
            initializer_range=0.02,
        ).to(options.device, getattr(torch, options.dtype))
        table = pq.read_table(path)
        ids, places = (
            torch.tensor(table[name].to_pylist(), device=options.device) for name in ("input_ids", "positions")
        )
        teacher = LocalTeacher(model, vocabulary=options.vocabulary, k=options.k, temperatures=(1.0, 2.0, 4.0))

        def bare() -> None:
            with torch.inference_mode():
                for ids_BT, places_BT in zip(ids.split(options.batch), places.split(options.batch), strict=True):
                    model(input_ids=ids_BT, position_ids=places_BT).logits  # noqa: B018
            if options.device == "cuda":
                torch.cuda.synchronize()

        def taught() -> None:
            for _ in teach_shard(path, teacher.signals, batch_rows=options.batch, dtype=options.dtype):
                pass

        seconds: dict[str, list[float]] = {"bare": [], "taught": []}
        bare(), taught()
        for _ in range(options.rounds):
            for name, work in (("bare", bare), ("taught", taught)):
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)

    tokens = options.rows * options.length
    print(
        f"Llama {options.layers} × {options.width}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; "
        f"vocabulary {options.vocabulary}, k {options.k}, temperatures 1 2 4; batch {options.batch} × {options.length}, "
        f"{options.dtype} on {options.device}, {torch.get_num_threads()} threads; {options.rounds} rounds"
    )
    for name, values in seconds.items():
        print(f"{name:>7}: {tokens / statistics.median(values):10.0f} tokens/s")
    pairs = [b / t for b, t in zip(seconds["bare"], seconds["taught"], strict=True)]
    print(f"  ratio: {statistics.median(pairs):10.3f} (median of pairs; {min(pairs):.3f} to {max(pairs):.3f})")


if __name__ == "__main__":
    main()
