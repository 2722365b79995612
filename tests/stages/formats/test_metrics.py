from stages.formats.metrics import METRICS, PRIMARY_METRIC, Metric, droppable_labels, known_columns


def shown(name: str, value: float) -> str:
    (metric,) = (metric for metric in METRICS if metric.name == name)
    return metric.cell({name: value})


def test_metrics_have_one_name_and_one_label_each() -> None:
    assert len({metric.name for metric in METRICS}) == len({metric.label for metric in METRICS}) == len(METRICS)
    assert all(metric.name.startswith("final/") for metric in METRICS)
    assert PRIMARY_METRIC in {metric.name for metric in METRICS}


def test_known_columns_are_those_of_the_table_that_any_candidate_has() -> None:
    rows = [{"final/kl_to_teacher": 0.1, "final/parameters": 4.0}, {"final/size_bytes": 1.0}]
    assert [metric.label for metric in known_columns(rows)] == ["size MB", "KL to teacher"]
    assert known_columns([]) == []


def test_droppable_labels_leave_out_the_detail_first_and_what_decides_never() -> None:
    labels = droppable_labels()
    assert labels[0] == "bits/byte"
    assert not {"size MB", "bits/weight", "perplexity", "KL to teacher"} & set(labels)


def test_cell_writes_values_in_their_unit_and_a_dash_for_none() -> None:
    assert shown("final/size_bytes", 1_234_567) == "1.23"
    assert shown("final/size_bytes", 15_234_500_000) == "15,234"
    assert shown("final/perplexity", 207.46) == "207.5"
    assert shown("final/agreement", 0.4432) == "44.3"
    assert Metric("final/x", "x", "", None, str).cell({}) == "–"
