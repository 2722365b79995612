"""What a model's parts do on text, and that a smaller one keeps those that do the most."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, Qwen3Config

from stages.errors import StageFailed
from stages.models.importance import observe_importance
from stages.models.narrowing import Importance, Size, narrow
from tests.stages.tiny import tiny_llama

IDS = torch.arange(64).reshape(4, 16)
ALL = torch.ones_like(IDS, dtype=torch.bool)


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        return tiny_llama(layers=4)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config: Any = Qwen3Config(vocab_size=96, intermediate_size=64, head_dim=8, **shape)
    if family == "gpt2":
        config = GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=32, n_inner=64)
    return AutoModelForCausalLM.from_config(config).eval()


def important(model: Any) -> Importance:
    return observe_importance(model, [({"input_ids": IDS[:2]}, ALL[:2]), ({"input_ids": IDS[2:]}, ALL[2:])])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_narrow_by_importance_without_what_does_nothing_changes_nothing(family: str) -> None:
    """Neurons that put out nothing, heads that hear nothing, a layer that adds nothing: the leading ones, so that a
    choice by place would keep them."""
    model = model_of(family)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:32] = 0
            layer.self_attn.v_proj.weight[:8] = 0  # the key-value head of heads 0 and 1
        silent = model.model.layers[1]
        silent.self_attn.o_proj.weight.zero_()
        silent.mlp.down_proj.weight.zero_()
    for size in (Size(ffn_width=32), Size(heads=2), Size(layers=3), Size(layers=3, heads=2, ffn_width=32)):
        smaller = narrow(model, size, seed=0, importance=important(model))
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(logits(smaller), logits(model))
        assert not torch.allclose(logits(narrow(model, size, seed=0)), logits(model)) or size == Size(layers=3)


def test_narrow_by_importance_of_gpt2_keeps_the_neurons_that_put_out_something() -> None:
    model = model_of("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight[:, :32] = 0
            block.mlp.c_fc.bias[:32] = 0
    smaller = narrow(model, Size(ffn_width=32), seed=0, importance=important(model))
    assert smaller.config.n_inner == 32
    torch.testing.assert_close(logits(smaller), logits(model))


def test_importance_of_channels_is_their_size_after_the_norms() -> None:
    model = model_of("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight[[3, 17]] = 9.0
    assert set(important(model).channels_D.topk(2).indices.tolist()) == {3, 17}
    smaller = narrow(model, Size(width=16), seed=0, importance=important(model))
    assert (smaller.model.norm.weight == 9).sum() == 2


def test_importance_counts_no_padding_and_leaves_the_model_as_it_was() -> None:
    model = model_of("llama")
    padded = torch.nn.functional.pad(IDS, (0, 8), value=1)
    valid = torch.nn.functional.pad(ALL, (0, 8), value=False)
    for found, expected in zip(
        vars_of(observe_importance(model, [({"input_ids": padded}, valid)])), vars_of(important(model)), strict=True
    ):
        torch.testing.assert_close(found, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def vars_of(importance: Importance) -> list[torch.Tensor | None]:
    return [importance.layers_L, importance.heads_LH, importance.channels_D, importance.neurons_LF]


def test_block_influence_is_one_less_the_cosine_of_what_goes_in_and_out() -> None:
    model = model_of("llama")
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    cosine = torch.nn.functional.cosine_similarity(states[1].double(), states[2].double(), dim=-1)
    expected = (1 - cosine).mean(1).square().sum().sqrt()
    torch.testing.assert_close(important(model).layers_L[1].double(), expected)


def test_narrow_to_named_layers_keeps_them_in_order() -> None:
    model = model_of("llama")
    smaller = narrow(model, Size(layers=(0, 2, 3)), seed=0, importance=important(model))
    for new, old in enumerate((0, 2, 3)):
        found, origin = (m.model.layers[at].mlp.up_proj.weight for m, at in ((smaller, new), (model, old)))
        assert torch.equal(found, origin)


@pytest.mark.parametrize("layers", [(0, 4), (2, 1), (0, 0), ()], ids=["beyond", "backwards", "twice", "none"])
def test_narrow_to_layers_that_cannot_be_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(StageFailed, match="expected ascending layers of 0 to 3"):
        narrow(model_of("llama"), Size(layers=layers), seed=0)


def test_narrow_of_a_family_without_attention_takes_layers_alone() -> None:
    config = MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=3, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert narrow(model, Size(layers=2), seed=0).config.num_hidden_layers == 2
    for size in (Size(heads=1), Size(width=8)):
        with pytest.raises(StageFailed, match="MambaConfig names none; take fewer layers only"):
            narrow(model, size, seed=0)
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight.zero_()
    smaller = narrow(model, Size(layers=2), seed=0, importance=important(model))
    torch.testing.assert_close(logits(smaller), logits(model))
