"""Names and validation of schemes."""

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
        (Scheme(weight_bits=16), "16bit"),
        (Scheme(weight_bits=16, vocabulary_bits=8), "16bit-vocab8"),
        (Scheme(weight_bits=8, numbers="fp8", activation_bits=8), "fp8-dynamic"),
        (Scheme(weight_bits=8, numbers="fp8"), "fp8a16"),
        (Scheme(weight_bits=4, numbers="nvfp4", activation_bits=4, kv_cache="fp8"), "nvfp4-kvfp8"),
        (Scheme(weight_bits=4, numbers="mxfp4"), "mxfp4a16"),
        (Scheme(weight_bits=4, group_size=128, algorithm="awq", vocabulary_bits=8), "int4-g128-sym-awq-vocab8"),
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
    def changes_nothing(bits, group, rules):
        last = rules[-1] if rules else None
        return last and (last.weight_bits or bits, last.group_size) == (bits, group or "channel")

    def integers(bits, group, symmetric, algorithm, act, observer, smooth, dampening, rules, extras):
        bits = 8 if act else bits
        return Scheme(
            weight_bits=bits,
            group_size=group,
            symmetric=symmetric,
            algorithm=algorithm,
            activation_bits=act,
            observer=observer,
            smooth=smooth if act else None,
            dampening=dampening if algorithm == "gptq" else 0.01,
            rules=() if changes_nothing(bits, group, rules) else tuple(rules),
            **extras,
        )

    extras = st.fixed_dictionaries(
        {"vocabulary_bits": st.sampled_from([None, 8]), "kv_cache": st.sampled_from([None, "fp8"])}
    )
    floats = st.sampled_from([("fp8", 8), ("nvfp4", 4), ("mxfp4", 4)])
    return st.one_of(
        st.builds(
            integers,
            st.integers(2, 8),
            st.none() | st.integers(8, 256),
            st.booleans(),
            st.sampled_from(["rtn", "gptq", "awq"]),
            st.sampled_from([None, 8]),
            st.sampled_from(["memoryless_minmax", "memoryless_mse", "imatrix_mse"]),
            st.none() | st.floats(0, 1),
            st.sampled_from([0.01, 0.1]) | st.floats(1e-6, 0.5),
            st.lists(all_rules(), max_size=2),
            extras,
        ),
        st.builds(
            lambda kind, act, extras: Scheme(
                weight_bits=kind[1], numbers=kind[0], activation_bits=kind[1] if act else None, **extras
            ),
            floats,
            st.booleans(),
            extras,
        ),
        extras.map(lambda extras: Scheme(weight_bits=16, **extras)),
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
        ({"weight_bits": 4, "algorithm": "hqq"}, "'rtn', 'gptq' or 'awq'"),
        ({"weight_bits": 12}, "expected 2 to 8, or 16, which is a cast"),
        ({"weight_bits": 16, "group_size": 64, "algorithm": "gptq"}, "for which algorithm, group_size has no meaning"),
        ({"weight_bits": 8, "numbers": "nvfp4"}, "numbers='nvfp4' have 4 bits; got weight_bits=8"),
        ({"weight_bits": 4, "numbers": "mxfp4", "group_size": 32}, "group_size=32 has a meaning for integers only"),
        ({"weight_bits": 8, "numbers": "fp8", "activation_bits": 4}, "activation_bits=4 with numbers='fp8'"),
        ({"weight_bits": 4, "activation_bits": 4}, "saves nothing"),
        (
            {"weight_bits": 4, "numbers": "nvfp4", "rules": [{"layers": "*.q", "weight_bits": 8}]},
            "a rule that changes layers has a meaning for integers only",
        ),
        ({"weight_bits": 8, "vocabulary_bits": 4}, "Input should be 8"),
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
        "twelve-bits",
        "cast-in-groups",
        "nvfp4-of-8-bits",
        "mxfp4-group",
        "fp8-a4",
        "int-w4a4",
        "nvfp4-rule",
        "vocabulary",
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


def test_default_schemes_are_those_in_use_and_differ() -> None:
    names = [scheme.name for scheme in DEFAULT_SCHEMES]
    assert len(set(names)) == len(names)
    assert {scheme.numbers for scheme in DEFAULT_SCHEMES} == {"int", "fp8", "nvfp4", "mxfp4"}
    assert {scheme.algorithm for scheme in DEFAULT_SCHEMES} == {"rtn", "gptq", "awq"}
    assert {scheme.vocabulary_bits for scheme in DEFAULT_SCHEMES} == {None, 8}
    assert {"int4-g128-sym-gptq-imatrix", "fp8-dynamic", "w8a8-int8-rtn-smooth0.8", "nvfp4"} < set(names)


def test_grid_with_a_scheme_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="int8-channel-sym-rtn more than once"):
        Grid(schemes=(Scheme(weight_bits=8), Scheme(weight_bits=8)))
