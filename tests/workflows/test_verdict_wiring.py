"""What the workflows hand to the verdict: the reigning champion, the training tokens, limits with reasons."""

from stages.promote.stage import Gate, Promote
from workflows.compress import StudentSpec, compress
from workflows.engine.graph import ExternalHandle, Handle, Workflow
from workflows.quickstart import quickstart
from workflows.starter.my_workflow import my_workflow

HALF = StudentSpec(name="half", layers=2)


def test_compress_champion_is_scored_as_one_more_candidate() -> None:
    flow = compress(teacher="big", documents=("texts",), students=(HALF,), champion="/store/artifacts/a/out/1/model")
    models = flow.steps["scores"].inputs["models"]
    assert isinstance(models, dict)
    assert isinstance(models["champion"], ExternalHandle)
    assert models["champion"].checkpoint.source == "/store/artifacts/a/out/1/model"


def test_compress_scores_texts_of_their_own_beside_ngrams_of_the_training_tokens() -> None:
    flow = compress(teacher="big", documents=("texts",), students=(HALF,), evaluation=("others",))
    assert flow.steps["scores"].inputs["training"] == Handle("corpus", "dataset")
    assert "training" not in compress(teacher="big", documents=("texts",), students=(HALF,)).steps["scores"].inputs


def test_gates_of_the_tutorials_have_limits_on_quality_and_compress_has_none() -> None:
    def gate(flow: Workflow) -> Gate:
        stage = flow.steps["verdict"].stage
        assert isinstance(stage, Promote)
        return stage.gate

    assert "max_perplexity_ratio_to_teacher" in gate(quickstart()).limits
    assert "max_perplexity_ratio_to_teacher" in gate(my_workflow()).limits
    assert gate(compress(teacher="big", documents=("texts",), students=(HALF,))).limits == {}
