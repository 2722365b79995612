"""What a scheme does with layers of given widths, and why it cannot fit."""

import re

import pytest

from stages.quantize.fitting import misfit, plan_layers
from stages.quantize.schemes import Grain, LayerRule, Scheme


def test_misfit_names_layer_width_and_group() -> None:
    reason = misfit(Scheme(weight_bits=4, group_size=128), {"a.q_proj": 256, "a.down_proj": 704})
    assert reason is not None
    assert "a.down_proj (704)" in reason
    assert "group_size=128" in reason
    assert "q_proj" not in reason
    assert "expected group_size 64, 32, 16, 8 or None" in reason, "704 is 64 times 11"
    assert "on_indivisible='keep'" in reason


def test_layers_that_a_group_does_not_divide_are_kept_where_that_is_allowed() -> None:
    scheme, widths = Scheme(weight_bits=4, group_size=128), {"a.q_proj": 256, "a.experts.0.down_proj": 96}
    assert misfit(scheme, widths, "keep") is None
    plan = plan_layers(scheme, widths)
    assert (list(plan.quantized), plan.kept) == (["a.q_proj"], ("a.experts.0.down_proj",))
    assert "does not divide" in str(misfit(scheme, {"a.experts.0.down_proj": 96}, "keep")), "nothing would be left"


@pytest.mark.parametrize(("numbers", "group"), [("nvfp4", 16), ("mxfp4", 32)])
def test_group_of_a_float_format_must_divide_too(numbers: str, group: int) -> None:
    scheme = Scheme.model_validate({"weight_bits": 4, "numbers": numbers})
    assert misfit(scheme, {"a": 64}) is None
    reason = misfit(scheme, {"a": 72})
    assert f"group_size={group} does not divide the input width of a (72); expected on_indivisible" in str(reason)


def test_model_without_linear_layers_takes_a_cast_and_vocabularies_only() -> None:
    assert misfit(Scheme(weight_bits=16), {}) is misfit(Scheme(weight_bits=16, vocabulary_bits=8), {}) is None
    assert "no linear layers" in str(misfit(Scheme(weight_bits=8, vocabulary_bits=8), {}))


def test_misfit_of_group_wider_than_the_layer_is_found() -> None:
    assert misfit(Scheme(weight_bits=4, group_size=128), {"a": 64}) is not None


def test_misfit_of_fitting_schemes_is_none() -> None:
    assert misfit(Scheme(weight_bits=4, group_size=64), {"a": 64, "b": 704}) is None
    assert misfit(Scheme(weight_bits=4), {"a": 63}) is None


RULES = (
    LayerRule(layers="*.0.down_proj", skip=True),
    LayerRule(layers="*.down_proj", weight_bits=8, group_size="channel"),
)


def test_rule_of_the_schemes_own_settings_excepts_layers_from_later_rules() -> None:
    kept = LayerRule(layers="*.0.down_proj", weight_bits=4)
    scheme = Scheme(weight_bits=4, rules=(kept, LayerRule(layers="*.down_proj", group_size=64)))
    assert misfit(scheme, {"a.0.down_proj": 50, "a.1.down_proj": 64}) is None


def test_of_rules_that_match_a_layer_the_first_counts() -> None:
    scheme = Scheme(weight_bits=4, group_size=64, rules=RULES)
    widths = {"a.0.down_proj": 50, "a.1.down_proj": 50, "a.1.up_proj": 64}
    plan = plan_layers(scheme, widths)
    assert plan.quantized == {"a.1.down_proj": Grain(8, None), "a.1.up_proj": Grain(4, 64)}
    assert (plan.skipped, plan.kept) == (("a.0.down_proj",), ())
    assert misfit(scheme, widths) is None
    reason = misfit(scheme, widths | {"a.1.q_proj": 50})
    assert reason is not None
    assert "a.1.q_proj (50)" in reason
    assert "down_proj" not in reason


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((LayerRule(layers="*.experts.*", weight_bits=8),), r"'\*.experts.\*' matches no linear layer"),
        ((LayerRule(layers="*", skip=True),), "rules skip every linear layer"),
        ((LayerRule(layers="a.*", group_size=48),), r"group_size=48 does not divide the input width of a.q \(64\)"),
    ],
    ids=["no-match", "nothing-left", "group-of-a-rule"],
)
def test_misfit_of_rules_is_found(rules: tuple[LayerRule, ...], message: str) -> None:
    assert re.search(message, str(misfit(Scheme(weight_bits=4, rules=rules), {"a.q": 64})))
