"""Train's loop against a plain PyTorch loop with the same model and objective, interleaved in one process.

Train's loop reads real shards (tokens and signals) through its reader; the plain one goes over a batch held in memory
and does what one would write by hand: forward, losses in float32 over the whole logits, backward, clip, fused AdamW.
Both without start-up, and both with the block mask of rows that hold several segments; world size 1.

    python -m benchmarks.train_throughput --objective soft
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from stages.train.batches import StepBatch
from stages.train.forward import LossSum
from stages.train.loop import Ranks, Training
from stages.train.objectives import CrossEntropy, SoftTarget
from stages.train.progress import Progress
from stages.train.reader import Reader
from stages.train.recipe import AdamW, Recipe
from stages.train.windows import ShardPair, SignalsLayout
from tests.fakes import RecordingReporter
from tests.stages.tiny import tiny_llama, write_dataset
from tests.stages.train.signals import write_signals

TEMPERATURE = 2.0


def _student(options: argparse.Namespace) -> Any:
    return tiny_llama(
        vocabulary=options.vocabulary,
        width=options.width,
        layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        intermediate_size=options.width * 8 // 3 // 32 * 32,
        max_position_embeddings=options.length,
        initializer_range=0.02,
        tie_word_embeddings=True,
    ).to(options.device)


def _plain_loss(logits: torch.Tensor, batch: Any, objective: str) -> torch.Tensor:
    """Mean loss as one would write it by hand, over the whole logits at once."""
    logits = logits.flatten(0, 1)[batch.positions_M].float()
    loss = functional.cross_entropy(logits, batch.targets_M)
    if objective == "cross":
        return loss
    stored = batch.signals
    partition = stored.log_partitions_MC[:, stored.temperatures.index(TEMPERATURE), None]
    p = torch.exp(stored.log_probs_MK.float() / TEMPERATURE - partition)
    log_q = functional.log_softmax(logits / TEMPERATURE, -1).gather(1, stored.ids_MK.long())
    tail_p, tail_q = (1 - p.sum(1)).clamp(min=1e-9), (1 - log_q.exp().sum(1)).clamp(min=1e-9)
    kl = (p * (p.log() - log_q)).sum(1) + tail_p * (tail_p.log() - tail_q.log())
    return loss + TEMPERATURE**2 * kl.mean()


def _plain(options: argparse.Namespace, step: StepBatch, steps: int) -> Callable[[], None]:
    model = _student(options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    held = [batch.to(torch.device(options.device)) for batch in step.micro_batches]

    def work() -> None:
        for _ in range(steps):
            for batch in held:
                with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
                    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT}
                    logits = model(**inputs, use_cache=False).logits
                (_plain_loss(logits, batch, options.objective) / len(held)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if options.device == "cuda":
            torch.cuda.synchronize()

    return work


def _ours(options: argparse.Namespace, reader: Reader, steps: int) -> Callable[[], None]:
    model = _student(options)
    recipe = Recipe(
        optimizer=AdamW(), optimizer_steps=steps, warmup_fraction=0.05, decay="cosine", final_fraction=0.1,
        gradient_clip=1.0, max_skipped_fraction=0.01, dtype=options.dtype, seed=0,
    )  # fmt: skip
    soft = [SoftTarget(temperature=TEMPERATURE)] if options.objective == "soft" else []
    objectives = [CrossEntropy(), *soft]

    def work() -> None:
        Training(
            model=model,
            reader=reader,
            loss=LossSum(objectives, options.vocabulary, dtype=options.dtype),
            recipe=recipe,
            reporter=RecordingReporter(),
            ranks=Ranks(device=torch.device(options.device)),
        ).run(Progress())

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "vocabulary": 4096, "width": 256, "layers": 4, "length": 128, "rows": 256, "batch": 32, "steps": 8, "rounds": 5,
        "segments": 4,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--objective", choices=["cross", "soft"], default="soft")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = write_dataset(
            root,
            vocabulary=options.vocabulary,
            length=options.length,
            shards=(options.rows // 4,) * 4,
            segments=options.segments,
        )
        teacher = tiny_llama(vocabulary=options.vocabulary, max_position_embeddings=options.length)
        signals = write_signals(root / "stored", data, teacher, k=32, temperatures=(1.0, 2.0, 4.0))
        pairs = zip(data.paths("tokens/*.parquet"), signals.paths("signals/*.parquet"), strict=True)
        reader = Reader(
            tuple(ShardPair(*pair) for pair in pairs),
            SignalsLayout(32, (1.0, 2.0, 4.0)) if options.objective == "soft" else None,
            batch_rows=options.batch,
            micro_batch=options.batch,
            seed=0,
        )
        (step,) = reader.steps(0, 1)
        loops = {"plain": _plain(options, step, options.steps), "ours": _ours(options, reader, options.steps)}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for work in loops.values():
            work()
        for _ in range(options.rounds):
            for name, work in loops.items():
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)

    tokens = options.batch * options.length * options.steps
    print(
        f"Llama {options.layers} × {options.width}, vocabulary {options.vocabulary}; objective {options.objective}; "
        f"batch {options.batch} × {options.length}, {options.dtype} on {options.device}, "
        f"{torch.get_num_threads()} threads; {options.rounds} rounds of {options.steps} steps"
    )
    for name, values in seconds.items():
        print(f"{name:>6}: {tokens / statistics.median(values):10.0f} tokens/s")
    ratios = [p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True)]
    print(f" ratio: {statistics.median(ratios):10.3f} (median of pairs; {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
