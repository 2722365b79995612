"""Who serves what, by rule: against what the real vLLM 0.32 on a CPU was seen to do, and against its sources."""

import pytest

from stages.models.serving import RUNTIMES, describe, is_served, served_by

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    **{"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 32},
}


def weights(num_bits: int, group_size: int | None = None, **changes) -> dict:
    strategy = "group" if group_size else "channel"
    return {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
    } | changes


def by_token(num_bits: int, kind: str) -> dict:
    return {"num_bits": num_bits, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def quantized(stored: str, weights: dict, inputs: dict | None = None, **changes) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": stored}
    quantization = {"quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": group}}
    return LLAMA | {"quantization_config": quantization | changes}


FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
NVFP4 = FP4 | {"strategy": "tensor_group", "group_size": 16}
MXFP4 = FP4 | {"strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
SEEN = {
    "W4A16 channel": (quantized("pack-quantized", weights(4)), "served"),
    "W4A16 g128": (quantized("pack-quantized", weights(4, 128)), "served"),
    "W4A16 g32 asymmetric": (quantized("pack-quantized", weights(4, 32, symmetric=False)), "served"),
    "W8A8": (quantized("int-quantized", weights(8), by_token(8, "int")), "served"),
    "FP8 dynamic": (quantized("float-quantized", FP8, by_token(8, "float")), "served"),
    "W8A16": (quantized("pack-quantized", weights(8)), "refused"),
    "int3 g64": (quantized("pack-quantized", weights(3, 64)), "refused"),
    "int3 g32 asymmetric": (quantized("pack-quantized", weights(3, 32, symmetric=False)), "refused"),
    "int2 g64": (quantized("pack-quantized", weights(2, 64)), "refused"),
    "NVFP4": (quantized("nvfp4-pack-quantized", NVFP4, NVFP4 | {"dynamic": "local"}), "refused"),
    "NVFP4A16": (quantized("nvfp4-pack-quantized", NVFP4), "refused"),
    "MXFP4": (quantized("mxfp4-pack-quantized", MXFP4), "refused"),
}
"""What vLLM 0.32 on a CPU did with llm-compressor's checkpoints of a model of 128 channels."""


@pytest.mark.parametrize("name", SEEN)
def test_rule_for_vllm_on_a_cpu_says_what_was_seen(name):
    config, answer = SEEN[name]
    found = served_by(config)["vllm-cpu"]
    assert (found.answer, found.seen) == (answer, True)
    assert "vLLM 0.32, model_executor/" in found.source


@pytest.mark.parametrize("name", SEEN)
def test_every_format_is_served_by_rule_on_cuda_and_unpacked_by_transformers(name):
    found = served_by(SEEN[name][0])
    assert (found["vllm-cuda"].answer, found["vllm-cuda"].seen) == ("served", False)
    assert found["transformers"].answer == "served"
    assert found["torchao"].answer == "refused"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (quantized("pack-quantized", weights(4, 128, actorder="group")), "actorder='group'"),
        (quantized("int-quantized", weights(8)), "must be packed"),
        (
            quantized("int-quantized", weights(8, symmetric=False), by_token(8, "int")),
            "expected 8-bit weights, symmetric",
        ),
        (quantized("int-quantized", weights(8, 64), by_token(8, "int")), "expected 8-bit weights, symmetric"),
        (quantized("pack-quantized", weights(4), kv_cache_scheme={"num_bits": 8, "type": "int"}), "only 8-bit floats"),
        (quantized("pack-quantized", weights(4), sparsity_config={"targets": ["Linear"]}), "sparse"),
        (LLAMA | {"quantization_config": {"quant_method": "hqq"}}, "no quantization method there"),
    ],
)
def test_what_vllm_does_not_read_is_refused_on_every_device(config, reason):
    for runtime in ("vllm-cpu", "vllm-cuda"):
        found = served_by(config)[runtime]
        assert found.answer == "refused"
        assert reason in found.reason


def test_layers_that_vllm_fuses_are_refused_where_their_bits_differ():
    config = quantized("pack-quantized", weights(4, 32))
    groups = config["quantization_config"]["config_groups"]
    layer = "model.layers.0.self_attn"
    groups["group_1"] = groups["group_0"] | {"targets": [f"{layer}.q_proj"], "weights": weights(4, 64)}
    found = served_by(config)["vllm-cuda"]
    assert found.answer == "refused"
    assert f"{layer}.q_proj and {layer}.k_proj and {layer}.v_proj are computed as one" in found.reason
    groups["group_1"]["targets"] = [f"{layer}.{name}_proj" for name in "qkv"]
    assert served_by(config)["vllm-cuda"].answer == "served"


def test_worst_group_of_a_checkpoint_decides():
    config = quantized("pack-quantized", weights(4, 32))
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"targets": ["model.layers.0.mlp.down_proj"], "weights": weights(8)}
    assert served_by(config)["vllm-cpu"].answer == "refused"
    assert served_by(config)["vllm-cuda"].answer == "served"


def test_widths_that_the_cpu_kernel_does_not_take_are_refused():
    config = quantized("pack-quantized", weights(4)) | {"intermediate_size": 200}
    found = served_by(config)["vllm-cpu"]
    assert found.answer == "refused"
    assert "intermediate_size=200" in found.reason


def test_plain_checkpoint_is_served_and_a_head_size_without_a_kernel_refused():
    assert is_served(LLAMA, "vllm").answer == "served"
    found = served_by(LLAMA | {"head_dim": 40})["vllm-cpu"]
    assert (found.answer, found.seen) == ("refused", True)
    assert served_by(LLAMA | {"head_dim": 40})["vllm-cuda"].answer == "served"
    assert served_by(LLAMA | {"head_dim": 48})["vllm-cpu"].answer == "served"


def test_what_no_rule_covers_is_unknown():
    assert served_by({"architectures": ["NewForCausalLM"]})["vllm-cuda"].answer == "unknown"
    assert served_by(LLAMA | {"quantization_config": {"quant_method": "gptq"}})["vllm-cuda"].answer == "unknown"
    assert served_by(LLAMA | {"quantization_config": {"quant_method": "gptq"}})["transformers"].answer == "unknown"
    rotated = quantized("pack-quantized", weights(4), transform_config={"config_groups": {"R3": {}}})
    assert served_by(rotated)["vllm-cuda"].answer == "unknown"


def test_vllm_without_a_device_is_the_worse_of_its_devices():
    found = is_served(SEEN["int3 g64"][0], "vllm")
    assert found.answer == "refused"
    assert found.reason.startswith("on cpu: ")


def test_answers_are_described_in_short():
    assert list(served_by(LLAMA)) == list(RUNTIMES)
    assert describe(served_by(LLAMA)) == "vllm, transformers"
    assert describe(served_by(SEEN["NVFP4"][0])) == "vllm-cuda, transformers"
    assert describe(served_by(LLAMA | {"quantization_config": {"quant_method": "torchao"}})) == "torchao"


def test_multimodal_checkpoint_is_read_by_its_text_model():
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": 128, "head_dim": 40}}
    assert served_by(nested)["vllm-cpu"].answer == "refused"
