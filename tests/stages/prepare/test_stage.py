"""The stage as a whole: the dataset that it leaves, splits, resuming, sources, and how it fails."""

import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from stages.contract import Context, Outcome, read_receipts
from stages.errors import ConfigError, StageFailed
from stages.external.checkpoints import PretrainedTokenizer
from stages.external.documents import Files, PythonDocs
from stages.formats.dataset import DatasetInfo, Duplicates, OverlongDocuments, RejectedRows, SplitCounts
from stages.formats.tokens import read_rows
from stages.prepare import work
from stages.prepare.stage import ByteLevelBPE, Prepare
from stages.storage import Folder
from tests.fakes import RecordingReporter, artifact_of, fake_context
from tests.stages.prepare.tokenizers import gpt2_like, llama_like, qwen_like, saved

SPLITS = ("train", "validation", "calibration")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


def lines(path: Path, rows: list[Any]) -> Files:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Files(paths=(str(path),))


def texts(num: int) -> list[dict[str, str]]:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls"]
    rng = np.random.default_rng(0)
    return [{"text": f"{i}: " + " ".join(rng.choice(words, 20))} for i in range(num)]


def prepare(tmp_path: Path, source: Any, **fields: Any) -> Prepare:
    fields = {"tokenizer": PretrainedTokenizer(source=str(saved(gpt2_like(), tmp_path / "tokenizer")))} | fields
    fractions = {"validation_fraction": 0.2, "calibration_fraction": 0.2}
    return Prepare(**({"source": source, "sequence_length": 128} | fractions | fields))


def run(stage: Prepare, context: Context) -> Outcome:
    """Run a stage as the engine does: in a Ray task without resources; what it noted stands in the context's reporter."""
    import ray

    task = ray.remote(num_cpus=0, max_retries=0)(lambda: (stage.run(context), context.reporter))
    try:
        found: tuple[Outcome, RecordingReporter] = ray.get(task.remote())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    assert isinstance(context.reporter, RecordingReporter)
    context.reporter.notes += found[1].notes
    return found[0]


def description(context: Context) -> DatasetInfo:
    return DatasetInfo.parse(context.out.get(DatasetInfo.FILE), where=DatasetInfo.FILE)


def shards(context: Context) -> dict[str, bytes]:
    return {
        entry.name: context.out.get(entry.name) for entry in context.out.entries() if entry.name.startswith("tokens/")
    }


def decoded(context: Context, split: str) -> list[str]:
    """Return the split's documents."""
    folder = context.out.local_path()
    assert folder is not None
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    found = []
    for path in sorted(folder.glob(f"tokens/{split}-*.parquet")):
        found += [tokenizer.decode(ids).removesuffix("<|endoftext|>") for ids in segments([path])]
    return found


def segments(paths: list[Path]) -> list[np.ndarray]:
    """Return the tokens of each segment, padding left out."""
    rows = read_rows(paths)
    starts = np.flatnonzero(rows.positions_RT.ravel() == 0)
    parts = zip(*(np.split(column.ravel(), starts[1:]) for column in (rows.ids_RT, rows.document_ids_RT)), strict=True)
    return [ids for ids, owners in parts if owners[0] >= 0]


# ---------------------------------------------------------------- without Ray


def test_check_wants_exactly_one_tokenizer(tmp_path: Path) -> None:
    source = Files(paths=("a.txt",))
    with pytest.raises(ConfigError, match="no tokenizer: set tokenizer=ByteLevelBPE"):
        prepare(tmp_path, source, tokenizer=None).check({})
    with pytest.raises(ConfigError, match="two tokenizers"):
        prepare(tmp_path, source).check({"tokenizer": source})
    prepare(tmp_path, source).check({})
    prepare(tmp_path, source, tokenizer=None).check({"tokenizer": source})


def test_config_with_fractions_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"are 1\.2, expected at most 1"):
        prepare(tmp_path, PythonDocs(), validation_fraction=0.7, calibration_fraction=0.5)
    tokenizer = ByteLevelBPE(vocabulary_size=300)
    with pytest.raises(ValidationError, match="no text to train the tokenizer on"):
        prepare(tmp_path, PythonDocs(), tokenizer=tokenizer, validation_fraction=0.5, calibration_fraction=0.5)


