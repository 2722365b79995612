"""One rule for the output head, for teachers, quantized models and candidates of any architecture."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    ElectraConfig,
    ElectraForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RemBertConfig,
    RemBertForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
)

from stages.errors import OutOfMemory
from stages.evaluate.scoring import DocumentSums, Reference, score_batches
from stages.formats.tokens import TokenRows, predicts
from stages.models.heads import Head, PackedTensor, log_prob_chunks, observe_head
from stages.ops.divergences import kl_divergence
from stages.quantize.fidelity import measure_fidelity, predict
from stages.teach.capture import capture
from stages.teach.engines.local import LocalTeacher

VOCABULARY = 40
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 1.0, "pad_token_id": 0,
}  # fmt: skip


class ClampedLlama(LlamaForCausalLM):
    """Does something to its logits that is not known here."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits.clamp(max=1.0)
        return output


class BiasedLlama(LlamaForCausalLM):
    """Has a bias in its head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = torch.nn.Linear(16, config.vocab_size)
        torch.nn.init.normal_(self.lm_head.bias)


BERT = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")} | {
    "num_attention_heads": 2, "is_decoder": True, "initializer_range": 1.0,
}  # fmt: skip
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
BART = {"vocab_size": VOCABULARY, "d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 32, "pad_token_id": 0}


def opt() -> Any:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=16, max_position_embeddings=16))


def gated_head() -> Any:
    """A model whose head is no plain linear map."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.SiLU())
    return model


FAMILIES: dict[str, tuple[Callable[[], Any], bool]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)), True),
    "llama with tied embeddings": (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)), True),
    "llama with a padded head": (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 64})), True),
    "llama with a bias": (lambda: BiasedLlama(LlamaConfig(**SHAPE)), True),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)), True),
    "gemma2 with a soft cap": (lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=3.0)), True),
    "granite with a divisor": (lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=6.0)), True),
    "cohere with a factor": (lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)), True),
    # Their own forward calls a part of the backbone, so that a hook on the backbone sees nothing.
    "opt": (opt, True),
    "bart's decoder": (lambda: BartForCausalLM(BartConfig(**BART, decoder_attention_heads=2)), True),
    # What lies between backbone and head: a projection to another width.
    "electra": (lambda: ElectraForCausalLM(ElectraConfig(**BERT, embedding_size=8)), False),
    "roformer": (lambda: RoFormerForCausalLM(RoFormerConfig(**BERT, embedding_size=8)), False),
    "rembert": (
        lambda: RemBertForCausalLM(RemBertConfig(**BERT, input_embedding_size=8, output_embedding_size=24)),
        False,
    ),
    "clamped logits": (lambda: ClampedLlama(LlamaConfig(**SHAPE)), False),
    "no linear head": (gated_head, False),
}


