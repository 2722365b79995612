"""Evaluate on real tiny models through Ray, against a dense float64 computation of its own."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForCausalLM

from stages.errors import StageFailed
from stages.evaluate.stage import Evaluate
from stages.formats.scores import Scores
from stages.storage import Folder
from tests.fakes import artifact_of, fake_context
from tests.references import log_softmax
from tests.stages.evaluate.tiny import VOCABULARY, make_dataset, make_model, make_search, quantize, save_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dataset, a teacher, two students, and a search with a truly quantized finalist of one of them."""
    root = tmp_path_factory.mktemp("world")
    data = make_dataset(root / "data")
    teacher = make_model(root / "teacher", seed=0, layers=3, width=48)
    distilled = make_model(root / "distilled", seed=1)
    plain = make_model(root / "plain", seed=2)
    quantize(root / "distilled" / "model", root / "search" / "finalists" / "w8a16")
    search = make_search(root / "search", distilled, ("w8a16",))
    return {"root": root, "data": data, "teacher": teacher, "distilled": distilled, "plain": plain, "search": search}


@pytest.fixture(scope="module")
def evaluated(world, local_ray):
    """What Evaluate made of this world: scores, the table of documents, the outcome and the report."""
    models = {name: world[name] for name in ("plain", "teacher", "distilled", "search")}
    inputs = {"data": world["data"], "reference": world["teacher"], "models": models}
    context = fake_context(world["root"] / "run", inputs, workers=2, micro_batch=2)
    outcome = Evaluate().run(context)
    return (*read_result(context.out), outcome, context.reporter)


def read_result(out: Folder):
    documents = pq.read_table(io.BytesIO(out.get("documents.parquet"))).to_pandas()
    return Scores.parse(out.get("scores.json"), where="scores.json"), documents


