"""Names, validation and fit of schemes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.quantize.schemes import DEFAULT_SCHEMES, Scheme
from stages.quantize.stage import Quantize


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


def all_schemes() -> st.SearchStrategy[Scheme]:
    def build(bits, group, symmetric, algorithm, act, observer, smooth, dampening):
        return Scheme(
            weight_bits=8 if act else bits,
            group_size=group,
            symmetric=symmetric,
            algorithm=algorithm,
            activation_bits=act,
            observer=observer,
            smooth=smooth if act else None,
            dampening=dampening if algorithm == "gptq" else 0.01,
        )

    return st.builds(
        build,
        st.integers(2, 8),
        st.none() | st.integers(8, 256),
        st.booleans(),
        st.sampled_from(["rtn", "gptq"]),
        st.sampled_from([None, 8]),
        st.sampled_from(["memoryless_minmax", "memoryless_mse", "imatrix_mse"]),
        st.none() | st.floats(0, 1),
        st.floats(1e-6, 0.5),
    )


@given(all_schemes(), all_schemes())
def test_scheme_names_are_equal_exactly_when_schemes_are(left: Scheme, right: Scheme) -> None:
    assert (left.name == right.name) == (left == right)
    assert "/" not in left.name
    assert Scheme.model_validate_json(left.model_dump_json()).name == left.name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_bits": 1}, "greater than or equal to 2"),
        ({"weight_bits": 4, "activation_bits": 8}, "saves nothing"),
        ({"weight_bits": 8, "smooth": 0.5}, "without activation_bits"),
        ({"weight_bits": 4, "dampening": 0.5}, "algorithm='gptq' only"),
        ({"weight_bits": 4, "algorithm": "awq"}, "'rtn' or 'gptq'"),
        ({"weight_bits": 4, "bits": 4}, "Extra inputs"),
    ],
    ids=["bits", "w4a8", "smooth", "dampening", "algorithm", "unknown-field"],
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


def test_quantize_with_a_scheme_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="int8-channel-sym-rtn more than once"):
        Quantize(schemes=(Scheme(weight_bits=8), Scheme(weight_bits=8)))


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