def build(family: str, dtype: torch.dtype, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return FAMILIES[family][0]().to(dtype).eval()


def places(ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the positions of rows that are one segment each."""
    return torch.arange(ids_BT.shape[1]).expand_as(ids_BT)


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_any_family_gives_the_models_own_logits_bit_for_bit_also_in_another_process(
    family: str, dtype: torch.dtype, ids_BT: torch.Tensor
) -> None:
    model = build(family, dtype)
    with torch.inference_mode():
        expected_NV = model(input_ids=ids_BT).logits.flatten(0, 1)
        head = observe_head(model, ids_BT, expected_NV.shape[1])
        states_NX = head.states(model, ids_BT, places(ids_BT))
        assert head.is_replayed is FAMILIES[family][1]
        assert torch.equal(head.observed_logits(states_NX), expected_NV)
        logits_NV = head.logits(states_NX)
        assert logits_NV.dtype == torch.float32
        if dtype == torch.float32 or not head.is_replayed:
            assert torch.equal(logits_NV, expected_NV.float())
        again = head.pack().unpack("cpu")
        assert torch.equal(again.logits(PackedTensor.of(states_NX).tensor("cpu")), logits_NV)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [family for family, (_, is_replayed) in FAMILIES.items() if is_replayed])
def test_head_of_a_half_type_gives_logits_that_are_not_rounded_to_it(
    family: str, dtype: torch.dtype, ids_BT: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, dtype)
    monkeypatch.setattr("stages.models.heads.UPCAST_BYTES", 4 * 16 * 7)  # 7 entries of the vocabulary at a time
    with torch.inference_mode():
        rounded_NV = model(input_ids=ids_BT).logits.flatten(0, 1)
        head = observe_head(model, ids_BT, VOCABULARY)
        states_NX = head.states(model, ids_BT, places(ids_BT))
        assert head.weight_VD is not None
        exact_NV = states_NX.double() @ head.weight_VD.double().t() + (0 if head.bias_V is None else head.bias_V)
        exact_NV = exact_NV * head.scale / head.divisor
        exact_NV = exact_NV if head.softcap is None else head.softcap * (exact_NV / head.softcap).tanh()
        out_NV = torch.empty(len(states_NX), VOCABULARY)
        for logits_NV in (head.logits(states_NX), head.logits(states_NX, out_NV)):
            torch.testing.assert_close(logits_NV.double(), exact_NV, rtol=1e-5, atol=1e-5)
    assert (rounded_NV[:, :VOCABULARY].double() - exact_NV).abs().max() > 5 * (logits_NV - exact_NV).abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_head_of_a_half_type_on_a_gpu_gives_logits_that_are_not_rounded_to_it(ids_BT: torch.Tensor) -> None:
    model = build("llama", torch.bfloat16).to("cuda")
    with torch.inference_mode():
        head = observe_head(model, ids_BT.cuda(), VOCABULARY)
        states_NX = head.states(model, ids_BT.cuda(), places(ids_BT).cuda())
        out_NV = torch.empty(ids_BT.numel(), VOCABULARY, device="cuda")
        assert head.weight_VD is not None
        exact_NV = states_NX.double() @ head.weight_VD.double().t()
        for logits_NV in (head.logits(states_NX), head.logits(states_NX, out_NV)):
            torch.testing.assert_close(logits_NV.double(), exact_NV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_teach_quantize_and_evaluate_agree_with_the_models_own_logits(
    family: str, dtype: torch.dtype, ids_BT: torch.Tensor
) -> None:
    model, other = build(family, dtype), build(family, dtype, seed=1)
    mask_BT = np.random.default_rng(0).random(ids_BT.shape) < 0.8
    mask_BT[:, 0] = False
    predicts_BT = predicts(mask_BT)
    with torch.inference_mode():
        logits_NV, other_NV = (m(input_ids=ids_BT).logits.flatten(0, 1)[:, :VOCABULARY] for m in (model, other))
    log_p_NV, log_q_NV = (each.float()[predicts_BT.ravel()].log_softmax(-1) for each in (logits_NV, other_NV))
    expected_kl = float(kl_divergence(log_p_NV, log_q_NV).mean())
    # Products of other shapes round differently: by a unit in the last place of a logit, or two.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}

    taught = LocalTeacher(model, vocabulary=VOCABULARY, k=6, temperatures=(1.0, 2.0)).signals(ids_BT, places(ids_BT))
    captured = capture(logits_NV, 6, (1.0, 2.0))
    torch.testing.assert_close(taught.log_partitions_NC, captured.log_partitions_NC, **tolerance)
    torch.testing.assert_close(taught.tail_log_mass_N, captured.tail_log_mass_N, **tolerance)

    ids, owners, positions = ids_BT.numpy().astype(np.int32), np.zeros(ids_BT.shape, np.int64), places(ids_BT).numpy()
    rows = TokenRows(ids, owners, mask_BT, positions)
    base = predict(model, rows, vocabulary_size=VOCABULARY, micro_batch=2, device="cpu")
    found = measure_fidelity(other, base, micro_batch=3, device="cpu")
    assert found.kl == pytest.approx(expected_kl, rel=tolerance["rtol"])
    assert found.num_tokens == mask_BT.sum()

    batches = [rows]
    sums, head = DocumentSums(), observe_head(model, ids_BT, VOCABULARY)
    (states_NX,) = score_batches(model, head, batches, references={}, sums=sums, name="model")
    nll = -log_p_NV.gather(1, ids_BT[:, 1:][torch.from_numpy(mask_BT[:, 1:])][:, None]).sum()
    assert sums.arrays()["nll"][0] == pytest.approx(float(nll), rel=tolerance["rtol"])
    reference = Reference(head.pack().unpack("cpu"), iter([states_NX]))
    head = observe_head(other, ids_BT, VOCABULARY)
    sums = DocumentSums()
    list(score_batches(other, head, batches, references={"model": reference}, sums=sums, name="other"))
    assert sums.arrays()["kl/model"][0] / mask_BT.sum() == pytest.approx(expected_kl, rel=tolerance["rtol"])


@pytest.mark.parametrize("family", [(MambaForCausalLM, MambaConfig), (FalconMambaForCausalLM, FalconMambaConfig)])
def test_head_after_a_residual_stream_in_another_dtype_is_not_replayed(family: Any, ids_BT: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = family[0](family[1](**MAMBA)).to(torch.bfloat16).eval()
    head = observe_head(model, ids_BT, VOCABULARY)
    assert not head.is_replayed
    with torch.inference_mode():
        assert torch.equal(
            head.logits(head.states(model, ids_BT, places(ids_BT))), model(input_ids=ids_BT).logits.flatten(0, 1)
        )


def test_head_whose_backbone_has_no_memory_left_is_an_error_not_whole_logits(ids_BT: torch.Tensor) -> None:
    model = build("llama", torch.float32)
    calls = iter([None, torch.OutOfMemoryError("CUDA out of memory")])

    def refuse(*_: Any) -> None:
        if error := next(calls):
            raise error

    model.base_model.register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory, match="observing the output head of LlamaForCausalLM"):
        observe_head(model, ids_BT, VOCABULARY)


def test_states_of_a_padded_head_that_is_not_replayed_are_no_copy(ids_BT: torch.Tensor) -> None:
    model = build("no linear head", torch.float32)
    with torch.inference_mode():
        states_NX = observe_head(model, ids_BT, VOCABULARY - 8).states(model, ids_BT, places(ids_BT))
    assert states_NX.shape == (ids_BT.numel(), VOCABULARY - 8)
    assert states_NX.stride(0) == VOCABULARY


def test_hidden_states_are_the_models_own_whether_the_head_is_replayed_or_not(ids_BT: torch.Tensor) -> None:
    for family in ("llama", "no linear head"):
        model = build(family, torch.float32)
        with torch.inference_mode():
            expected = model(input_ids=ids_BT, output_hidden_states=True).hidden_states
            _, found = observe_head(model, ids_BT, VOCABULARY).run(model, ids_BT, places(ids_BT), hidden_states=True)
        assert len(found) == len(expected) == 2
        assert all(torch.equal(a_ND, b_BTD.flatten(0, 1)) for a_ND, b_BTD in zip(found, expected, strict=True))


def test_head_whose_config_says_another_factor_is_not_replayed(ids_BT: torch.Tensor) -> None:
    model = build("cohere with a factor", torch.float32)
    model.config.logit_scale = 1.0  # the model itself goes on to multiply by 0.3
    head = observe_head(model, ids_BT, VOCABULARY)
    assert not head.is_replayed
    with torch.inference_mode():
        assert torch.equal(head.states(model, ids_BT, places(ids_BT)), model(input_ids=ids_BT).logits.flatten(0, 1))


def test_head_with_a_soft_cap_far_above_its_logits_is_still_told_from_none(ids_BT: torch.Tensor) -> None:
    model = build("gemma2 with a soft cap", torch.bfloat16)
    model.config.final_logit_softcapping = None
    with torch.inference_mode():
        largest = float(model(input_ids=ids_BT).logits.abs().max())
    model.config.final_logit_softcapping = 8 * largest
    head = observe_head(model, ids_BT, VOCABULARY)
    assert head.softcap == 8 * largest
    uncapped = Head(VOCABULARY, head.weight_VD)
    with torch.inference_mode():
        states_NX = head.states(model, ids_BT, places(ids_BT))
        assert not torch.equal(uncapped.logits(states_NX), model(input_ids=ids_BT).logits.flatten(0, 1))


def test_log_probs_of_padded_entries_are_cut_before_the_normalization(ids_BT: torch.Tensor) -> None:
    model = build("llama with a padded head", torch.float32)
    head = observe_head(model, ids_BT, VOCABULARY)
    with torch.inference_mode():
        expected_NV = model(input_ids=ids_BT).logits.flatten(0, 1)[:, :VOCABULARY].log_softmax(-1)
        torch.testing.assert_close(head.log_probs(head.states(model, ids_BT, places(ids_BT))), expected_NV)


def test_log_prob_chunks_cover_every_position_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.models.heads.CHUNK_BYTES", 4 * 6 * 5 * 3)
    monkeypatch.setattr("stages.models.heads.MIN_CHUNK_POSITIONS", 1)
    states_NX = torch.randn(8, 5)
    chunks = list(log_prob_chunks((Head(5), states_NX), (Head(5), -states_NX)))
    assert [len(p) for _, (p, _) in chunks] == [3, 3, 2]
    torch.testing.assert_close(torch.cat([p for _, (p, _) in chunks]), states_NX.log_softmax(-1))
    torch.testing.assert_close(torch.cat([q for _, (_, q) in chunks]), (-states_NX).log_softmax(-1))


def test_log_prob_chunks_are_smaller_for_more_models_but_not_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    one = (Head(5), torch.randn(900, 5))
    sizes = []
    for num_models, memory in ((1, 600), (4, 600), (4, 1)):
        monkeypatch.setattr("stages.models.heads.CHUNK_BYTES", 4 * 5 * 5 * memory)
        sizes.append(len(next(log_prob_chunks(*[one] * num_models))[1][0]))
    assert sizes == [600, 375, 256]