def dense_log_probs(folder: Path, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Log-probabilities `[B, T-1, V]` of the model in float64, each segment alone, padded words cut off before softmax."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    flat = torch.as_tensor(input_ids).long().flatten()
    with torch.no_grad():
        starts = np.flatnonzero(positions.ravel() == 0)[1:].tolist()
        logits = torch.cat([model(input_ids=ids[None]).logits[0] for ids in flat.tensor_split(starts)])
    return log_softmax(logits.view(*input_ids.shape, -1)[:, :-1, :VOCABULARY].numpy())


def rows_of(data) -> tuple[np.ndarray, ...]:
    tables = [pq.read_table(path) for path in data.paths("tokens/validation-*.parquet")]
    return tuple(
        np.concatenate([np.array(table[name].to_pylist()) for table in tables])
        for name in ("input_ids", "document_ids", "loss_mask", "positions")
    )


@pytest.mark.parametrize("name", ["teacher", "distilled", "plain"])
def test_scores_agree_with_a_dense_float64_computation(world, evaluated, name):
    scores, documents, *_ = evaluated
    input_ids, document_ids, mask, positions = rows_of(world["data"])
    log_p = dense_log_probs(world["root"] / "teacher" / "model", input_ids, positions)
    log_q = dense_log_probs(world["root"] / name / "model", input_ids, positions)
    targets, mask = input_ids[:, 1:], mask[:, 1:]
    nll = -np.take_along_axis(log_q, targets[..., None], -1)[..., 0]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    agree = log_p.argmax(-1) == log_q.argmax(-1)

    entry = scores.models[name]
    assert scores.tokens == mask.sum()
    assert entry.cross_entropy == pytest.approx(nll[mask].mean(), rel=1e-5)
    assert entry.perplexity == pytest.approx(np.exp(nll[mask].mean()), rel=1e-4)
    assert entry.kl_to_reference == pytest.approx(kl[mask].mean(), rel=1e-4, abs=1e-12)
    assert entry.agreement == pytest.approx(agree[mask].mean())

    owner = document_ids[:, 1:][mask]
    table = documents[documents.model == name].set_index("document_id")
    assert sorted(table.index) == sorted(set(owner))
    for document in set(owner):
        row = table.loc[document]
        assert row.tokens == (owner == document).sum()
        assert row.nll == pytest.approx(nll[mask][owner == document].sum(), rel=1e-4)
        assert row.kl == pytest.approx(kl[mask][owner == document].sum(), rel=1e-3, abs=1e-12)
        assert row.agree == agree[mask][owner == document].sum()


def test_reference_against_itself_is_exactly_equal(evaluated):
    scores, documents, *_ = evaluated
    entry = scores.models["teacher"]
    assert scores.reference == "teacher"
    assert (entry.kl_to_reference, entry.agreement) == (0.0, 1.0)
    assert entry.compression_x == pytest.approx(0.5, rel=0.2)  # it is stored in 32 bits, with a file's header
    assert (documents[documents.model == "teacher"].kl == 0).all()


def test_finalist_of_a_search_is_a_candidate_scored_against_its_base(world, evaluated):
    scores, documents, *_ = evaluated
    entry, base = scores.models["distilled.w8a16"], scores.models["distilled"]
    assert (entry.kind, entry.base, entry.method) == ("quantized", "distilled", "w8a16")
    assert entry.folder == "finalists/w8a16"
    assert entry.uri_prefix == str(world["root"] / "search" / "finalists" / "w8a16")
    assert entry.axes["bits"] == "8"
    assert 0 < entry.kl_to_base < 0.05 < entry.kl_to_reference
    assert entry.agreement_with_base > 0.8
    assert entry.parameters == base.parameters
    assert entry.bits_per_weight < base.bits_per_weight
    own = documents[documents.model == "distilled.w8a16"]
    assert own.kl_to_base.sum() / own.tokens.sum() == pytest.approx(entry.kl_to_base)
    assert own.agree_with_base.sum() / own.tokens.sum() == pytest.approx(entry.agreement_with_base)


def test_sizes_are_the_bytes_of_the_weights_on_disk(world, evaluated):
    scores, *_ = evaluated
    entry = scores.models["plain"]
    size = (world["root"] / "plain" / "model" / "model.safetensors").stat().st_size
    model = LlamaForCausalLM.from_pretrained(world["root"] / "plain" / "model")
    assert entry.size_bytes == size
    assert entry.parameters == sum(p.numel() for p in model.parameters())
    assert entry.bits_per_weight == pytest.approx(8 * size / entry.parameters)
    assert entry.compression_x == pytest.approx(scores.reference_bytes_16bit / size)


def test_scores_tell_the_noise_floor_and_the_bytes_of_the_text(evaluated):
    scores, *_ = evaluated
    floor, entry = scores.noise_floor, scores.models["plain"]
    assert abs(floor.kl_to_reference) < 1e-5 < entry.kl_to_reference
    assert floor.agreement > 0.99
    assert floor.cross_entropy == pytest.approx(scores.models["teacher"].cross_entropy, rel=1e-5)
    assert entry.bits_per_byte == pytest.approx(entry.cross_entropy * scores.tokens / scores.text_bytes / np.log(2))
    assert scores.bigram is None  # the dataset has no training split


def test_models_not_quantized_have_no_figures_about_a_base(evaluated):
    scores, documents, *_ = evaluated
    assert scores.models["plain"].kl_to_base is None
    assert documents[documents.model == "plain"].kl_to_base.isna().all()


def test_outcome_and_report_tell_each_model(evaluated):
    scores, _, outcome, report = evaluated
    assert outcome.metrics["perplexity/plain"] == scores.models["plain"].perplexity
    assert report.progressed[-1] == (4, 4, "models")


def test_reference_that_is_not_among_the_models_still_has_its_documents(world, tmp_path, local_ray):
    inputs = {"data": world["data"], "reference": world["teacher"], "models": {"plain": world["plain"]}}
    context = fake_context(tmp_path, inputs)
    Evaluate(max_rows=3, seed=1).run(context)
    scores, documents = read_result(context.out)
    assert scores.reference is None
    assert (list(scores.models), scores.rows) == (["plain"], 3)
    assert set(documents.model) == {"@reference", "plain"}


def test_search_whose_base_is_the_reference_shares_its_distribution(world, tmp_path, local_ray):
    """A plain checkpoint laid out as a finalist, of weights equal to the base's: everything must be exactly equal."""
    save_model(tmp_path / "search" / "finalists" / "same", seed=0, layers=3, width=48)
    search = make_search(tmp_path / "search", world["teacher"], ("same",))
    inputs = {"data": world["data"], "reference": world["teacher"], "models": {"big": world["teacher"], "q": search}}
    context = fake_context(tmp_path / "run", inputs)
    Evaluate().run(context)
    entry = read_result(context.out)[0].models["big.same"]
    assert (entry.kl_to_reference, entry.kl_to_base, entry.agreement_with_base) == (0.0, 0.0, 1.0)


def test_search_without_its_base_is_named_by_its_key(world, tmp_path, local_ray):
    inputs = {"data": world["data"], "reference": world["teacher"], "models": {"found": world["search"]}}
    context = fake_context(tmp_path, inputs)
    Evaluate(max_rows=2).run(context)
    scores, _ = read_result(context.out)
    assert scores.models["found.w8a16"].base is None
    assert scores.models["found.w8a16"].kl_to_base is None


def test_model_in_bfloat16_is_scored_within_its_rounding(world, evaluated, tmp_path, local_ray):
    inputs = {"data": world["data"], "reference": world["teacher"], "models": {"plain": world["plain"]}}
    context = fake_context(tmp_path, inputs)
    Evaluate(dtype="bfloat16").run(context)
    found, exact = read_result(context.out)[0].models["plain"], evaluated[0].models["plain"]
    assert found.cross_entropy == pytest.approx(exact.cross_entropy, rel=0.01)
    assert found.kl_to_reference == pytest.approx(exact.kl_to_reference, rel=0.02)


def test_model_with_nan_weights_fails_by_name(world, tmp_path, local_ray):
    model = save_model(tmp_path / "broken" / "model", seed=3)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "broken" / "model")
    broken = artifact_of("model", tmp_path / "broken")
    inputs = {"data": world["data"], "reference": world["teacher"], "models": {"broken": broken}}
    with pytest.raises(StageFailed, match="'broken' gives a nll that is not finite"):
        Evaluate().run(fake_context(tmp_path / "run", inputs))


def test_model_with_too_few_words_is_refused(world, tmp_path, local_ray):
    small = make_model(tmp_path / "small", seed=4, vocab_size=40)
    inputs = {"data": world["data"], "reference": world["teacher"], "models": {"small": small}}
    with pytest.raises(StageFailed, match="the candidate 'small' has 40 entries, expected at least the dataset's 50"):
        Evaluate().run(fake_context(tmp_path / "run", inputs))


def test_model_with_another_tokenizer_is_refused(world, tmp_path, local_ray):
    make_model(tmp_path / "other", seed=5)
    path = tmp_path / "other" / "model" / "tokenizer.json"
    parsed = json.loads(path.read_text())
    parsed["model"]["vocab"]["w7"], parsed["model"]["vocab"]["w8"] = 8, 7
    path.write_text(json.dumps(parsed))
    inputs = {"data": world["data"], "reference": world["teacher"]}
    inputs["models"] = {"other": artifact_of("model", tmp_path / "other")}
    with pytest.raises(StageFailed, match="'other' has another tokenizer"):
        Evaluate().run(fake_context(tmp_path / "run", inputs))
