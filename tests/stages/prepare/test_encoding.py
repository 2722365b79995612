"""Tokens, masks and packing: what is decoded is what was written, and only targets are redacted true."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from stages.errors import StageFailed
from stages.prepare.documents import document_of
from stages.prepare.encoding import Encoded, Encoder, build_encoder
from stages.prepare.tokenizer import describe_tokenizer, train_byte_level_bpe
from tests.stages.prepare.tokenizers import CHATML, CHATML_MARKED, TEXT, gpt2_like, llama_like, qwen_like, saved

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "I am fine"},
    {"role": "user", "content": "and you? é"},
    {"role": "assistant", "content": "Fine é too"},
]
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}A: {{ m.content | length }}\n"
    "{% elif m.role == 'assistant' %}A: {{ m.content }}\n{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


def encoder_of(tokenizer: Any, folder: Path) -> Encoder:
    return Encoder(describe_tokenizer(tokenizer, saved(tokenizer, folder))[0])


def encode(tokenizer: Any, folder: Path, schema: Any, value: Any) -> Encoded | str:
    document = document_of(value, schema, "text")
    assert document is not None
    return encoder_of(tokenizer, folder).encode([document])[0]


def targets(tokenizer: Any, encoded: Encoded | str) -> str:
    """Decode the targets only, each run of them in brackets."""
    assert isinstance(encoded, Encoded)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.mask, [False]]).astype(int)))
    runs = [encoded.ids[start:stop] for start, stop in edges.reshape(-1, 2)]
    return "".join(f"[{tokenizer.decode(run)}]" for run in runs)


def test_text_is_a_target_wholly_and_ends_with_eos(tmp_path: Path) -> None:
    tokenizer = gpt2_like()
    encoded = encode(tokenizer, tmp_path, "text", {"text": "Hello  fox é\n"})
    assert targets(tokenizer, encoded) == "[Hello  fox é\n<|endoftext|>]"


def test_text_begins_with_the_token_that_its_tokenizer_begins_with(tmp_path: Path) -> None:
    tokenizer = llama_like()
    encoded = encode(tokenizer, tmp_path, "text", {"text": "Hello"})
    assert isinstance(encoded, Encoded)
    assert encoded.ids.tolist() == [*tokenizer("Hello")["input_ids"], tokenizer.eos_token_id]
    assert targets(tokenizer, encoded) == "[Hello</s>]"


def test_completion_alone_is_a_target(tmp_path: Path) -> None:
    tokenizer = gpt2_like()
    encoded = encode(tokenizer, tmp_path, "prompt-completion", {"prompt": "Hello there, ", "completion": "fox"})
    assert isinstance(encoded, Encoded)
    assert tokenizer.decode(encoded.ids) == "Hello there, fox<|endoftext|>"
    assert targets(tokenizer, encoded) == "[fox<|endoftext|>]"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["by-rendering", "by-generation-blocks"])
def test_chat_targets_are_what_the_assistant_says(tmp_path: Path, template: str) -> None:
    tokenizer = qwen_like(template)
    encoded = encode(tokenizer, tmp_path, "chat", {"messages": CHAT})
    assert isinstance(encoded, Encoded)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(encoded.ids) == whole + "<|im_end|>"
    assert targets(tokenizer, encoded) == "[I am fine<|im_end|>][Fine é too<|im_end|>]"


def test_chat_mask_by_generation_blocks_is_that_of_transformers(tmp_path: Path) -> None:
    tokenizer = qwen_like(CHATML_MARKED)
    encoded = encode(tokenizer, tmp_path, "chat", {"messages": CHAT})
    assert isinstance(encoded, Encoded)
    theirs = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded.ids[:-1].tolist() == theirs["input_ids"]
    assert encoded.mask[:-1].astype(int).tolist() == theirs["assistant_masks"]


def test_chat_without_a_template_takes_the_default_one(tmp_path: Path) -> None:
    tokenizer = gpt2_like()
    encoded = encode(tokenizer, tmp_path, "chat", {"messages": CHAT[1:3]})
    assert isinstance(encoded, Encoded)
    assert tokenizer.decode(encoded.ids) == "User: Hello there\nAssistant: I am fine<|endoftext|>"
    assert targets(tokenizer, encoded) == "[ I am fine<|endoftext|>]"
    beginning = encode(llama_like(), tmp_path, "chat", {"messages": CHAT[1:3]})
    assert isinstance(beginning, Encoded)
    assert beginning.ids[0] == llama_like().bos_token_id
    assert targets(llama_like(), beginning) == "[ I am fine</s>]"


def test_chat_of_a_forgetful_template_has_its_last_answer_as_target(tmp_path: Path) -> None:
    tokenizer = qwen_like(FORGETFUL)
    encoded = encode(tokenizer, tmp_path, "chat", {"messages": CHAT})
    assert targets(tokenizer, encoded) == "[Fine é too]"
    assert isinstance(encoded, Encoded)
    assert encoded.num_unlearned == 1


ASKED = [*CHAT, {"role": "user", "content": "And 3+3?"}]
THOUGHTFUL = (  # as Qwen3's: the last answer alone has an empty thought
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTING = (  # as Llama 3's first: a prompt for an answer is at the end, asked for or not
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant\n\n"
)
PONDERING = (  # as DeepSeek R1's: the prompt for an answer begins a thought that a chat does not keep
    "{% for m in messages %}<|im_start|>{{ m.role }}|{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant|<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "chat", "said"),
    [
        (THOUGHTFUL, CHAT, "[I am fine<|im_end|>][<think>\n\n</think>\n\nFine é too<|im_end|>]"),
        (THOUGHTFUL, ASKED, "[I am fine<|im_end|>][Fine é too<|im_end|>]"),
        (PROMPTING, CHAT, "[I am fine<|im_end|>][Fine é too<|im_end|>]"),
        (PROMPTING, ASKED, "[I am fine<|im_end|>][Fine é too<|im_end|>]"),
        (PONDERING, CHAT, "[I am fine<|im_end|>][Fine é too<|im_end|>]"),
        (CHATML, CHAT[2:], "[I am fine<|im_end|>][Fine é too<|im_end|>]"),
        (CHATML, [{"role": "assistant", "content": "assistant"}], "[assistant<|im_end|>]"),
        (PROMPTING, [CHAT[1], {"role": "assistant", "content": "e"}], "[e<|im_end|>]"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", CHAT[1:3], "[I am fine]"),
    ],
    ids=[
        "thoughtful",
        "thoughtful-asked",
        "prompting",
        "prompting-asked",
        "pondering",
        "answer-first",
        "its-own-role",
        "one-letter",
        "promptless",
    ],
)
def test_chat_of_a_template_that_shows_answers_in_its_own_way_has_them_all_as_targets(
    tmp_path: Path, template: str, chat: list[dict[str, str]], said: str
) -> None:
    tokenizer = qwen_like(template)
    encoded = encode(tokenizer, tmp_path, "chat", {"messages": chat})
    assert targets(tokenizer, encoded) == said
    assert isinstance(encoded, Encoded)
    assert encoded.num_unlearned == 0
    assert encoded.ids[-1] == tokenizer.eos_token_id


def test_chat_targets_have_their_spaces_where_offsets_are_trimmed(tmp_path: Path) -> None:
    tokenizer = qwen_like()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "a   b"}]
    assert targets(tokenizer, encode(tokenizer, tmp_path, "chat", {"messages": chat})) == "[a   b<|im_end|>]"


def test_document_with_a_token_that_the_model_does_not_know_is_told_so(tmp_path: Path) -> None:
    """As Gemma 3's tokenizer has a token for images, for which its models of text have no embedding."""
    folder = saved(qwen_like(), tmp_path)
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 302}')
    state, facts = describe_tokenizer(qwen_like(), folder)
    assert facts.vocabulary_size == 302
    documents = [document_of({"text": text}, "text", "text") for text in ("Hello <|im_start|>", "Hello <|im_end|>")]
    # The end of each text is <|im_end|>, 302 itself: what fits is judged by ids alone.
    found = Encoder(replace(state, eos_token_id=300)).encode([each for each in documents if each])
    assert isinstance(found[0], Encoded)
    assert "'<|im_end|>', whose id 302 the model does not know (it knows 302)" in str(found[1])


