"""Chat rows as trainers write them: tools, tool calls, weights, parts and ShareGPT, as templates of real models show them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.external.documents import Files
from stages.prepare.chats import RowRejected
from stages.prepare.documents import Document, PartReader, detect_schema, document_of
from stages.prepare.encoding import Encoded, Encoder
from stages.prepare.parts import plan_parts
from stages.prepare.tokenizer import describe_tokenizer
from tests.stages.prepare.tokenizers import CHATML, CHATML_MARKED, gpt2_like, qwen_like, saved

QWEN3 = (  # tools in the system message, calls as JSON in tags, results as a user's, a thought in the last answer alone
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (  # tools in the first user message, one call as the whole answer, a prompt only where it is asked for
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}<|im_start|>assistant\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "<|im_end|>{% elif m.role == 'tool' %}<|im_start|>ipython\n\n{{ m.content | tojson }}<|im_end|>"
    "{% else %}<|im_start|>{{ m.role }}\n\n{% if loop.first and tools %}{{ tools | tojson }}\n{% endif %}"
    "{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
GEMMA3 = (  # no tools; the roles must alternate, so that no part of a chat with two answers in a row is taken
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = '<tool_call>add {"a": 1}</tool_call><|im_end|>'
USED = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "1"},
    {"role": "assistant", "content": "It is 2"},
]
CHAT = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "no", "weight": 0},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "yes", "weight": 1},
]


def document(row: dict[str, Any], schema: Any = "chat") -> Document:
    found = document_of(row, schema, "text")
    assert found is not None
    return found


def encode(tokenizer: Any, folder: Path, row: dict[str, Any], schema: Any = "chat") -> Encoded | str:
    encoder = Encoder(describe_tokenizer(tokenizer, saved(tokenizer, folder))[0])
    return encoder.encode([document(row, schema)])[0]


def targets(tokenizer: Any, encoded: Encoded | str) -> str:
    """Decode the targets only, each run of them in brackets."""
    assert isinstance(encoded, Encoded), encoded
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.mask, [False]]).astype(int)))
    return "".join(f"[{tokenizer.decode(encoded.ids[a:b])}]" for a, b in edges.reshape(-1, 2))


def text(tokenizer: Any, encoded: Encoded | str) -> str:
    assert isinstance(encoded, Encoded), encoded
    return str(tokenizer.decode(encoded.ids)).removesuffix("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (QWEN3, f"[{CALLED}][<think>\n\n</think>\n\nIt is 2<|im_end|>]"),
        (LLAMA3, '[{"name": "add", "parameters": {"a": 1}}<|im_end|>][It is 2<|im_end|>]'),
    ],
    ids=["qwen3", "llama3"],
)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]]], ids=["list", "json", "bare"])
def test_tools_and_calls_are_rendered_as_the_template_renders_them(
    tmp_path: Path, template: str, said: str, tools: Any
) -> None:
    tokenizer = qwen_like(template)
    encoded = encode(tokenizer, tmp_path, {"messages": USED, "tools": tools})
    called = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    spoken = [USED[0], {"role": "assistant", "content": "", "tool_calls": [called]}, *USED[2:]]
    theirs = tokenizer.apply_chat_template(spoken, tools=[TOOL], tokenize=False)
    assert text(tokenizer, encoded).replace("<|im_end|>", "").rstrip() == theirs.replace("<|im_end|>", "").rstrip()
    assert targets(tokenizer, encoded) == said
    assert isinstance(encoded, Encoded)
    assert (encoded.unused, encoded.num_unlearned) == ((), 0)


def test_call_in_a_chat_of_which_no_part_is_taken_is_found_where_the_chat_goes_on(tmp_path: Path) -> None:
    """A thought before the last answer alone makes every other answer differ from how it was as the last one."""
    tokenizer = qwen_like(QWEN3)
    spoken = [USED[0], {**USED[1], "content": "Let me add."}, *USED[2:], *CHAT[2:]]
    found = targets(tokenizer, encode(tokenizer, tmp_path, {"messages": spoken, "tools": [TOOL]}))
    assert found == f"[Let me add.{CALLED}][It is 2<|im_end|>][<think>\n\n</think>\n\nyes<|im_end|>]"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, QWEN3, LLAMA3, GEMMA3])
@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}], ids=["weight", "train", "axolotl"]
)
def test_answer_that_its_row_takes_out_is_no_target(tmp_path: Path, template: str, mark: dict[str, Any]) -> None:
    tokenizer = qwen_like(template)
    chat = [CHAT[0], {"role": "assistant", "content": "no"} | mark, *CHAT[2:]]
    encoded = encode(tokenizer, tmp_path, {"messages": chat})
    assert targets(tokenizer, encoded).replace("<think>\n\n</think>\n\n", "") == "[yes<|im_end|>]"
    assert "no<|im_end|>" in text(tokenizer, encoded)
    assert isinstance(encoded, Encoded)
    assert encoded.num_unlearned == 0


def test_content_of_text_parts_is_joined_and_other_parts_are_refused() -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    assert document({"messages": [{"role": "assistant", "content": parts}]}).messages[0]["content"] == "Hello there"
    picture = [{"role": "user", "content": [*parts, {"type": "image_url", "image_url": {}}]}, CHAT[3]]
    with pytest.raises(
        RowRejected, match=r"messages\[0\]: content\[2\] is a part of the type 'image_url', expected text"
    ):
        document({"messages": picture})


def test_sharegpt_is_read_with_its_system_tools_and_calls(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "It is 2"},
    ]
    tokenizer = qwen_like(QWEN3)
    row = {"conversations": turns, "system": "Be kind.", "tools": json.dumps([TOOL["function"]])}
    openai = {"messages": [{"role": "system", "content": "Be kind."}, *USED], "tools": [TOOL]}
    found = [encode(tokenizer, tmp_path, each) for each in (row, openai)]
    assert text(tokenizer, found[0]) == text(tokenizer, found[1])
    assert targets(tokenizer, found[0]) == targets(tokenizer, found[1])
    assert "Be kind." in text(tokenizer, found[0])


def test_old_names_of_openai_give_what_the_new_ones_give(tmp_path: Path) -> None:
    old = [
        USED[0],
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "add", "content": "2"},
        USED[3],
    ]
    tokenizer = qwen_like(QWEN3)
    found = [
        text(tokenizer, encode(tokenizer, tmp_path, row))
        for row in ({"messages": old, "functions": [TOOL["function"]]}, {"messages": USED, "tools": [TOOL]})
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("completion", ["yes", [{"role": "assistant", "content": "yes"}]], ids=["text", "messages"])
def test_prompt_of_messages_has_the_completion_alone_as_target(tmp_path: Path, completion: Any) -> None:
    tokenizer = qwen_like(CHATML)
    prompt = [{key: item for key, item in message.items() if key != "weight"} for message in CHAT[:3]]
    encoded = encode(tokenizer, tmp_path, {"prompt": prompt, "completion": completion}, "prompt-completion")
    assert targets(tokenizer, encoded) == "[yes<|im_end|>]"


def test_options_of_a_row_reach_the_template_and_those_it_does_not_know_are_named(tmp_path: Path) -> None:
    tokenizer = qwen_like("{% if loud %}!{% endif %}" + CHATML)
    encoded = encode(
        tokenizer, tmp_path, {"messages": CHAT, "chat_template_kwargs": {"loud": True, "enable_thinking": False}}
    )
    assert text(tokenizer, encoded).startswith("!<|im_start|>")
    assert isinstance(encoded, Encoded)
    assert encoded.unused == ("chat_template_kwargs.enable_thinking",)


@pytest.mark.parametrize(
    ("tokenizer", "row", "message"),
    [
        (qwen_like(GEMMA3), {"messages": USED}, "the chat template refuses it .*alternate"),
        (qwen_like(CHATML), {"messages": USED}, "shows no tool calls"),
        (gpt2_like(), {"messages": USED}, "shows no tool calls"),
        (
            qwen_like(LLAMA3.replace("and tools", "and false")),
            {"messages": USED, "tools": [TOOL]},
            "not show the tools",
        ),
    ],
    ids=["roles", "calls", "default-template", "tools"],
)
def test_chat_whose_tools_are_not_shown_is_refused(tmp_path: Path, tokenizer: Any, row: Any, message: str) -> None:
    found = encode(tokenizer, tmp_path, row)
    assert isinstance(found, str)
    assert message.partition(" .*")[0] in found
    assert message.partition(" .*")[2] in found


def test_what_a_template_does_not_show_is_named(tmp_path: Path) -> None:
    tokenizer = qwen_like(
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    chat = [{"role": "system", "content": "Be kind."}, *CHAT]
    encoded = encode(tokenizer, tmp_path, {"messages": chat, "tools": [TOOL]})
    assert isinstance(encoded, Encoded)
    assert encoded.unused == ("tools", "messages of the role 'system'")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{**CHAT[3], "weight": 0.5}]}, r"messages\[0\]: 'weight' is float 0\.5, expected 0 or 1"),
        ({"messages": CHAT[:2]}, r"no answer is a target \(weight 0\)"),
        ({"messages": CHAT, "tools": "add"}, "'tools' is str 'add', expected a list"),
        ({"messages": [{"role": "assistant", "tool_calls": ["add"]}]}, r"messages\[0\]: a tool call is str 'add'"),
        ({"messages": [{**CHAT[3], "train_detail": [{"train": True}]}]}, "which characters of a message"),
        ({"conversations": [{"from": "gpt", "value": None}]}, r"conversations\[0\]: 'value' is null, expected text"),
    ],
)
def test_chat_that_cannot_be_used_is_refused_with_its_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowRejected, match=message):
        document(row)


def test_fields_that_are_not_read_are_counted_by_name(tmp_path: Path) -> None:
    rows = [{"messages": [{**CHAT[3], "mood": "glad"}], "id": i, "score": None} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (part,) = plan_parts(Files(paths=(str(tmp_path / "a.jsonl"),)), 10**6)
    assert detect_schema([part], "text") == "chat"
    reader = PartReader(part, "chat", "text")
    assert len(list(reader)) == 3
    assert reader.unused == {"id": 3, "messages[].mood": 3}
    state, _ = describe_tokenizer(qwen_like("{{ messages[0].mood }}" + CHATML), saved(qwen_like(), tmp_path / "t"))
    assert Encoder(state).unused(reader.unused) == {"id": 3}


def test_equal_chats_with_other_tools_are_other_documents() -> None:
    one, other = document({"messages": USED}), document({"messages": USED, "tools": [TOOL]})
    assert one.digest != other.digest
    assert one.digest == document({"messages": [*USED[:3], {**USED[3], "weight": 1}]}).digest
