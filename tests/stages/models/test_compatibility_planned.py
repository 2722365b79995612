"""What planning refuses of teachers, students and texts, from the files alone; and which tokenizers are the same."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import Gemma3Config, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from stages.errors import ConfigError
from stages.evaluate.stage import Evaluate
from stages.external.checkpoints import Checkpoint, PretrainedTokenizer
from stages.external.documents import Files
from stages.models.tokenization import canonical_tokenizer, difference, tokenizer_digest
from stages.prepare.stage import ByteLevelBPE, Prepare
from stages.quantize.proposers import Grid
from stages.quantize.schemes import Scheme
from stages.quantize.stage import Quantize
from stages.storage import Folder
from stages.teach.stage import Teach
from stages.train.objectives import CrossEntropy
from stages.train.stage import Continue, Smaller, Train
from tests.stages.prepare.tokenizers import gpt2_like, llama_like, qwen_like
from workflows.engine.check import check
from workflows.engine.graph import Workflow

LLAMA = {
    "vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


def checkpoint(
    folder: Path, tokenizer: Any = None, config: Any = None, weights: str = "lm_head.weight", **changes: Any
) -> Checkpoint:
    """Write what planning reads of a checkpoint: its weights have a header, and no numbers."""
    (config or LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"])).save_pretrained(folder)
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tokenizer or qwen_like()).save_pretrained(folder)
    header = json.dumps({weights: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return Checkpoint(source=str(folder))


def texts(of: Checkpoint, sequence_length: int = 64, **changes: Any) -> Prepare:
    fields = {"source": Files(paths=("a.txt",)), "tokenizer": PretrainedTokenizer(source=of.source)} | changes
    return Prepare(sequence_length=sequence_length, **fields)


def train(model: Any) -> Train:
    return Train(model=model, objectives=(CrossEntropy(),), optimizer_steps=1, batch_rows=1)


def test_checkpoints_that_fit_are_planned(tmp_path: Path) -> None:
    teacher = checkpoint(tmp_path / "teacher")
    student = checkpoint(tmp_path / "student", chat_template="other", max_position_embeddings=128)
    data = texts(teacher)
    Teach().check({"teacher": teacher, "data": data})
    train(Continue()).check({"origin": student, "data": data})
    train(Smaller(layers=2, heads=3)).check({"origin": teacher, "data": data})
    Evaluate().check({"reference": teacher, "models": {"student": student}, "data": data})
    Quantize().check({"model": teacher, "data": data})


def test_context_that_is_too_short_is_refused_with_the_length_that_fits(tmp_path: Path) -> None:
    teacher = checkpoint(tmp_path / "teacher", config=GPT2Config(n_positions=32, vocab_size=320))
    with pytest.raises(ConfigError, match=r"context of the checkpoint '.*' is 32 tokens.*sequence_length=32 or less"):
        Teach().check({"teacher": teacher, "data": texts(teacher)})


@pytest.mark.parametrize(
    ("stage", "name"),
    [(Teach(), "teacher"), (train(Continue()), "origin"), (Quantize(), "model"), (Evaluate(), "reference")],
    ids=["teach", "train", "quantize", "evaluate"],
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized already \(by gptq\).*made from"),
        ({"weights": "model.layers.0.mlp.up_proj.weight_packed"}, r"its weights hold model\.layers\.0.*weight_packed"),
    ],
    ids=["config", "weights"],
)
def test_checkpoint_that_is_quantized_already_is_refused(
    tmp_path: Path, stage: Any, name: str, changes: dict[str, Any], message: str
) -> None:
    teacher = checkpoint(tmp_path / "teacher", **changes)
    with pytest.raises(ConfigError, match=message):
        stage.check({name: teacher, "data": texts(teacher)})


def test_candidate_may_be_quantized_already(tmp_path: Path) -> None:
    teacher = checkpoint(tmp_path / "teacher")
    other = checkpoint(tmp_path / "other", quantization_config={"quant_method": "gptq", "bits": 4})
    Evaluate().check({"reference": teacher, "models": {"other": other}, "data": texts(teacher)})


def test_student_with_another_tokenizer_is_refused_with_the_token_that_differs(tmp_path: Path) -> None:
    teacher, student = checkpoint(tmp_path / "teacher"), checkpoint(tmp_path / "student", gpt2_like())
    message = r"the checkpoint '.*' has another tokenizer .*: the added token '<\|im_end\|>' has the id None"
    with pytest.raises(ConfigError, match=message):
        train(Continue()).check({"origin": student, "data": texts(teacher)})


def test_teacher_with_a_tokenizer_of_its_own_beside_a_trained_one_is_refused(tmp_path: Path) -> None:
    teacher = checkpoint(tmp_path / "teacher")
    data = texts(teacher, tokenizer=ByteLevelBPE(vocabulary_size=300))
    with pytest.raises(ConfigError, match=r"trains one of its own.*PretrainedTokenizer\(source="):
        Teach().check({"teacher": teacher, "data": data})


def test_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    teacher, student = checkpoint(tmp_path / "teacher"), checkpoint(tmp_path / "student", vocab_size=100)
    with pytest.raises(ConfigError, match=r"vocabulary of the checkpoint .* has 100 entries, expected at least .* 303"):
        train(Continue()).check({"origin": student, "data": texts(teacher)})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Smaller(heads=4), r"Smaller has 4 heads, expected a multiple of 3, the heads that share keys and values"),
        (Smaller(layers=9), r"Smaller\.layers is 9, expected at most the origin's 4"),
        (Smaller(width=20), r"Smaller\.width is 20, which leaves no whole number of heads"),
    ],
    ids=["shared-keys", "layers", "width"],
)
def test_student_that_cannot_be_cut_is_refused(tmp_path: Path, model: Smaller, message: str) -> None:
    teacher = checkpoint(tmp_path / "teacher")
    with pytest.raises(ConfigError, match=message):
        train(model).check({"origin": teacher, "data": texts(teacher)})


def test_model_of_text_and_images_is_planned_by_its_text_part(tmp_path: Path) -> None:
    text = {**LLAMA, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision)
    teacher = checkpoint(tmp_path / "teacher", config=config)
    Teach().check({"teacher": teacher, "data": texts(teacher)})
    with pytest.raises(ConfigError, match="is 64 tokens"):
        Teach().check({"teacher": teacher, "data": texts(teacher, 65)})


def test_model_without_a_causal_language_model_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    teacher = checkpoint(tmp_path / "teacher", config=CLIPConfig())
    with pytest.raises(ConfigError, match=r"of the type 'clip', which transformers cannot load as a causal language"):
        train(Smaller(layers=1)).check({"origin": teacher, "data": texts(teacher)})


def test_search_whose_groups_all_divide_nothing_is_refused_with_sizes_that_do(tmp_path: Path) -> None:
    teacher = checkpoint(tmp_path / "teacher")
    groups = [Scheme(weight_bits=4, group_size=128), Scheme(weight_bits=3, group_size=64)]
    with pytest.raises(ConfigError, match=r"divide the 48 channels of .*; use a group_size of 16 or 8"):
        Quantize(proposer=Grid(schemes=tuple(groups))).check({"model": teacher, "data": texts(teacher)})
    Quantize(proposer=Grid(schemes=(*groups, Scheme(weight_bits=8)))).check({"model": teacher, "data": texts(teacher)})


def test_what_does_not_fit_several_steps_is_said_once(tmp_path: Path) -> None:
    teacher = checkpoint(tmp_path / "teacher", max_position_embeddings=32)
    flow = Workflow("bad", base_model="x")
    big = flow.external("teacher", teacher)
    data = flow.step("corpus", texts(teacher))
    flow.step("signals", Teach(), teacher=big, data=data)
    flow.step("scores", Evaluate(), reference=big, models={"teacher": big}, data=data)
    with pytest.raises(ConfigError) as caught:
        check(flow)
    assert str(caught.value).count("tokens") == 1
    assert "- signals, scores: the context of the checkpoint" in str(caught.value)


def test_checkpoint_in_an_object_store_is_described_without_its_weights(s3: str, tmp_path: Path) -> None:
    local = Path(checkpoint(tmp_path / "teacher", max_position_embeddings=32).source)
    for path in local.iterdir():
        Folder.at(f"{s3}/teacher").put(path.name, path.read_bytes())
    teacher = Checkpoint(source=f"{s3}/teacher")
    folder = teacher.described()
    assert folder is not None
    assert {path.name for path in folder.iterdir()} == {path.name for path in local.iterdir()} - {"model.safetensors"}
    with pytest.raises(ConfigError, match="is 32 tokens"):
        Teach().check({"teacher": teacher, "data": texts(teacher)})


def test_planning_of_plain_checkpoints_imports_nothing_heavy(tmp_path: Path) -> None:
    import subprocess

    teacher = checkpoint(tmp_path / "teacher")
    code = (
        "import sys\nfrom stages.external.checkpoints import Checkpoint, PretrainedTokenizer\n"
        "from stages.external.documents import Files\nfrom stages.prepare.stage import Prepare\n"
        "from stages.teach.stage import Teach\n"
        f"data = Prepare(source=Files(paths=('a',)), tokenizer=PretrainedTokenizer(source={teacher.source!r}), sequence_length=64)\n"
        f"Teach().check({{'teacher': Checkpoint(source={teacher.source!r}), 'data': data}})\n"
        "print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# ---------------------------------------------------------------- which tokenizers are the same


def wrapped(backend: Tokenizer, **names: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def copy_of(backend: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(backend.to_str())


def test_tokenizers_that_write_one_thing_in_two_ways_are_the_same() -> None:
    one = llama_like().backend_tokenizer
    other = copy_of(one)
    other.pre_tokenizer = pre_tokenizers.Sequence([one.pre_tokenizer])
    begin = other.token_to_id("<s>")
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)])
    other.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    other.enable_padding(length=9)
    other.enable_truncation(3)
    same = wrapped(other, eos_token="<s>", pad_token="</s>")
    same.chat_template = "x"
    assert tokenizer_digest(wrapped(one)) == tokenizer_digest(same)


@pytest.mark.parametrize("change", ["normalizer", "begin", "token", "spaces", "merge"])
def test_tokenizers_that_give_some_text_other_ids_are_not_the_same(change: str) -> None:
    one = llama_like().backend_tokenizer
    other = copy_of(one)
    if change == "normalizer":
        other.normalizer = normalizers.Lowercase()
    elif change == "begin":
        other.post_processor = processors.ByteLevel()
    elif change == "token":
        other.add_tokens(["fox"])
    elif change == "spaces":
        other.add_special_tokens([AddedToken("<s>", lstrip=True, special=True)])
    else:
        parsed = json.loads(other.to_str())
        parsed["model"]["merges"] = parsed["model"]["merges"][1:]
        other = Tokenizer.from_str(json.dumps(parsed))
    text = "The <s> fox"
    assert one.encode(text).ids != other.encode(text).ids
    found = [canonical_tokenizer(each) for each in (one, other)]
    assert found[0] != found[1]
    assert difference(*found)


def test_copied_tokenizer_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    teacher = checkpoint(tmp_path / "teacher", llama_like())
    shutil.copytree(tmp_path / "teacher", tmp_path / "student")
    train(Continue()).check({"origin": Checkpoint(source=str(tmp_path / "student")), "data": texts(teacher)})
