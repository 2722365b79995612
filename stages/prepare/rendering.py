"""Chats rendered by a chat template: their text, where in it the assistant speaks, and what it does not show.

The rules by which answers are found are in `encoding.py`. Does not: tokenize.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from typing import Any

from stages.prepare.documents import Document

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that Llama 3.1's own template falls back to."""
SAMPLE = "\u27e6answer\u27e7"
"""An answer that no template changes, and nobody gives: where it comes out, the true one begins."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = Sequence[Mapping[str, Any]]


def is_answer(message: Mapping[str, Any]) -> bool:
    """Return whether the assistant says or calls something in a message."""
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, source: str, *, names: Mapping[str, str], special_tokens: Iterable[str]) -> None:
        """Keep the template.

        Args:
            source: its Jinja text.
            names: name → special token, e.g. `eos_token`, for the template to use.
            special_tokens: all of them; each may close an answer.
        """
        self.source = source
        self._names = dict(names)
        specials = "|".join(map(re.escape, special_tokens))
        self._closing = re.compile(rf"\s*(?:{specials})") if specials else re.compile("")
        self._closed = re.compile(rf"(?:{specials})\s*\Z") if specials else re.compile(r"(?!)")
        self._has_generation_blocks = _GENERATION.search(source) is not None

    def mentions(self, name: str) -> bool:
        """Return whether a name occurs in the template, so that it may show a field of that name."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def render(
        self, document: Document, messages: Messages, *, prompt: bool = False, spans: bool = False, tools: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render messages as a document's: with its tools and options.

        Raises:
            TemplateError: the template refuses them.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {
            "date_string": TEMPLATE_DATE.strftime("%d %b %Y"),
            "strftime_now": TEMPLATE_DATE.strftime,
            **self._names,
            **dict(document.options),
            "add_generation_prompt": prompt,
            "return_assistant_tokens_mask": spans,
        }
        rendered, found = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.source,
            tools=list(document.tools) if document.tools and tools else None,
            **options,
        )
        return rendered[0], [tuple(span) for span in found[0]] if found else []

    def render_chat(self, document: Document) -> tuple[str, list[tuple[int, int]]]:
        """Render a chat, and say from which to which character the assistant says what is to be learned."""
        messages = document.messages
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text, spans = self.render(document, messages, spans=self._has_generation_blocks)
        if self._has_generation_blocks and (not document.masked or len(spans) == len(answers)):
            masked = {spans[n] for n, i in enumerate(answers) if i in document.masked}
            return text, [span for span in spans if span[0] < span[1] and span not in masked]
        found = {i: self._answer(document, text, i) for i in answers}
        if self._always_prompts and (last := found.get(len(messages) - 1)):
            text = text[: last[1]]  # nobody answers the prompt at its end
        return text, [span for i, span in found.items() if span and i not in document.masked]

    def _partly(self, document: Document, messages: Messages, *, prompt: bool = False) -> str | None:
        """Render a part of a chat; None where the template takes none but whole ones."""
        from jinja2 import TemplateError

        try:
            return self.render(document, messages, prompt=prompt)[0]
        except TemplateError:
            return None

    def _answer(self, document: Document, text: str, i: int) -> tuple[int, int] | None:
        """Return from where to where a rendered chat holds its i-th message; None where that cannot be found."""
        messages = document.messages
        after = self._partly(document, messages[: i + 1])
        before = self._partly(document, messages[:i], prompt=True) if i else ""
        if i and not self._always_prompts and after is not None and before is not None:
            after = after.rstrip()
            if text.startswith(after) and after.startswith(before) and after != before:
                return len(before), len(after)
        start = self._start(document, text, i, before or "")
        if start is None or not is_answer(messages[i]):
            return None
        if messages[i].get("tool_calls"):
            stop = self._stop_of_calls(document, text, i)
            return (start, self._close(text, stop)) if stop is not None and stop > start else None
        said = messages[i]["content"].strip()
        return (start, self._close(text, start + len(said))) if text.startswith(said, start) else None

    def _close(self, text: str, stop: int) -> int:
        """Return where an answer ends with the token that closes it, given where it ends with or without that."""
        closing = self._closing.match(text, stop)
        return closing.end() if closing and not self._closed.search(text, 0, stop) else stop

    def _start(self, document: Document, text: str, i: int, before: str) -> int | None:
        """Return where a rendered chat's i-th message can begin, by what the template puts before any answer there."""
        messages = document.messages
        sample = self._partly(document, [*messages[:i], {**messages[i], "content": SAMPLE}]) or ""
        header = sample.find(SAMPLE)
        if header >= 0 and text.startswith(sample[:header]):
            return header
        # As the last one it has more before it than here. The prompt, too, may go on with what this answer has not.
        start = len(os.path.commonprefix([text, before]))  # noqa: RUF071  characters are what is meant
        plain = (self._partly(document, messages[:i]) or "").rstrip() if i else ""
        return start if i and start >= len(plain) else None

    def _stop_of_calls(self, document: Document, text: str, i: int) -> int | None:
        """Return where the i-th message's tool calls end: where the chat goes on as it does after any other answer."""
        other = {"role": "assistant", "content": SAMPLE}
        sample = self._partly(document, [*document.messages[:i], other, *document.messages[i + 1 :]])
        if sample is None or SAMPLE not in sample:
            return None
        following = os.path.commonprefix([text[::-1], sample[sample.index(SAMPLE) + len(SAMPLE) :][::-1]])  # noqa: RUF071
        return len(text) - len(following)

    @cached_property
    def _always_prompts(self) -> bool:
        """Return whether the template ends with a prompt for an answer whether one is asked for or not."""
        document, probe = Document("chat", b""), [{"role": "user", "content": "a"}]
        prompted = self._partly(document, probe, prompt=True)
        return prompted is not None and prompted == self._partly(document, probe)

    def hidden(self, document: Document, text: str) -> Iterator[str]:
        """Yield what a chat holds and its rendered text does not show."""
        messages = document.messages
        whole = cache(lambda: self.render(document, messages)[0])
        if document.tools and self.render(document, messages, tools=False)[0] == whole():
            yield "tools"
        silent = [{key: item for key, item in message.items() if key != "tool_calls"} for message in messages]
        if silent != list(messages) and self._partly(document, silent) == whole():
            yield "tool_calls"
        yield from (f"chat_template_kwargs.{name}" for name, _ in document.options if not self.mentions(name))
        for i, message in enumerate(messages):
            said = message["content"].strip()
            if message["role"] == "assistant" or not said or said in text:
                continue
            if self._partly(document, [*messages[:i], *messages[i + 1 :]]) == whole():
                yield f"messages of the role {message['role']!r}"
