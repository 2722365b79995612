"""The output layer of different families, and the parts of the scoring that need no Ray."""

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from stages.errors import StageFailed
from stages.evaluate.scoring import (
    DocumentSums,
    Head,
    hidden_states,
    kept_from,
    kept_to,
    output_layer,
    store_head,
    stored_head,
)

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 1.0,
    "pad_token_id": 0,
}
FAMILIES = {
    "gemma2 with a soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=3.0)),
    "granite with a divisor": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)),
    "cohere with a factor": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_layer_gives_the_models_own_logits_also_once_stored(family, dtype):
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).eval()
    input_ids = torch.randint(0, 40, (2, 9))
    with torch.inference_mode():
        expected = model(input_ids=input_ids).logits.flatten(0, 1)
        states = hidden_states(model, input_ids).flatten(0, 1)
        head = output_layer(model)
        torch.testing.assert_close(head.logits(states), expected)
        again = stored_head(store_head(head), dtype, "cpu")
        torch.testing.assert_close(again.logits(kept_to(kept_from(states), dtype)), expected)


def test_output_layer_of_a_model_that_does_more_to_its_logits_is_refused():
    torch.manual_seed(0)
    model = FAMILIES["cohere with a factor"]().eval()
    model.config.logit_scale = 1.0  # the model itself goes on to multiply by 0.25
    with pytest.raises(StageFailed, match="CohereForCausalLM does something to its logits"):
        output_layer(model)


def test_log_probs_of_padded_words_are_cut_before_the_normalization():
    head = Head(lambda states: states)
    log_probs = head.log_probs(torch.tensor([[0.0, 0.0, 50.0]], dtype=torch.bfloat16), 2)
    torch.testing.assert_close(log_probs, torch.full((1, 2), 0.5).log())


def test_document_sums_add_up_over_batches():
    sums = DocumentSums()
    sums.add(np.array([9, 4, 9]), {"tokens": np.ones(3), "nll": np.array([1.0, 2.0, 3.0])})
    sums.add(np.array([4]), {"tokens": np.ones(1), "nll": np.array([0.5])})
    arrays = sums.arrays()
    assert arrays["document_id"].tolist() == [4, 9]
    assert arrays["tokens"].tolist() == [2, 2]
    assert arrays["nll"].tolist() == [2.5, 4.0]
