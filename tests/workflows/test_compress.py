"""A user's own checkpoints and texts: two other architectures, made with plain transformers; text, chats, Parquet."""

import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.stages.prepare.tokenizers import gpt2_like, qwen_like, write_qwen_as_on_the_hub
from tests.workflows import run_command
from tests.workflows.run_command import run

pytestmark = [pytest.mark.quickstart, pytest.mark.timeout(600)]

SCHEMES = [option for scheme in run_command.SCHEMES[:1] for option in ("--schemes", scheme)]
SHORT = (
    *("--training.optimizer-steps", "6", "--training.batch-rows", "4"),
    *("--training.k", "8", "--hardware.cpus-per-worker", "1"),
)
SENTENCES = [f"the {color} {animal} walks {number} miles over the hill and rests" for color in ("red", "gray", "pale")
             for animal in ("fox", "owl", "hen", "dog") for number in range(12)]  # fmt: skip


def save(config: Any, tokenizer: Any, folder: Path, *, dtype: str = "float32") -> Path:
    """Save a fresh model as any user of transformers would."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config

    return save(GPT2Config(n_layer=3, n_embd=64, n_head=4, n_positions=64), gpt2_like(), folder)


def qwen3(folder: Path, *, layers: int) -> Path:
    from transformers import Qwen3Config

    config = Qwen3Config(
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=128, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    save(config, qwen_like(), folder, dtype="bfloat16")  # as checkpoints on the hub are
    write_qwen_as_on_the_hub(folder)
    return folder


def candidates(document: Any) -> dict[str, dict[str, float]]:
    return {candidate["name"]: candidate["metrics"] for candidate in document["candidates"]}


def test_compress_gpt2_on_text_and_parquet_with_fewer_layers(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(0, 60, 2):
        (texts / f"{index}.txt").write_text(". ".join(SENTENCES[index : index + 2]))
    pq.write_table(pa.table({"text": SENTENCES[60:]}), texts / "more.parquet")
    document = run(
        *("run", "compress", "--teacher", str(gpt2(tmp_path / "teacher")), "--documents", str(texts)),
        *("--students", '{"name": "half", "layers": 2}', "--store", str(tmp_path / "store"), *SHORT, *SCHEMES),
        *("--data.sequence-length", "32", "--data.validation-fraction", "0.2", "--data.calibration-fraction", "0.4"),
    )
    assert document["outcome"] == "succeeded"
    found = candidates(document)
    assert {"teacher", "half"} <= set(found)
    assert found["half"]["final/size_bytes"] < found["teacher"]["final/size_bytes"]
    search = run("artifacts", "show", "compress/quantize.half", "--store", str(tmp_path / "store"))
    assert search["metrics"]["trials_failed"] == 1, (
        "llm-compressor does not know GPT-2's Conv1D; that is recorded, not the end"
    )


def test_compress_qwen3_on_chats_with_another_checkpoint_and_its_own_evaluation(tmp_path: Path) -> None:
    chats = [
        json.dumps({"messages": [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text}]})
        for text in SENTENCES
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats[:120]))
    (tmp_path / "held-out.jsonl").write_text("\n".join(chats[120:]))
    small = json.dumps({"name": "small", "checkpoint": str(qwen3(tmp_path / "small", layers=1))})
    document = run(
        *(
            "run",
            "compress",
            "--teacher",
            str(qwen3(tmp_path / "teacher", layers=2)),
            "--store",
            str(tmp_path / "store"),
        ),
        *("--documents", str(tmp_path / "chats.jsonl"), "--evaluation", str(tmp_path / "held-out.jsonl")),
        *("--students", small, *SHORT, *SCHEMES, "--data.calibration-fraction", "0.4"),
    )
    assert document["outcome"] == "succeeded"
    found = candidates(document)
    assert found["small"]["final/kl_to_teacher"] > 0
    assert found["teacher"]["final/agreement"] == 1
    assert found["small"]["final/compression_x"] > 1, "it is stored in 16 bits, as its teacher is"
    quantized = {name: metrics for name, metrics in found.items() if name.startswith("small.int")}
    assert quantized
    assert all(metrics["final/size_bytes"] < found["small"]["final/size_bytes"] for metrics in quantized.values())
    assert "evaluation" in {step["name"] for step in document["steps"]}
    made = run("artifacts", "show", "compress/train.small", "--store", str(tmp_path / "store"))
    shipped = Path(made["load from"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (shipped / name).read_bytes() == (tmp_path / "teacher" / name).read_bytes(), "as it came from the hub"


def test_readme_example_of_compress_plans_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (run_command.ROOT / "README.md").read_text()
    block = next(block for block in readme.split("```") if block.strip().startswith("stillhouse run compress"))
    command = shlex.split(block.replace("\\\n", " "))
    monkeypatch.chdir(tmp_path)
    qwen3(Path("PATH_OR_HUB_ID"), layers=8)
    qwen3(Path("path/or/hub-id"), layers=1)
    Path("texts").mkdir()
    Path("texts/one.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    plan = run("plan", *command[2:], cwd=tmp_path)
    steps = {step["name"]: step["status"] for step in plan["steps"]}
    assert {"train.half", "train.small"} <= steps.keys()
    assert set(steps.values()) == {"MISS"}
