"""What the scored text says: its bytes, n-grams of the training split, and where there is none."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.errors import StageFailed
from stages.evaluate.text import examine_text
from stages.formats.tokens import TokenRows, shard_name, to_parquet
from stages.storage import Folder
from tests.fakes import artifact_of
from tests.stages.evaluate.tiny import make_dataset
from tests.stages.tiny import dataset_info, write_dataset

TEXTS = ["Größe zählt nicht, naïve façade €5", "the cat sat on the mat", "日本語 text"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Texts of two and three bytes a character, one a row, each between tokens that spell nothing."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "tokenizer")
    length = 64
    ids, owners, mask = np.zeros((3, length), np.int32), np.full((3, length), -1), np.zeros((3, length), bool)
    for row, text in enumerate(TEXTS):
        tokens = [0, *tokenizer.encode(text).ids, 0]
        ids[row, : len(tokens)], owners[row, : len(tokens)], mask[row, 1 : len(tokens)] = tokens, row, True
    (folder / "tokens").mkdir()
    for split in ("validation", "train"):
        (folder / shard_name(split, 0)).write_bytes(to_parquet(TokenRows(ids, owners, mask)))
    dataset_info(vocabulary_size=300, sequence_length=length).write(Folder.at(folder))
    return artifact_of("dataset", folder)


def test_bytes_are_those_of_the_text_that_the_targets_spell(written):
    facts = examine_text(written, written, "validation", max_rows=None, seed=0)
    assert facts.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_ngrams_of_the_same_text_predict_it_far_better_than_chance(written):
    facts = examine_text(written, written, "validation", max_rows=None, seed=0)
    assert facts.training_tokens > 25
    assert 0 < facts.trigram_nll < facts.bigram_nll < np.log(300)


def test_dataset_without_a_training_split_has_no_ngrams(tmp_path):
    data = make_dataset(tmp_path)
    facts = examine_text(data, data, "validation", max_rows=4, seed=0)
    assert (facts.training_tokens, facts.bigram_nll, facts.trigram_nll) == (0, None, None)
    assert facts.text_bytes > 0


def test_training_tokens_of_another_tokenizer_are_refused(tmp_path):
    data, training = make_dataset(tmp_path / "data"), write_dataset(tmp_path / "training")
    with pytest.raises(StageFailed, match="prepare both with the same one"):
        examine_text(data, training, "validation", max_rows=None, seed=0)
