"""Documents to token ids and loss masks.

Promise: a document becomes what its tokenizer makes of it (a beginning-of-text token where the tokenizer adds one),
ended by the end-of-text token; the mask is true on exactly the tokens that the schema's table in `documents.py` names.
A prompt and its completion are tokenized apart, as they are when the model is used.

Chats are rendered by the tokenizer's chat template, or by `DEFAULT_TEMPLATE` where it has none, and tokenized once;
which characters the assistant said comes from the template's `{% generation %}` blocks, or else by rendering: what
`messages[:i+1]` adds to `messages[:i]` and the generation prompt. Some templates render a turn differently once the
chat goes on (they drop earlier thoughts): such an earlier turn is not a target, and the last turn always is. Dates in
templates are fixed to `TEMPLATE_DATE`, since the same chat must give the same tokens tomorrow.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.prepare.documents import Document

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}Assistant:"
    "{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers without a chat template: `User: …`, a new line, `Assistant: …`, end of text. The space after the colon
belongs to the answer, since byte-level tokenizers join it to the word that follows."""
TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that Llama 3.1's own template falls back to."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class EncoderState:
    """What a worker needs of a tokenizer: picklable, and cached in each process by all of it."""

    digest: str
    eos_token_id: int
    bos_token_id: int | None = None
    """The beginning-of-text token where the tokenizer begins each text with it, else None."""
    backend: str = ""
    """`tokenizer.json` of the tokenizer as it is loaded."""
    chat_template: str = DEFAULT_TEMPLATE
    special_tokens: tuple[tuple[str, str], ...] = ()
    """Name → text, e.g. `eos_token`; templates use them."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document as tokens."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    document_id: int


@lru_cache(maxsize=2)
def build_encoder(state: EncoderState) -> "Encoder":
    """Return the encoder of a state, once a process."""
    return Encoder(state)


def set_tokenizer_threads(num_cpus: float) -> None:
    """Keep the tokenizer's thread pool within a worker's CPU cores; its results do not depend on it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_cpus >= 2 else "false"
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, int(num_cpus))))


class Encoder:
    """Turns documents into tokens and masks."""

    def __init__(self, state: EncoderState) -> None:
        from tokenizers import Tokenizer

        self._state = state
        self._tokenizer = Tokenizer.from_str(state.backend)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._begin = str(self._tokenizer.id_to_token(state.bos_token_id) if state.bos_token_id is not None else "")
        """What the default template, which is for every tokenizer, has to begin with."""
        self._has_generation_blocks = _GENERATION.search(state.chat_template) is not None

    def encode(self, documents: Sequence[Document]) -> list[Encoded | str]:
        """Encode documents; a chat that its template refuses comes back as the reason."""
        plain = [document for document in documents if document.schema != "chat"]
        texts = self._encode_texts([text for document in plain for text in (document.prompt, document.text)])
        pairs = iter(zip(texts[::2], texts[1::2], strict=True))
        return [self._encode_chat(d) if d.schema == "chat" else self._join(d, *next(pairs)) for d in documents]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _join(self, document: Document, prompt: list[int], text: list[int]) -> Encoded:
        begin = [] if self._state.bos_token_id is None else [self._state.bos_token_id]
        ids = np.array([*begin, *prompt, *text, self._state.eos_token_id], np.int32)
        mask = np.ones(len(ids), np.bool_)
        mask[: len(begin) + len(prompt)] = False
        return Encoded(ids, mask, document.id)

    def _encode_chat(self, document: Document) -> Encoded | str:
        from jinja2 import TemplateError

        try:
            text, spans = self._render_spans(list(document.messages))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            return f"the chat template refuses it ({error})"
        if not spans:
            return "the chat template shows nothing that the assistant says"
        if self._state.chat_template == DEFAULT_TEMPLATE:
            text, spans = (
                self._begin + text,
                [(start + len(self._begin), stop + len(self._begin)) for start, stop in spans],
            )
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), np.bool_)
        for start, stop in spans:
            mask |= (stops > start) & (starts < stop) & (stops > starts)
        if len(ids) and ids[-1] != self._state.eos_token_id:
            ids, mask = np.append(ids, np.int32(self._state.eos_token_id)), np.append(mask, False)
        return Encoded(ids, mask, document.id)

    def _render(
        self, messages: list[dict[str, Any]], *, prompt: bool, spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, found = render_jinja_template(
            conversations=[messages],
            chat_template=self._state.chat_template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            date_string=TEMPLATE_DATE.strftime("%d %b %Y"),
            strftime_now=TEMPLATE_DATE.strftime,
            **dict(self._state.special_tokens),
        )
        return rendered[0], [tuple(span) for span in found[0]] if found else []

    def _render_spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Render a chat, and say from which to which character the assistant speaks."""
        text, spans = self._render(messages, prompt=False, spans=self._has_generation_blocks)
        if self._has_generation_blocks:
            return text, [span for span in spans if span[0] < span[1]]
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], prompt=True, spans=False)[0] if i else ""
            after = self._render(messages[: i + 1], prompt=False, spans=False)[0].rstrip()
            if text.startswith(before) and text.startswith(after) and len(after) > len(before):
                spans.append((len(before), len(after)))
            elif i == last:
                raise ValueError(
                    "the last answer is not where the generation prompt ends; mark it with {% generation %}"
                )
        return text, spans