def test_chat_with_half_a_surrogate_pair_in_what_its_template_shows_is_refused(tmp_path: Path) -> None:
    tokenizer = qwen_like("{% for m in messages %}{{ m.thought }}{{ m.content }}{% endfor %}")
    chat = [{"role": "assistant", "content": "a", "thought": "\ud83e"}]
    assert "half of a surrogate pair at character 0" in str(encode(tokenizer, tmp_path, "chat", {"messages": chat}))


def test_chat_that_its_template_refuses_comes_back_with_the_reason(tmp_path: Path) -> None:
    refusing = qwen_like("{{ raise_exception('no system message, please') }}")
    assert "no system message, please" in str(encode(refusing, tmp_path, "chat", {"messages": CHAT}))
    silent = qwen_like("{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}")
    assert "no answer of the assistant that can be distinguished" in str(
        encode(silent, tmp_path, "chat", {"messages": CHAT})
    )


def test_chat_template_with_the_date_gives_the_same_tokens_every_day(tmp_path: Path) -> None:
    tokenizer = qwen_like("{{ strftime_now('%d %b %Y') }} " + CHATML)
    encoded = encode(tokenizer, tmp_path, "chat", {"messages": CHAT})
    assert isinstance(encoded, Encoded)
    assert tokenizer.decode(encoded.ids).startswith("26 Jul 2024 <|im_start|>")


