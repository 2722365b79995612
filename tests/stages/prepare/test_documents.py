"""What rows become, which are rejected and why, and on which side of the split a document falls."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import StageFailed
from stages.external.documents import Files
from stages.prepare.division import Division
from stages.prepare.documents import PartReader, RowRejected, detect_schema, document_of
from stages.prepare.parts import plan_parts

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("schema", "value", "message"),
    [
        ("text", {"Text": "x"}, r"no field 'text'; did you mean 'Text'"),
        ("text", {"text": 3}, "'text' is int 3, expected text"),
        ("text", {"text": None}, "'text' is null, expected text"),
        ("text", {"text": "half \ud800"}, "surrogate pair at character 5"),
        ("prompt-completion", {"prompt": "x"}, "no field 'completion'"),
        ("prompt-completion", {"prompt": "x", "completion": " "}, "the completion is empty"),
        ("chat", {"chat": []}, "no field 'messages'"),
        ("chat", {"messages": "hi"}, "'messages' is str 'hi', expected a list"),
        ("chat", {"messages": []}, "expected a list"),
        ("chat", {"messages": ["hi"]}, r"messages\[0\] is str 'hi'"),
        ("chat", {"messages": [{"role": "user"}]}, r"messages\[0\]: no field 'content'"),
        (
            "chat",
            {"messages": [*CHAT, {"role": "user", "content": None}]},
            r"messages\[2\]: 'content' is null|no field",
        ),
        ("chat", {"messages": CHAT[:1]}, "no message of the role 'assistant'"),
    ],
)
def test_row_that_is_not_what_its_schema_says_is_rejected(schema: Any, value: Any, message: str) -> None:
    with pytest.raises(RowRejected, match=message):
        document_of(value, schema, "text")


def test_row_of_white_space_is_no_document_and_no_fault() -> None:
    assert document_of({"text": " \n"}, "text", "text") is None
    assert document_of("", "text", "text") is None


@given(st.text(min_size=1), st.integers(-(2**31), 2**31))
def test_split_of_equal_content_is_the_same_side(text: str, seed: int) -> None:
    one, other = document_of({"text": f"x {text}"}, "text", "text"), document_of(f"x  \n{text} ", "text", "text")
    assert one is not None
    assert other is not None
    assert one.digest == other.digest
    assert 0 <= one.id < 2**63
    sides = {Division(seed, 0.3, 0.3).side(d.digest) for d in (one, other)}
    assert len(sides) == 1


def test_split_fractions_are_those_asked_for_and_follow_the_seed() -> None:
    digests = [document_of(f"document {i}", "text", "text").digest for i in range(4000)]  # type: ignore[union-attr]

    def sides(seed: int) -> list[str]:
        return [Division(seed, 0.1, 0.2).side(d) for d in digests]

    # 4 standard deviations of a binomial with n = 4000.
    assert sides(0).count("validation") == pytest.approx(400, abs=76)
    assert sides(0).count("calibration") == pytest.approx(800, abs=101)
    assert sides(0) != sides(1)


@pytest.mark.parametrize(
    ("row", "schema"),
    [({"messages": CHAT}, "chat"), ({"prompt": "a", "completion": "b"}, "prompt-completion"), ({"text": "a"}, "text")],
)
def test_schema_is_told_from_the_first_readable_row(tmp_path: Path, row: dict[str, Any], schema: str) -> None:
    (tmp_path / "a.jsonl").write_text("not json\n" + json.dumps(row))
    assert detect_schema(plan_parts(Files(paths=(str(tmp_path / "a.jsonl"),)), 10**6), "text") == schema


def test_schema_that_cannot_be_told_names_row_and_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}')
    with pytest.raises(StageFailed, match=r"a\.jsonl:1, whose fields are \['body'\]; expected 'text'.*text_field"):
        detect_schema(plan_parts(Files(paths=(str(tmp_path / "a.jsonl"),)), 10**6), "text")


def test_rejected_rows_are_named_by_file_and_line_in_any_part(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i} " + "x" * 40}) for i in range(1, 101)]
    lines[2], lines[70], lines[98] = "{", '["a"]', '{"txt": 1}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    parts = plan_parts(Files(paths=(str(path),)), 1024)
    assert len(parts) > 3
    readers = [PartReader(part, "text", "text") for part in parts]
    texts = [document.text for reader in readers for _, document in reader]
    assert [int(text.split()[1]) for text in texts] == [i for i in range(1, 101) if i not in (3, 71, 99)]
    assert sum(reader.num_rows for reader in readers) == 100
    places = [example.split(" ")[0] for reader in readers for example in reader.examples]
    assert places == ["a.jsonl:3:", "a.jsonl:71:", "a.jsonl:99:"]
