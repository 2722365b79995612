"""Writes a tiny Llama and its quantized versions, as a user's llm-compressor would; a process of its own, since
`oneshot` keeps a session for all of a process. Usage: python -m tests.stages.measure.quantize_tiny FOLDER."""

import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import LlamaConfig, LlamaForCausalLM

VERSIONS = {"int4-g128": (4, 128), "int4-g32": (4, 32), "int3-g32": (3, 32)}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    model.save_pretrained(folder / "plain" / "model")
    for name, (num_bits, group_size) in VERSIONS.items():
        quantized = LlamaForCausalLM.from_pretrained(folder / "plain" / "model", dtype="bfloat16")
        weights = QuantizationArgs(
            num_bits=num_bits, type="int", symmetric=True, strategy="group", group_size=group_size
        )
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        recipe = [QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
        oneshot(model=quantized, recipe=recipe, processor=object(), pipeline="datafree")
        quantized.save_pretrained(folder / name / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
