"""The local engine: signals of whole shards' worth of tokens are those of the whole model's logits.

That every architecture's are is in `tests/stages/models/test_heads.py`.
"""

import pytest
import torch

from stages.teach.capture import capture
from stages.teach.engines.local import HEAD_TOKENS, LocalTeacher
from tests.stages.tiny import tiny_llama


def test_local_teacher_over_several_products_with_the_head_equals_its_own_logits() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 90, (HEAD_TOKENS // 12 + 3, 12))
    found = LocalTeacher(model, vocabulary=90, k=6, temperatures=(1.0, 2.0)).signals(
        ids, torch.arange(12).expand_as(ids)
    )
    with torch.inference_mode():
        expected = capture(model(input_ids=ids).logits.flatten(0, 1)[:, :90], 6, (1.0, 2.0))
    assert torch.equal(found.ids_NK, expected.ids_NK)
    torch.testing.assert_close(found.log_probs_NK, expected.log_probs_NK, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.log_partitions_NC, expected.log_partitions_NC, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_local_teacher_on_a_gpu_equals_the_cpu() -> None:
    ids = torch.randint(0, 96, (5, 12))
    cpu = LocalTeacher(tiny_llama(), vocabulary=96, k=6, temperatures=(1.0, 2.0)).signals(
        ids, torch.arange(12).expand_as(ids)
    )
    gpu = LocalTeacher(tiny_llama().cuda(), vocabulary=96, k=6, temperatures=(1.0, 2.0)).signals(
        ids, torch.arange(12).expand_as(ids)
    )
    torch.testing.assert_close(gpu.log_partitions_NC, cpu.log_partitions_NC, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gpu.tail_log_mass_N, cpu.tail_log_mass_N, rtol=1e-3, atol=1e-3)