# ---------------------------------------------------------------- with Ray


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_dataset_of_texts_holds_every_document_on_one_side(tmp_path: Path) -> None:
    rows = texts(60)
    rows += [{"text": row["text"].replace(" ", "  ")} for row in rows[:20]]  # duplicates but for white space
    source = lines(tmp_path / "a.jsonl", rows)
    context = fake_context(tmp_path / "one", workers=2)
    outcome = run(prepare(tmp_path, source, part_bytes=1024), context)
    sides = {split: decoded(context, split) for split in SPLITS}
    assert sorted(text for side in sides.values() for text in side) == sorted(row["text"] for row in rows)
    normalized = [{" ".join(text.split()) for text in side} for side in sides.values()]
    assert sum(map(len, normalized)) == 60
    assert all(normalized)
    found = description(context)
    assert found.sequence_length == 128
    assert found.rejected == RejectedRows(count=0, rows_read=80, examples=())
    assert found.duplicates == Duplicates(similarity=0.8, exact=20, near=0, moved=0)
    assert outcome.metrics["exact_duplicates"] == 20
    for split, side in sides.items():
        names = [name for name in shards(context) if name.startswith(f"tokens/{split}-")]
        tables = [pq.read_table(f"{context.out.uri}/{name}") for name in names]
        assert found.splits[split] == SplitCounts(
            shards=len(names),
            rows=sum(table.num_rows for table in tables),
            tokens=sum(int(np.sum(table["loss_mask"].to_pylist())) for table in tables),
            documents=len(side),
            filled=sum(int((np.array(table["document_ids"].to_pylist()) >= 0).sum()) for table in tables),
        )
        assert outcome.metrics[f"{split}_documents"] == len(side)
    assert {file.name for file in read_receipts(context.resume)} == set(shards(context))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_dataset_does_not_depend_on_workers_or_on_where_the_source_lies(tmp_path: Path) -> None:
    datasets = []
    for name, workers in (("one", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        source = lines(tmp_path / name / "a.jsonl", texts(60))
        context = fake_context(tmp_path / f"{name}-out", workers=workers)
        run(prepare(tmp_path, source, part_bytes=2048, tokenizer=ByteLevelBPE(vocabulary_size=270)), context)
        datasets.append({entry.name: context.out.get(entry.name) for entry in context.out.entries()})
    assert datasets[0] == datasets[1]


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_near_duplicates_of_a_cloned_dataset_are_on_one_side_and_what_is_not_used_is_told(tmp_path: Path) -> None:
    rows = [{"text": f"{row['text']} {row['text'][::-1]}", "url": "x"} for row in texts(40)]
    rows += [{**row, "text": f"{row['text']} indeed"} for row in rows]
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "README.md").write_text("# A card")
    lines(tmp_path / "clone" / "test.jsonl", texts(3))
    lines(tmp_path / "clone" / "train.jsonl", rows)
    context = fake_context(tmp_path)
    source = Files(paths=(str(tmp_path / "clone"),))
    run(prepare(tmp_path, source, part_bytes=2048, sequence_length=512), context)
    sides = {text.removesuffix(" indeed"): split for split in SPLITS for text in decoded(context, split)}
    assert len(sides) == 40
    for split in SPLITS:
        assert all(sides[text.removesuffix(" indeed")] == split for text in decoded(context, split))
    found = description(context)
    assert found.duplicates is not None
    assert found.duplicates.near == 40
    assert found.unused_fields == {"url": 80}
    assert isinstance(context.reporter, RecordingReporter)
    files, fields, copies = context.reporter.notes
    assert "1 files are read; left out: README.md (about the data); test.jsonl (split 'test')" in files
    assert fields == "fields of rows that are not used: url (80 rows)"
    assert copies.startswith("0 documents are copies of others and 40 nearly so")


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_second_attempt_writes_only_what_is_missing_and_the_same_bytes(tmp_path: Path) -> None:
    stage = prepare(tmp_path, lines(tmp_path / "a.jsonl", texts(60)), part_bytes=2048)
    first = fake_context(tmp_path)
    run(stage, first)
    before = shards(first)
    lost = sorted(name for name in before if name.startswith("tokens/train-"))[1]
    first.out.delete([lost])
    (first.resume / "receipts").delete([lost.replace("/", "~") + ".json"])
    second = Context(
        first.fingerprint, {}, Folder.at(tmp_path / "second"), first.resume, first.resources, RecordingReporter()
    )
    run(stage, second)
    assert shards(second) == {lost: before[lost]}
    receipts = {file.name: file.uri for file in read_receipts(first.resume)}
    assert set(receipts) == set(before)
    assert [name for name, uri in receipts.items() if uri.startswith(second.out.uri)] == [lost]
    assert description(second) == description(first)
    assert isinstance(second.reporter, RecordingReporter)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_part_gives_shards_of_about_the_tokens_that_are_asked_for_and_one_of_them_is_what_a_crash_costs(
    tmp_path: Path,
) -> None:
    stage = prepare(tmp_path, lines(tmp_path / "a.jsonl", texts(200)), sequence_length=256, shard_tokens=1024)
    context = fake_context(tmp_path)
    run(stage, context)
    before = shards(context)
    rows = [pq.read_metadata(f"{context.out.uri}/{name}").num_rows for name in sorted(before) if "train" in name]
    assert len(rows) > 3
    assert max(rows) <= 6
    assert rows[0] == rows[1] == 4
    lost = "tokens/train-00000-00001.parquet"
    context.out.delete([lost])
    (context.resume / "receipts").delete([lost.replace("/", "~") + ".json"])
    again = Context(context.fingerprint, {}, Folder.at(tmp_path / "again"), *(
        getattr(context, name) for name in ("resume", "resources", "reporter")
    ))  # fmt: skip
    run(stage, again)
    assert shards(again) == {lost: before[lost]}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("overlong", "kept"), [("reject", 30), ("truncate", 40)])