def test_document_begins_with_all_that_the_tokenizer_puts_first_and_none_of_it_is_a_target(tmp_path: Path) -> None:
    tokenizer = llama_like()
    begin, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    two = processors.TemplateProcessing(single="<s> </s> $A", special_tokens=[("<s>", begin), ("</s>", end)])
    tokenizer.backend_tokenizer.post_processor = two
    state, _ = describe_tokenizer(tokenizer, tmp_path)
    assert state.prefix == (begin, end)
    for schema, row in (("text", {"text": "Hello"}), ("chat", {"messages": CHAT[1:3]})):
        document = document_of(row, schema, "text")
        assert document is not None
        (encoded,) = build_encoder(state).encode([document])
        assert isinstance(encoded, Encoded)
        assert encoded.ids[:2].tolist() == [begin, end]
        assert not encoded.mask[:2].any()
        assert encoded.ids.tolist().count(begin) == 1
    assert describe_tokenizer(gpt2_like(), tmp_path)[0].prefix == ()


def test_chat_whose_template_writes_the_first_token_does_not_get_it_twice(tmp_path: Path) -> None:
    tokenizer = llama_like()
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    encoded = encode(tokenizer, tmp_path, "chat", {"messages": CHAT[1:3]})
    assert isinstance(encoded, Encoded)
    assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert encoded.ids[0] == tokenizer.bos_token_id


def test_trained_tokenizer_is_deterministic_and_encodes_anything(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_byte_level_bpe(iter(TEXT), vocabulary_size=280).save_pretrained(tmp_path / name)
    files = [[path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two")]
    assert files[0] == files[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("<|endoftext|>", None, None)
    assert tokenizer.decode(tokenizer("žluťoučký 🦊\t\x00")["input_ids"]) == "žluťoučký 🦊\t\x00"
    assert len(tokenizer) == 280


def test_trained_tokenizer_of_too_little_text_says_how_many_it_yields() -> None:
    with pytest.raises(StageFailed, match=r"too small for vocabulary_size=9000: it yields \d+ different tokens; lower"):
        train_byte_level_bpe(iter(TEXT), vocabulary_size=9000)


def test_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = gpt2_like()
    tokenizer.eos_token = None
    with pytest.raises(StageFailed, match="has no eos_token to end each document with"):
        describe_tokenizer(tokenizer, saved(tokenizer, tmp_path))


def test_encoders_of_one_process_keep_their_own_chat_templates(tmp_path: Path) -> None:
    state, _ = describe_tokenizer(gpt2_like(), saved(gpt2_like(), tmp_path))
    other = replace(state, chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    document = document_of({"messages": CHAT}, "chat", "text")
    assert document is not None
    first, second = (build_encoder(each).encode([document])[0] for each in (state, other))
    assert isinstance(first, Encoded)
    assert isinstance(second, Encoded)
    assert first.ids.tolist() != second.ids.tolist()
