"""Names, validation and fit of schemes."""

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.quantize.proposers import Grid
from stages.quantize.schemes import DEFAULT_SCHEMES, MAX_NAME_CHARACTERS, LayerRule, Scheme


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Scheme(weight_bits=8), "int8-channel-sym-rtn"),
        (Scheme(weight_bits=4, group_size=64, algorithm="gptq"), "int4-g64-sym-gptq"),
        (Scheme(weight_bits=3, group_size=32, symmetric=False), "int3-g32-asym-rtn"),
        (Scheme(weight_bits=8, activation_bits=8), "w8a8-int8-rtn"),
        (Scheme(weight_bits=8, activation_bits=8, group_size=64, smooth=0.8), "w8a8-int8-g64-rtn-smooth0.8"),
        (Scheme(weight_bits=4, algorithm="gptq", dampening=0.1), "int4-channel-sym-gptq-damp0.1"),
        (Scheme(weight_bits=4, algorithm="gptq", observer="imatrix_mse"), "int4-channel-sym-gptq-imatrix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scheme_name_is_derived_from_its_fields(scheme: Scheme, name: str) -> None:
    assert scheme.name == name


def all_rules() -> st.SearchStrategy[LayerRule]:
    layers = st.sampled_from(["*.down_proj", "*.q_proj", "model.layers.0.*", "a/b", "ä"])
    grain = st.fixed_dictionaries(
        {"layers": layers, "group_size": st.sampled_from([32, 64, "channel"]), "weight_bits": st.none() | st.just(8)}
    )
    return (grain | st.fixed_dictionaries({"layers": layers, "skip": st.just(True)})).map(LayerRule.model_validate)


def all_schemes() -> st.SearchStrategy[Scheme]:
    def build(bits, group, symmetric, algorithm, act, observer, smooth, dampening, rules):
        return Scheme(
            weight_bits=8 if act else bits,
            group_size=group,
            symmetric=symmetric,
            algorithm=algorithm,
            activation_bits=act,
            observer=observer,
            smooth=smooth if act else None,
            dampening=dampening if algorithm == "gptq" else 0.01,
            rules=() if changes_nothing(8 if act else bits, group, rules) else tuple(rules),
        )

    def changes_nothing(bits, group, rules):
        last = rules[-1] if rules else None
        return last and (last.weight_bits or bits, last.group_size) == (bits, group or "channel")

    return st.builds(
        build,
        st.integers(2, 8),
        st.none() | st.integers(8, 256),
        st.booleans(),
        st.sampled_from(["rtn", "gptq"]),
        st.sampled_from([None, 8]),
        st.sampled_from(["memoryless_minmax", "memoryless_mse", "imatrix_mse"]),
        st.none() | st.floats(0, 1),
        st.sampled_from([0.01, 0.1]) | st.floats(1e-6, 0.5),
        st.lists(all_rules(), max_size=2),
    )


@given(all_schemes(), all_schemes())
def test_scheme_names_are_equal_exactly_when_schemes_are(left: Scheme, right: Scheme) -> None:
    assert (left.name == right.name) == (left == right)
    assert re.fullmatch(r"[a-z0-9.-]+", left.name)
    assert len(left.name) <= MAX_NAME_CHARACTERS
    assert Scheme.model_validate_json(left.model_dump_json()).name == left.name


def test_scheme_with_rules_is_named_by_what_is_short_and_a_digest() -> None:
    scheme = Scheme(weight_bits=4, group_size=64, rules=(LayerRule(layers="*.down_proj", weight_bits=8),))
    assert re.fullmatch(r"int4-g64-sym-rtn-mixed-[0-9a-f]{10}", scheme.name)


def test_digest_of_a_scheme_is_of_what_differs_from_the_defaults() -> None:
    rule = LayerRule(layers="*.down_proj", weight_bits=8)
    plain = Scheme(weight_bits=4, rules=(rule,))
    spelled = Scheme(weight_bits=4, algorithm="rtn", smooth=None, rules=(rule.model_copy(update={"skip": False}),))
    fields = '{"rules": [{"layers": "*.down_proj", "weight_bits": 8}], "weight_bits": 4}'
    assert plain.name == spelled.name
    assert plain.name.endswith(hashlib.sha256(fields.encode()).hexdigest()[:10])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_bits": 1}, "greater than or equal to 2"),
        ({"weight_bits": 4, "activation_bits": 8}, "saves nothing"),
        ({"weight_bits": 8, "smooth": 0.5}, "without activation_bits"),
        ({"weight_bits": 4, "dampening": 0.5}, "algorithm='gptq' only"),
        ({"weight_bits": 4, "algorithm": "awq"}, "'rtn' or 'gptq'"),
        ({"weight_bits": 4, "bits": 4}, "Extra inputs"),
        ({"weight_bits": 4, "rules": [{"layers": "*"}]}, "neither skips nor changes"),
        ({"weight_bits": 4, "rules": [{"layers": "*", "skip": True, "weight_bits": 8}]}, "both skips and changes"),
        ({"weight_bits": 4, "rules": [{"layers": "*", "group_size": 4}]}, "expected 8 or more"),
        (
            {"weight_bits": 8, "activation_bits": 8, "rules": [{"layers": "*", "weight_bits": 4}]},
            "activation_bits=8 with weight_bits=4",
        ),
        (
            {"weight_bits": 4, "group_size": 64, "rules": [{"layers": "*.q", "weight_bits": 4}]},
            r"the last rule, for '\*.q', changes nothing: weight_bits=4 and group_size=64 are the scheme's own",
        ),
        ({"weight_bits": 4, "rules": [{"layers": "*.q", "group_size": "channel"}]}, "changes nothing"),
    ],
    ids=[
        "bits",
        "w4a8",
        "smooth",
        "dampening",
        "algorithm",
        "unknown-field",
        "idle-rule",
        "rule-of-two-minds",
        "rule-of-small-groups",
        "w4a8-by-rule",
        "rule-of-equal-bits",
        "rule-of-equal-groups",
    ],
)
def test_scheme_that_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Scheme.model_validate(fields)