def test_rows_longer_than_a_row_are_counted_and_told_with_their_share(tmp_path: Path, overlong: str, kept: int) -> None:
    rows = [{"prompt": "say it", "completion": "yes " * (60 if i % 4 == 0 else 3)} for i in range(40)]
    rows = [{**row, "prompt": f"{i}: {row['prompt']}"} for i, row in enumerate(rows)]
    context = fake_context(tmp_path)
    stage = prepare(tmp_path, lines(tmp_path / "a.jsonl", rows), sequence_length=64, overlong=overlong)
    outcome = stage.run(context)  # here, where what it reports is seen
    assert description(context).overlong == OverlongDocuments(handling=overlong, count=10, fraction=0.25)
    assert sum(of.documents for of in description(context).splits.values()) == kept
    assert outcome.metrics["overlong_documents"] == 10
    assert isinstance(context.reporter, RecordingReporter)
    assert any("10 chats or labelled rows, 25.0%, are longer" in note for note in context.reporter.notes)
    short = prepare(tmp_path, lines(tmp_path / "a.jsonl", rows), sequence_length=8)
    with pytest.raises(StageFailed, match="all 40 chats or labelled rows are longer than sequence_length=8"):
        run(short, fake_context(tmp_path / "short"))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_chats_whose_prompt_fills_a_row_are_counted_apart_of_those_that_lose_their_end(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}: " + "say it " * (60 if i % 4 == 0 else 1), "completion": "yes " * 60} for i in range(40)]
    context = fake_context(tmp_path)
    stage = prepare(tmp_path, lines(tmp_path / "a.jsonl", rows), sequence_length=64, overlong="truncate")
    stage.run(context)
    found = description(context)
    assert found.overlong == OverlongDocuments(handling="truncate", count=40, unanswered=10, fraction=1.0)
    assert sum(of.documents for of in found.splits.values()) == 30
    assert isinstance(context.reporter, RecordingReporter)
    assert any(note.endswith("10 of them had no answer left and are left out") for note in context.reporter.notes)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_every_segment_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    tokenizer = llama_like()
    source = PretrainedTokenizer(source=str(saved(tokenizer, tmp_path / "llama")))
    long = [{"text": row["text"] * 5} for row in texts(40)]
    context = fake_context(tmp_path)
    run(prepare(tmp_path, lines(tmp_path / "a.jsonl", long), tokenizer=source, sequence_length=32), context)
    paths = sorted(Path(context.out.uri).glob("tokens/*.parquet"))
    found = segments(paths)
    assert len(found) > 300
    assert all(ids[0] == tokenizer.bos_token_id and (ids[1:] != tokenizer.bos_token_id).all() for ids in found)
    rows = read_rows(paths)
    assert not rows.mask_RT[rows.ids_RT == tokenizer.bos_token_id].any()
    num_tokens = sum(len(tokenizer(row["text"])["input_ids"]) for row in long)  # one more begins, one more ends each
    assert sum(of.tokens for of in description(context).splits.values()) == rows.mask_RT.sum() == num_tokens


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_second_attempt_in_the_same_folder_keeps_what_is_there(tmp_path: Path) -> None:
    stage = prepare(tmp_path, lines(tmp_path / "a.jsonl", texts(60)), part_bytes=2048)
    context = fake_context(tmp_path)
    run(stage, context)
    before = shards(context)
    lost = sorted(before)[0]
    context.out.delete([lost])
    (context.resume / "receipts").delete([lost.replace("/", "~") + ".json"])
    run(stage, context)
    assert shards(context) == before


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_rejected_rows_within_the_limit_are_shown_and_above_it_fail(tmp_path: Path) -> None:
    rows: list[Any] = texts(60)
    rows[7] = {"txt": "?"}
    source = lines(tmp_path / "a.jsonl", rows)
    context = fake_context(tmp_path / "one")
    outcome = run(prepare(tmp_path, source, max_rejected_fraction=0.02), context)
    assert outcome.metrics["rejected_rows"] == 1
    assert description(context).rejected == RejectedRows(
        count=1, rows_read=60, examples=("a.jsonl:8: no field 'text'; did you mean 'txt'? (known: txt)",)
    )
    with pytest.raises(
        StageFailed, match=r"1 of 60 rows are not.*max_rejected_fraction=0\.01[\s\S]*a\.jsonl:8: no field"
    ):
        run(prepare(tmp_path, source), fake_context(tmp_path / "two"))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_chats_take_their_tokenizer_from_a_model(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": f"ok {i}"}]}
        for i, row in enumerate(texts(40))
    ]
    model = artifact_of("model", saved(qwen_like(), tmp_path / "artifact" / "model").parent)
    context = fake_context(tmp_path, {"tokenizer": model})
    run(prepare(tmp_path, lines(tmp_path / "a.jsonl", rows), tokenizer=None), context)
    found = description(context)
    assert found.eos_token_id != found.pad_token_id
    num_tokens = sum(of.tokens for of in found.splits.values())
    answers = sum(len(qwen_like()(f"ok {i}<|im_end|>")["input_ids"]) for i in range(40))
    assert num_tokens == pytest.approx(answers, abs=10)  # a row's first token is no target


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_documents_given_whole_to_validation_make_a_dataset_and_one_alone_has_nothing_to_compare_by(
    tmp_path: Path,
) -> None:
    context, whole = fake_context(tmp_path), {"validation_fraction": 1, "calibration_fraction": 0}
    with pytest.raises(StageFailed, match="too few fall into validation; about 2 documents are needed"):
        run(prepare(tmp_path, lines(tmp_path / "a.jsonl", texts(1)), **whole), context)
    context = fake_context(tmp_path / "two")
    run(prepare(tmp_path, lines(tmp_path / "a.jsonl", texts(2)), **whole), context)
    assert {split: of.documents for split, of in description(context).splits.items()} == {
        "train": 0,
        "validation": 2,
        "calibration": 0,
    }


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_step_that_counts_documents_before_it_has_workers_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a large corpus takes longer than a step may wait for its resources."""
    context, started = fake_context(tmp_path), []

    def limit_documents(parts: object, **_: object) -> NoReturn:
        assert isinstance(context.reporter, RecordingReporter)
        started.append(context.reporter.has_begun)
        raise StageFailed("seen")

    monkeypatch.setattr(work, "limit_documents", limit_documents)
    with pytest.raises(StageFailed, match="seen"):
        prepare(tmp_path, lines(tmp_path / "a.jsonl", texts(2)), max_documents=1).run(context)
    assert started == [True]


def test_max_documents_takes_the_first_ones_across_parts(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", texts(200))
    context = fake_context(tmp_path)
    run(prepare(tmp_path, source, part_bytes=2048, max_documents=50), context)
    found = sorted(int(text.split(":")[0]) for split in SPLITS for text in decoded(context, split))
    assert found == list(range(50))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "  "}] * 5, "no usable text"),
        (texts(3), r"too little text: 3 documents with \d+ tokens.*too few fall into .*about 21 documents are needed"),
    ],
    ids=["blank", "few"],
)
def test_source_with_too_little_text_fails_with_numbers(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(StageFailed, match=message) as caught:
        run(prepare(tmp_path, lines(tmp_path / "a.jsonl", rows)), fake_context(tmp_path))
    assert type(caught.value) is StageFailed


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_failure_in_a_worker_keeps_its_type_and_message(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    stage = prepare(tmp_path, Files(paths=(str(tmp_path / "a.parquet"),)), row_schema="text")
    with pytest.raises(StageFailed, match=r"'a\.parquet' is not Parquet") as caught:
        run(stage, fake_context(tmp_path))
    assert "Traceback" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_python_docs_make_a_dataset_with_its_own_tokenizer(tmp_path: Path) -> None:
    context = fake_context(tmp_path, workers=2)
    outcome = run(
        Prepare(
            source=PythonDocs(), tokenizer=ByteLevelBPE(vocabulary_size=512), sequence_length=128, max_documents=90
        ),
        context,
    )
    assert outcome.metrics["vocabulary_size"] == 512
    assert outcome.metrics["train_tokens"] > 100_000
    assert sum(outcome.metrics[f"{split}_documents"] for split in SPLITS) == 90
