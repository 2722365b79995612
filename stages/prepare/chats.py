"""Chat rows as trainers read them → messages, tools and which answers are no targets.

| written as | read as |
| --- | --- |
| `messages`, `conversations` or `conversation` of role/content (OpenAI, TRL) or from/value (ShareGPT) | messages |
| `content` as a list of text parts; null beside `tool_calls` | the parts joined; empty text |
| `tools`, a list or its JSON text; `functions`, a message's `function_call` (OpenAI's old names) | tools, tool calls |
| arguments of a tool call as JSON text | the object, as serving engines hand it to the template |
| `weight` 0 (OpenAI), `train`, `training` or `do_train` false (axolotl) on an answer | no target |
| a row's `system` (ShareGPT variants) | the first message, where there is no other system message |
| `chat_template_kwargs` (TRL) | options of the chat template |

Promise: what is not in this table is either part of a message, which the chat template may show, or named in `unused`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stages.errors import nearest

__all__ = ["CHAT_FIELDS", "Chat", "RowRejected", "read_chat", "shown", "text_of"]

CHAT_FIELDS = ("messages", "conversations", "conversation")
"""Fields that hold a chat; the first that a row has is read."""
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
"""ShareGPT's and other names of roles (LLaMA-Factory's tags among them), and OpenAI's old one."""
TRAINED = ("weight", "train", "training", "do_train")
TEXT_PARTS = ("text", "input_text", "output_text")
READ = {"role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "function_call", *TRAINED}


class RowRejected(Exception):
    """A row is not what its schema expects; the message says how."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat as its template is to render it."""

    messages: tuple[dict[str, Any], ...]
    """With `role` and `content` as text each; whatever else a message has is kept."""
    tools: tuple[dict[str, Any], ...] = ()
    """In OpenAI's form: `{"type": "function", "function": {…}}`."""
    options: tuple[tuple[str, Any], ...] = ()
    """What the row gives to the template, e.g. `enable_thinking`."""
    masked: frozenset[int] = frozenset()
    """Which messages are no targets though the assistant says them."""
    unused: tuple[str, ...] = ()
    """Fields that are not read; those of a message as `messages[].name`."""


def text_of(value: Mapping[str, Any], name: str) -> str:
    """Return a field that holds text.

    Raises:
        RowRejected: it is missing, no text, or half a surrogate pair.
    """
    if name not in value:
        raise RowRejected(f"no field {name!r}{nearest(name, list(value))}")
    found = value[name]
    if not isinstance(found, str):
        raise RowRejected(f"{name!r} is {shown(found)}, expected text")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise RowRejected(
            f"{name!r} holds half of a surrogate pair at character {error.start}, which is not text"
        ) from error
    return found


def shown(value: Any) -> str:
    """Return a value as errors show it: its type, and its beginning."""
    text = repr(value)
    return "null" if value is None else f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '…'}"


def read_chat(row: Mapping[str, Any]) -> Chat:
    """Read a row that holds a chat, or a prompt and a completion that are lists of messages.

    Raises:
        RowRejected: it holds something that is no chat, or nothing to learn.
    """
    field = next((name for name in CHAT_FIELDS if row.get(name) is not None), None)
    if field is not None:
        read, given, masked = {field}, _listed(row[field], field), frozenset[int]()
    elif isinstance(row.get("prompt"), list):
        read = {"prompt", "completion"}
        prompt, completion = _listed(row["prompt"], "prompt"), _completion(row)
        given, masked = [*prompt, *completion], frozenset(range(len(prompt)))
    else:
        raise RowRejected(f"no field 'messages'{nearest('messages', list(row))}")
    messages, unused = [], dict[str, None]()
    for number, message in enumerate(given):
        if not isinstance(message, dict):
            where = f"{field or 'messages'}[{number}]"
            raise RowRejected(f"{where} is {shown(message)}, expected {{'role', 'content'}}")
        try:
            found, is_target = _message(message, unused)
        except RowRejected as error:
            raise RowRejected(f"{field or 'messages'}[{number}]: {error}") from error
        messages.append(found)
        masked = masked if is_target else masked | {number}
    system = row.get("system")
    if isinstance(system, str) and not any(message["role"] == "system" for message in messages):
        read.add("system")
        if system.strip():
            messages.insert(0, {"role": "system", "content": text_of(row, "system")})
            masked = frozenset(number + 1 for number in masked)
    tools = _tools(row, read)
    options = _decoded(row.get("chat_template_kwargs"))
    if isinstance(options, dict):
        read.add("chat_template_kwargs")
    _check_targets(messages, masked)
    return Chat(
        tuple(messages),
        tools,
        tuple(options.items()) if isinstance(options, dict) else (),
        masked,
        tuple([*unused_fields(row, read), *unused]),
    )


