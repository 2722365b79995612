"""The champion's defense: who takes its place, who does not, and what cannot be compared."""

from dataclasses import replace

from stages.formats.documents import read_documents
from stages.formats.scores import Scores
from stages.promote.defense import ScoredModel, defend
from tests.stages.promote.made_up import TEACHER, Made, write_scores

MODELS = {
    "teacher": TEACHER,
    "champion": Made(0.10, size_bytes=2_000_000),
    "better": Made(0.05, size_bytes=2_500_000),
    "smaller": Made(0.30, size_bytes=1_000_000),
    "worse": Made(0.20, size_bytes=2_000_000),
}


def scored(folder, **options) -> dict[str, ScoredModel]:
    scores = write_scores(folder, MODELS, **options)
    return {name: ScoredModel(name, Scores.read(scores), read_documents(scores)) for name in MODELS}


def test_newcomer_that_is_larger_and_better_takes_the_place(tmp_path):
    models = scored(tmp_path)
    found = defend(models["champion"], models["better"])
    assert not found.stays
    assert found.text.startswith("better is better: perplexity ")


def test_newcomer_that_is_larger_and_only_about_as_good_does_not(tmp_path):
    models = scored(tmp_path)
    champion = models["champion"]
    entry = champion.entry.model_copy(update={"size_bytes": 8_000_000})
    scores = champion.scores.model_copy(update={"models": {**champion.scores.models, "champion": entry}})
    found = defend(champion, replace(champion, scores=scores))
    assert found.stays
    assert "is not smaller than the champion (8,000,000 bytes against 2,000,000), nor shown to be better" in found.text
    assert not defend(champion, champion).stays


def test_newcomer_that_is_smaller_takes_the_place_at_a_loss_that_is_stated(tmp_path):
    models = scored(tmp_path)
    found = defend(models["champion"], models["smaller"])
    assert not found.stays
    assert "(1,000,000 bytes against 2,000,000) and keeps its limits, at perplexity" in found.text
    assert "+2" in found.text  # some 22 %


def test_newcomer_that_is_worse_and_no_smaller_does_not(tmp_path):
    models = scored(tmp_path)
    found = defend(models["champion"], models["worse"])
    assert found.stays
    assert "95% interval" in found.text


def test_newcomer_that_was_scored_on_other_text_does_not(tmp_path):
    ours, theirs = scored(tmp_path / "ours"), scored(tmp_path / "theirs", seed=1)
    assert "was scored on other text" in defend(ours["champion"], theirs["smaller"]).text
    better = ours["better"]
    other = replace(better, scores=better.scores.model_copy(update={"dataset_fingerprint": "f" * 64}))
    assert defend(ours["champion"], other).stays