def test_default_schemes_cover_the_axes_and_differ() -> None:
    assert len({scheme.name for scheme in DEFAULT_SCHEMES}) == len(DEFAULT_SCHEMES) >= 8
    assert {scheme.weight_bits for scheme in DEFAULT_SCHEMES} == {3, 4, 8}
    for values in (
        {scheme.group_size is None for scheme in DEFAULT_SCHEMES},
        {scheme.symmetric for scheme in DEFAULT_SCHEMES},
        {scheme.algorithm for scheme in DEFAULT_SCHEMES},
        {scheme.activation_bits for scheme in DEFAULT_SCHEMES},
    ):
        assert len(values) == 2


def test_grid_with_a_scheme_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="int8-channel-sym-rtn more than once"):
        Grid(schemes=(Scheme(weight_bits=8), Scheme(weight_bits=8)))


def test_misfit_names_layer_width_and_group() -> None:
    reason = Scheme(weight_bits=4, group_size=128).misfit({"a.q_proj": 256, "a.down_proj": 704})
    assert reason is not None
    assert "a.down_proj (704)" in reason
    assert "group_size=128" in reason
    assert "q_proj" not in reason


def test_misfit_of_group_wider_than_the_layer_is_found() -> None:
    assert Scheme(weight_bits=4, group_size=128).misfit({"a": 64}) is not None


def test_misfit_of_fitting_schemes_is_none() -> None:
    assert Scheme(weight_bits=4, group_size=64).misfit({"a": 64, "b": 704}) is None
    assert Scheme(weight_bits=4).misfit({"a": 63}) is None


RULES = (
    LayerRule(layers="*.0.down_proj", skip=True),
    LayerRule(layers="*.down_proj", weight_bits=8, group_size="channel"),
)


def test_rule_of_the_schemes_own_settings_excepts_layers_from_later_rules() -> None:
    kept = LayerRule(layers="*.0.down_proj", weight_bits=4)
    scheme = Scheme(weight_bits=4, rules=(kept, LayerRule(layers="*.down_proj", group_size=64)))
    assert scheme.misfit({"a.0.down_proj": 50, "a.1.down_proj": 64}) is None


def test_of_rules_that_match_a_layer_the_first_counts() -> None:
    scheme = Scheme(weight_bits=4, group_size=64, rules=RULES)
    widths = {"a.0.down_proj": 50, "a.1.down_proj": 50, "a.1.up_proj": 64}
    assert scheme.quantized_layers(widths) == ["a.1.down_proj", "a.1.up_proj"]
    assert scheme.misfit(widths) is None
    reason = scheme.misfit(widths | {"a.1.q_proj": 50})
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
    assert re.search(message, str(Scheme(weight_bits=4, rules=rules).misfit({"a.q": 64})))
