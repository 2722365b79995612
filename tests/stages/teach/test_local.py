"""The local engine: its short way is taken exactly where it gives what the whole model gives."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from stages.teach.capture import capture
from stages.teach.engines.local import LocalTeacher, has_plain_head
from tests.stages.tiny import tiny_llama


def _gemma() -> object:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, final_logit_softcapping=5.0, initializer_range=0.5,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def _gpt2() -> object:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).eval()


@pytest.mark.parametrize(
    ("build", "plain"), [(tiny_llama, True), (_gpt2, True), (_gemma, False)], ids=["llama", "gpt2", "gemma2"]
)
def test_local_teacher_of_any_family_equals_its_own_logits(build: object, plain: bool) -> None:
    model = build()  # type: ignore[operator]
    ids = torch.randint(0, 90, (5, 12))
    assert has_plain_head(model, ids) is plain
    found = LocalTeacher(model, vocabulary=90, k=6, temperatures=(1.0, 2.0)).signals(ids)
    with torch.inference_mode():
        expected = capture(model(input_ids=ids).logits.flatten(0, 1)[:, :90], 6, (1.0, 2.0))
    assert torch.equal(found.ids_NK, expected.ids_NK)
    torch.testing.assert_close(found.log_probs_NK, expected.log_probs_NK, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.log_partitions_NC, expected.log_partitions_NC, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_local_teacher_on_a_gpu_equals_the_cpu() -> None:
    ids = torch.randint(0, 96, (5, 12))
    cpu = LocalTeacher(tiny_llama(), vocabulary=96, k=6, temperatures=(1.0, 2.0)).signals(ids)
    gpu = LocalTeacher(tiny_llama().cuda(), vocabulary=96, k=6, temperatures=(1.0, 2.0)).signals(ids)
    torch.testing.assert_close(gpu.log_partitions_NC, cpu.log_partitions_NC, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gpu.tail_log_mass_N, cpu.tail_log_mass_N, rtol=1e-3, atol=1e-3)