def unused_fields(row: Mapping[str, Any], read: set[str]) -> list[str]:
    """Return the names of a row's fields that hold something and are not read."""
    return [name for name, value in row.items() if name not in read and value is not None]


def _completion(row: Mapping[str, Any]) -> list[Any]:
    completion = row.get("completion")
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else _listed(
        completion, "completion"
    )  # fmt: skip


def _listed(value: Any, name: str) -> list[Any]:
    value = _decoded(value)
    if not isinstance(value, list) or not value:
        raise RowRejected(f"{name!r} is {shown(value)}, expected a list of {{'role', 'content'}}")
    return value


def _decoded(value: Any) -> Any:
    """Return what a JSON text holds, since Parquet files keep nested values so; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _check_targets(messages: list[dict[str, Any]], masked: frozenset[int]) -> None:
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and (m["content"].strip() or calls(m))]
    if not answers:
        raise RowRejected("no message of the role 'assistant', so there is nothing to learn")
    if masked.issuperset(answers):
        raise RowRejected("no answer is a target (weight 0), so there is nothing to learn")


def calls(message: Mapping[str, Any]) -> bool:
    """Return whether a message calls tools."""
    return bool(message.get("tool_calls"))


def _message(given: Mapping[str, Any], unused: dict[str, None]) -> tuple[dict[str, Any], bool]:
    """Return a message in OpenAI's form, and whether it is a target if the assistant says it."""
    kept = {key: item for key, item in given.items() if item is not None}
    is_sharegpt = "role" not in kept and "from" in kept
    named, spoken = ("from", "value") if is_sharegpt else ("role", "content")
    tag = text_of(kept, named)
    role = ROLES.get(tag.lower(), tag)
    unused.update(dict.fromkeys(f"messages[].{key}" for key in kept if key not in READ))
    message = {key: item for key, item in kept.items() if key not in ("from", "value", "function_call", *TRAINED)}
    function_call = kept.get("function_call")
    if tag == "function_call":
        function_call, kept[spoken] = text_of(kept, spoken), ""
    tool_calls = [*_tool_calls(kept.get("tool_calls")), *_tool_calls(function_call)]
    message.pop("tool_calls", None)
    if tool_calls:
        message["tool_calls"] = tool_calls
    content = _content(kept, spoken, has_calls=bool(tool_calls), is_null=spoken in given)
    return message | {"role": role, "content": content}, _is_target(kept, role, unused)


def _content(kept: Mapping[str, Any], name: str, *, has_calls: bool, is_null: bool) -> str:
    if name not in kept and has_calls:
        return ""
    if name not in kept and is_null:
        raise RowRejected(f"{name!r} is null, expected text")
    parts = kept.get(name)
    if not isinstance(parts, list):
        return text_of(kept, name)
    texts = []
    for number, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type", "text") not in TEXT_PARTS:
            raise RowRejected(f"{name}[{number}] is a part of the type {part['type']!r}, expected text only")
        texts.append(text_of(part if isinstance(part, dict) else {"text": part}, "text"))
    return "".join(texts)


def _is_target(kept: Mapping[str, Any], role: str, unused: dict[str, None]) -> bool:
    is_target = True
    for name in TRAINED:
        if name not in kept:
            continue
        if kept[name] not in (0, 1):
            raise RowRejected(f"{name!r} is {shown(kept[name])}, expected 0 or 1 (or false or true)")
        if role == "assistant":
            is_target = is_target and bool(kept[name])
        elif kept[name]:  # only answers are targets
            unused[f"messages[].{name} of the role {role!r}"] = None
    if kept.get("train_detail") or kept.get("training_detail"):
        raise RowRejected("it says which characters of a message are targets (train_detail), which cannot be used")
    return is_target


def _tool_calls(value: Any) -> Iterator[dict[str, Any]]:
    """Yield tool calls in OpenAI's form, with their arguments as an object."""
    value = _decoded(value)
    for call in value if isinstance(value, list) else [] if value is None else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowRejected(f"a tool call is {shown(call)}, expected {{'function': {{'name', 'arguments'}}}}")
        arguments = _decoded(function.get("arguments", function.get("parameters")))
        named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        outer = call if "function" in call else {}
        yield {**outer, "type": "function", "function": named}


def _tools(row: Mapping[str, Any], read: set[str]) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = []
    for name in ("tools", "functions"):
        value = _decoded(row.get(name))
        if value is None or value == "":
            continue
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise RowRejected(f"{name!r} is {shown(value)}, expected a list of {{'type', 'function'}}")
        read.add(name)
        found += [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    return tuple(found)
