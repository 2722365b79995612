"""The order of passes: each model after its base, however it was made."""

from pathlib import Path

import pytest

from stages.candidates import Candidate
from stages.contract import Artifact
from stages.errors import StageFailed
from stages.evaluate.passes import plan_passes
from stages.formats.scores import REFERENCE
from stages.storage import File


def model(name: str) -> Artifact:
    return Artifact("model", name, (File("model/config.json", str(Path("none") / name), 2, "0"),))


def candidate(name: str, base: str | None = None, kind: str = "model") -> Candidate:
    return Candidate(name, model(name), "model", kind, base and f"of {base}", base, kind if base else None)


def test_passes_of_models_derived_from_derived_ones_come_after_their_bases():
    chain = [candidate("c", "b", "quantized"), candidate("b", "a", "pruned"), candidate("plain"), candidate("a")]
    passes = plan_passes(chain, model("teacher"))
    assert [(one.candidate.name, one.against, one.keep) for one in passes] == [
        (REFERENCE, (), True),
        ("a", (REFERENCE,), True),
        ("plain", (REFERENCE,), False),
        ("b", (REFERENCE, "a"), True),
        ("c", (REFERENCE, "b"), False),
    ]


def test_passes_score_the_reference_once_where_it_is_a_candidate_and_a_base():
    passes = plan_passes([candidate("half", "big", "pruned"), candidate("big")], model("big"))
    assert [(one.candidate.name, one.against) for one in passes] == [("big", ()), ("half", ("big",))]


def test_pass_of_a_model_derived_from_what_is_only_the_reference_has_it_as_its_base():
    pruned = Candidate("half", model("half"), "model", "pruned", "big", None, "w50")
    passes = plan_passes([pruned, candidate("other")], model("big"))
    assert [(one.candidate.name, one.candidate.base, one.against) for one in passes] == [
        (REFERENCE, None, ()),
        ("half", REFERENCE, (REFERENCE,)),
        ("other", None, (REFERENCE,)),
    ]


def test_passes_score_a_reference_with_a_base_of_its_own_once_and_first():
    models = [candidate("big"), candidate("teacher", "big", "merged"), candidate("half", "teacher", "pruned")]
    passes = plan_passes(models, model("teacher"))
    assert [(one.candidate.name, one.candidate.base, one.against, one.keep) for one in passes] == [
        ("teacher", None, (), True),
        ("big", None, ("teacher",), False),
        ("half", "teacher", ("teacher",), False),
    ]


def test_passes_of_bases_that_cannot_be_put_in_order_are_refused():
    with pytest.raises(StageFailed, match="a is derived from b, b is derived from a"):
        plan_passes([candidate("a", "b"), candidate("b", "a")], model("teacher"))
    with pytest.raises(StageFailed, match="a is derived from gone"):
        plan_passes([candidate("a", "gone")], model("teacher"))
