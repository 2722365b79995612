"""Near duplicates: estimated as similar as they are, and on one side whatever the order, the parts and the workers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.external.documents import Files
from stages.prepare import duplicates
from stages.prepare.division import Division
from stages.prepare.documents import PartReader, document_of
from stages.prepare.duplicates import keep_together, shingles, sign_part, signed_parts, sketch
from stages.prepare.parts import plan_parts
from stages.storage import Folder

DIVISION = Division(seed=3, validation_fraction=0.2, calibration_fraction=0.2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


def words(num: int, seed: int) -> list[str]:
    return [f"w{i}" for i in np.random.default_rng(seed).integers(0, 10**6, num)]


def corpus(num: int = 60, copies: int = 3) -> list[str]:
    """Return texts of 120 words, each with copies of which a word or two are others; and short ones, all distinct."""
    rng, texts = np.random.default_rng(0), []
    for i in range(num):
        text = words(120, i)
        texts.append(" ".join(text))
        for copy in range(copies):
            changed = list(text)
            changed[int(rng.integers(1, 119))] = f"changed{copy}"
            texts.append(" ".join(changed))
    return texts + [f"What is {i} plus {i}?" for i in range(40)]


def sides(
    folder: Path, rows: list[dict[str, Any]], *, part_bytes: int, schema: Any = "text", similarity: float = 0.8
) -> Any:
    """Return text → side, and the counts."""
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = plan_parts(Files(paths=(str(folder / "a.jsonl"),)), part_bytes)
    signatures = Folder.at(folder / "signatures")
    for part in reversed(parts):
        sign_part(part, schema=schema, text_field="text", folder=signatures)
    assert signed_parts(signatures) == {part.index for part in parts}
    division, found = keep_together(signatures, DIVISION, similarity)
    documents = [document for part in parts for _, document in PartReader(part, schema, "text")]
    return {duplicates.compared_text(d): division.side(d.digest) for d in documents}, found


def test_near_duplicates_fall_on_one_side_and_are_counted(tmp_path: Path) -> None:
    texts = corpus()
    exact = [text.replace(" ", "  ") for text in texts[:5]]
    found, counts = sides(tmp_path / "a", [{"text": text} for text in texts + exact], part_bytes=10**9)
    for i in range(60):
        assert len({found[text] for text in texts[4 * i : 4 * i + 4]}) == 1
    assert (counts.exact, counts.near) == (5, 180)
    own = [DIVISION.side(document_of(text, "text", "text").digest) for text in texts + exact]  # type: ignore[union-attr]
    assert counts.moved == sum(found[text] != side for text, side in zip(texts + exact, own, strict=True)) > 50
    assert {found[text] for text in texts[240:]} == {"train", "validation", "calibration"}
    for split, fraction in DIVISION.fractions.items():  # 4 standard deviations of 60 clusters
        share = sum(found[text] == split for text in texts[:240]) / 240
        assert share == pytest.approx(fraction, abs=4 * (fraction * (1 - fraction) / 60) ** 0.5)


def test_sides_depend_on_the_documents_alone(tmp_path: Path) -> None:
    rows = [{"text": text} for text in corpus(20)]
    one, counts = sides(tmp_path / "a", rows, part_bytes=10**9)
    other, counts_of_other = sides(tmp_path / "b", rows[::-1], part_bytes=3000)
    assert one == other
    assert counts == counts_of_other


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.95])
def test_estimate_of_similarity_is_that_of_the_sets(similarity: float) -> None:
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(40):
        common = rng.integers(0, 2**32, round(2000 * similarity / (1 + similarity)), np.uint64)
        own = rng.integers(0, 2**32, (2, 1000 - len(common)), np.uint64)
        one, two = (sketch(np.concatenate([common, rest])) for rest in own)
        errors.append(float((one == two).mean()) - len(common) / (2000 - len(common)))
    # The mean of 40 estimates, each with a standard deviation of at most (0.25/128)^½.
    assert np.mean(errors) == pytest.approx(0, abs=4 * (0.25 / 128 / 40) ** 0.5)


def test_shingles_are_those_of_words_without_case_and_punctuation_in_any_script() -> None:
    assert shingles("The quick, brown fox jumps!").tolist() == shingles("the quick brown  FOX jumps").tolist()
    assert len(shingles("one two three four five six seven")) == 3
    assert len(shingles("one two")) == 1
    assert len(shingles("…!")) == 0
    assert len(shingles("快速的棕色狐狸跳过懒狗")) == 11 - 4
    assert len(np.unique(shingles(" ".join(words(3000, 0))))) == 2996


def test_long_text_is_sketched_as_its_shingles_together() -> None:
    hashes = shingles(" ".join(words(20_000, 0)))
    parts = [sketch(part) for part in np.array_split(hashes, 7)]
    assert (sketch(hashes) == np.min(parts, axis=0)).all()


def test_chats_that_share_their_system_message_only_are_no_duplicates(tmp_path: Path) -> None:
    system = {"role": "system", "content": " ".join(words(400, 99))}
    rows = [
        {
            "messages": [
                system,
                {"role": "user", "content": " ".join(words(20, i))},
                {"role": "assistant", "content": " ".join(words(40, 100 + i))},
            ]
        }
        for i in range(50)
    ]
    _, counts = sides(tmp_path / "a", rows, part_bytes=10**9, schema="chat")
    assert (counts.exact, counts.near, counts.moved) == (0, 0, 0)


@pytest.mark.parametrize("own_words", [1, 8, 15, 60])
def test_rows_that_share_their_instruction_are_divided_by_what_is_learned_of_them(
    tmp_path: Path, own_words: int
) -> None:
    """Answers of one word are few, and no copies of one another."""
    instruction = " ".join(words(250, 99))
    answers = [words(1, i % 2) if own_words == 1 else words(own_words, i) for i in range(200)]
    rows = [{"prompt": f"{instruction} {i}", "completion": " ".join(answers[i])} for i in range(200)]
    chats = [
        {"messages": [{"role": r, "content": row[f]} for r, f in (("user", "prompt"), ("assistant", "completion"))]}
        for row in rows
    ]
    for schema, given in (("prompt-completion", rows), ("chat", chats)):
        _, counts = sides(tmp_path / schema, given, part_bytes=10**9, schema=schema)
        assert (counts.exact, counts.near, counts.moved, counts.divided) == (0, 0, 0, 0)


def test_rows_whose_answers_are_nearly_the_same_fall_on_one_side(tmp_path: Path) -> None:
    answers = [words(80, i // 2) for i in range(100)]
    rows = [{"prompt": f"question {i}", "completion": " ".join([*answers[i], str(i % 2)])} for i in range(100)]
    found, counts = sides(tmp_path / "a", rows, part_bytes=10**9, schema="prompt-completion")
    assert counts.near == 50
    assert all(found[rows[i]["completion"]] == found[rows[i + 1]["completion"]] for i in range(0, 100, 2))


def test_similarity_of_1_keeps_equal_texts_together_and_no_others(tmp_path: Path) -> None:
    texts = corpus(20, copies=1)
    same = [text.upper() for text in texts[:10]]  # of other content, with the same words
    _, counts = sides(tmp_path / "a", [{"text": text} for text in texts + same], part_bytes=10**9, similarity=1.0)
    assert (counts.exact, counts.near) == (0, 10)


def test_answers_that_call_tools_are_compared_by_their_calls(tmp_path: Path) -> None:
    def chat(i: int) -> dict[str, Any]:
        call = {"function": {"name": "find", "arguments": {"text": " ".join(words(60, i // 2)) + f" {i}"}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": f"question {i}"}, answer]}

    _, counts = sides(tmp_path / "a", [chat(i) for i in range(60)], part_bytes=10**9, schema="chat")
    assert counts.near == 30


def test_cluster_larger_than_a_split_stays_divided_and_is_counted(tmp_path: Path) -> None:
    template = " ".join(words(300, 0))
    rows = [{"text": f"{template} {i}"} for i in range(80)] + [{"text": " ".join(words(50, i))} for i in range(1, 200)]
    found, counts = sides(tmp_path / "a", rows, part_bytes=10**9)
    assert (counts.near, counts.moved, counts.largest, counts.divided) == (79, 0, 80, 80)
    for part in (rows[:80], rows[80:]):
        assert {found[row["text"]] for row in part} == {"train", "validation", "calibration"}


def test_source_without_a_document_has_no_duplicates(tmp_path: Path) -> None:
    found, counts = sides(tmp_path / "a", [{"text": " "}], part_bytes=10**9)
    assert found == {}
    assert counts.near == 0
