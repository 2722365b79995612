"""Students: fresh, smaller in each family with the teacher's weights, or a checkpoint as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config, Qwen2Config, Qwen3Config

from stages.errors import StageFailed
from stages.formats.dataset import DatasetInfo
from stages.models.narrowing import Size, evenly_spaced, narrow
from stages.train.students import Continue, Llama, Smaller, build_student
from tests.stages.tiny import dataset_info, tiny_llama, write_dataset, write_model

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
DATASET = dataset_info()


def _model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "llama":
        return tiny_llama(layers=4)
    if family == "gpt2":
        config: Any = GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=32)
    else:
        kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "phi3": Phi3Config}[family]
        config = kind(**SHAPE, **({"head_dim": 8} if family == "qwen3" else {}))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "phi3"])
@pytest.mark.parametrize(
    "size", [Size(layers=2), Size(width=16), Size(layers=3, heads=2, width=16)], ids=["layers", "width", "all"]
)
def test_narrow_in_each_family_takes_the_teachers_weights(family: str, size: Size) -> None:
    teacher = _model(family)
    student = narrow(teacher, size, seed=0)
    layers = list(evenly_spaced(4, size.layers or 4))
    assert student.config.num_hidden_layers == len(layers)
    assert len(getattr(student.config, "layer_types", None) or layers) == len(layers)
    assert student.config.hidden_size == (size.width or 32)
    first = next(name for name in student.state_dict() if "embed_tokens" in name or "wte" in name)
    width = size.width or 32
    assert torch.equal(student.state_dict()[first], teacher.state_dict()[first][:, :width])
    inner = "mlp.c_fc.weight" if family == "gpt2" else "mlp.down_proj.weight"
    prefix = "transformer.h" if family == "gpt2" else "model.layers"
    for new, old in enumerate(layers):
        found, origin = student.state_dict()[f"{prefix}.{new}.{inner}"], teacher.state_dict()[f"{prefix}.{old}.{inner}"]
        assert torch.equal(found, origin[: found.shape[0], : found.shape[1]])
    logits = student(input_ids=torch.randint(0, 96, (2, 8))).logits
    assert logits.shape == (2, 8, 96)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_narrow_to_the_heads_that_are_heard_changes_nothing(family: str) -> None:
    teacher = _model(family)
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight[:, 16:] = 0  # the output of heads 2 and 3 is not heard
    student = narrow(teacher, Size(heads=2), seed=0)
    ids = torch.randint(0, 96, (2, 8))
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
def test_narrow_to_fewer_heads_without_a_head_size_of_its_own_narrows_the_width(family: str) -> None:
    assert narrow(_model(family), Size(heads=2), seed=0).config.hidden_size == 16


def test_narrow_of_fused_gpt2_attention_cuts_queries_keys_and_values_each() -> None:
    teacher = _model("gpt2")
    student = narrow(teacher, Size(width=16), seed=0)
    old, new = (m.state_dict()["transformer.h.0.attn.c_attn.weight"] for m in (teacher, student))
    for part in range(3):
        assert torch.equal(new[:, part * 16 : (part + 1) * 16], old[:16, part * 32 : part * 32 + 16])


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("llama", Size(layers=5), "layers is 5, expected at most the origin's 4"),
        ("llama", Size(heads=8), "heads is 8, expected at most"),
        ("llama", Size(width=64), "width is 64, expected at most"),
        ("llama", Size(heads=3), "3 heads, expected a multiple of 2"),
        ("llama", Size(width=15), "use a multiple of 8"),
        ("gpt2", Size(width=16, heads=3), "width is heads × 8: set width to 24"),
    ],
)
def test_narrow_to_what_does_not_fit_is_refused(family: str, size: Size, message: str) -> None:
    with pytest.raises(StageFailed, match=message):
        narrow(_model(family), size, seed=0)


def test_narrow_of_an_unknown_layout_is_refused_unless_only_layers_go() -> None:
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    teacher = AutoModelForCausalLM.from_config(config)
    assert narrow(teacher, Size(layers=2), seed=0).config.num_hidden_layers == 2
    with pytest.raises(StageFailed, match=r"do not know how to cut .* take fewer layers only"):
        narrow(teacher, Size(width=16), seed=0)


@pytest.mark.parametrize(
    ("total", "kept", "expected"), [(12, 4, (0, 4, 7, 11)), (4, 1, (0,)), (5, 5, (0, 1, 2, 3, 4)), (6, 2, (0, 5))]
)
def test_evenly_spaced_keeps_the_first_and_the_last(total: int, kept: int, expected: tuple[int, ...]) -> None:
    assert evenly_spaced(total, kept) == expected


def test_build_student_fresh_follows_the_dataset_and_its_seed() -> None:
    recipe = Llama(layers=2, width=32, heads=4, kv_heads=2)
    first, same, other = (build_student(recipe, DATASET, origin=None, seed=seed) for seed in (0, 0, 1))
    assert (first.config.vocab_size, first.config.max_position_embeddings, first.config.intermediate_size) == (
        96,
        16,
        96,
    )
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight
    states = [model.state_dict()["model.layers.0.mlp.up_proj.weight"] for model in (first, same, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_build_student_continuing_has_the_checkpoints_weights(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    model = tiny_llama()
    origin = write_model(tmp_path / "model", model, tmp_path / "data" / "tokenizer").folder("model")
    student = build_student(Continue(), DatasetInfo.read(data), origin=origin, seed=0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vocabulary_size": 97},
            "the vocabulary of the student's checkpoint has 96 entries, expected at least the dataset's 97",
        ),
        ({"tokenizer_digest": "0" * 64}, "has another tokenizer"),
        ({"sequence_length": 65}, "checkpoint is 64 tokens, expected at least the 65"),
    ],
)
def test_build_student_from_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = write_dataset(tmp_path / "data")
    origin = write_model(tmp_path / "model", tiny_llama(), tmp_path / "data" / "tokenizer").folder("model")
    with pytest.raises(StageFailed, match=message):
        build_student(Continue(), DatasetInfo.read(data).model_copy(update=change), origin=origin, seed=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Llama(layers=1, width=30, heads=4), "no even whole number"),
        (lambda: Llama(layers=1, width=32, heads=4, kv_heads=3), "expected a divisor of heads"),
        (lambda: Smaller(), "none of layers, heads, width and ffn_width"),
    ],
    ids=["width", "kv_heads", "smaller"],
)
def test_students_that_make_no_sense_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_fresh_student_whose_padding_is_its_end_of_text_learns_it() -> None:
    """transformers keeps a padding token's embedding at zero; end of text is what divides the documents."""
    shape = Llama(layers=1, width=16, heads=2, tie_embeddings=False)
    model = build_student(shape, DATASET, origin=None, seed=0)
    embedding = model.get_input_embeddings()
    assert embedding.weight[DATASET.eos_token_id].norm() > 0
    model(input_ids=torch.tensor([[1, 2, 1, 3]])).logits.square().sum().backward()
    assert embedding.weight.grad[DATASET.eos_token_id].norm() > 0
    padded = build_student(shape, dataset_info(pad_token_id=7), origin=None, seed=0)
    assert padded.config.pad_token_id == 7
