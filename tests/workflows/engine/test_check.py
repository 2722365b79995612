"""The graph's linter: each rule names what is wrong and the nearest right thing."""

import pytest

from stages.errors import ConfigError
from tests.stages_for_tests import Join, Write
from workflows.engine.check import check, find_step
from workflows.engine.graph import Handle, Workflow


def broken(build) -> str:
    flow = Workflow("w")
    build(flow)
    with pytest.raises(ConfigError) as caught:
        check(flow)
    return str(caught.value)


def test_check_sound_graph_passes() -> None:
    flow = Workflow("w")
    data = flow.step("data", Write())
    flow.step("join.a", Join(), data=data)
    check(flow)


def test_check_empty_graph_is_refused() -> None:
    assert "no steps" in broken(lambda flow: None)


def test_check_wrong_kind_names_both_kinds() -> None:
    def build(flow: Workflow) -> None:
        model = flow.step("join", Join(), data=flow.step("data", Write()))
        flow.step("again", Join(), data=model)

    message = broken(build)
    assert "again.data is wired to step 'join', a model; expected dataset" in message


def test_check_missing_input_is_named() -> None:
    assert "join: Join needs an input 'data' of kind dataset" in broken(lambda flow: flow.step("join", Join()))


def test_check_unknown_input_names_nearest() -> None:
    message = broken(lambda flow: flow.step("join", Join(), dada=flow.step("data", Write())))
    assert "no input 'dada'; did you mean 'data'?" in message


def test_check_one_artifact_where_many_are_taken_is_refused() -> None:
    def build(flow: Workflow) -> None:
        data = flow.step("data", Write())
        model = flow.step("join", Join(), data=data)
        flow.step("all", Join(), data=data, parts=model)

    assert "all.parts takes a mapping" in broken(build)


def test_check_unknown_step_names_nearest() -> None:
    message = broken(
        lambda flow: (flow.step("data", Write()), flow.step("join", Join(), data=Handle("date", "dataset")))
    )
    assert "comes from step 'date', which is not in the workflow; did you mean 'data'?" in message


def test_check_cycle_is_named() -> None:
    def build(flow: Workflow) -> None:
        data = flow.step("data", Write())
        flow.step("a", Join(), data=data, parts={"b": Handle("b", "model")})
        flow.step("b", Join(), data=data, parts={"a": Handle("a", "model")})

    assert "the steps a, b need each other in a cycle" in broken(build)


@pytest.mark.parametrize("name", ["Data", "", "-a", "a b", "ä"])
def test_check_illegal_step_name_is_refused(name: str) -> None:
    assert repr(name) in broken(lambda flow: flow.step(name, Write()))


def test_check_required_step_on_optional_one_is_refused() -> None:
    message = broken(lambda flow: flow.step("join", Join(), data=flow.step("data", Write(), required=False)))
    assert "join is required but needs data, which is not" in message


def test_step_same_name_twice_is_refused() -> None:
    flow = Workflow("w")
    flow.step("data", Write())
    with pytest.raises(ConfigError, match="two steps named 'data'"):
        flow.step("data", Write())


def test_find_step_unknown_names_nearest() -> None:
    flow = Workflow("w")
    flow.step("data", Write())
    with pytest.raises(ConfigError, match="did you mean 'data'"):
        find_step(flow, "daat")
