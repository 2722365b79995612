"""Documents to token ids and loss masks.

Promise: a document becomes what its tokenizer makes of it (it begins with what the tokenizer puts first, which is no
target, a chat too whose template leaves that out), ended by the end-of-text token; the mask is true on exactly the
tokens that the schema's table in `documents.py` names.
A prompt and its completion are tokenized apart, as they are when the model is used.

Chats are rendered by the tokenizer's chat template, or by `DEFAULT_TEMPLATE` where it has none, and tokenized once;
which characters the assistant said comes from the template's `{% generation %}` blocks, or else by rendering: what
`messages[:i+1]` adds to `messages[:i]` and the generation prompt. Where a template renders a turn differently once the
chat goes on (Qwen3 gives the last answer an empty thought), it is the answer's own text with the token that closes it.
An answer whose text is not there either (its thoughts are dropped) is not a target, and is counted. Dates in templates
are fixed to `TEMPLATE_DATE`, since the same chat must give the same tokens tomorrow.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
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
SAMPLE = "\u27e6answer\u27e7"
"""An answer that no template changes, and nobody gives: where it comes out, the true one begins."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class EncoderState:
    """What a worker needs of a tokenizer: picklable, and cached in each process by all of it."""

    digest: str
    eos_token_id: int
    prefix: tuple[int, ...] = ()
    """What the tokenizer puts before each text: its beginning-of-text token in most, nothing in many."""
    backend: str = ""
    """`tokenizer.json` of the tokenizer as it is loaded."""
    vocabulary_size: int = 2**31
    """Ids that the dataset's models have: a document with a higher one is refused."""
    chat_template: str = DEFAULT_TEMPLATE
    special_tokens: tuple[tuple[str, str], ...] = ()
    """Name → text, e.g. `eos_token`; templates use them."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document as tokens."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    document_id: int
    num_unlearned: int = 0
    """Answers of the assistant that are no targets."""


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
        self._tokenizer.post_processor = None  # adds special tokens, which is not asked for, and may trim offsets
        specials = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        self._closing = re.compile(rf"\s*(?:{'|'.join(map(re.escape, specials))})") if specials else re.compile("")
        """What may close an answer."""
        self._has_generation_blocks = _GENERATION.search(state.chat_template) is not None

    def encode(self, documents: Sequence[Document]) -> list[Encoded | str]:
        """Encode documents; one that its template refuses, or that has unknown tokens, comes back as the reason."""
        plain = [document for document in documents if document.schema != "chat"]
        texts = self._encode_texts([text for document in plain for text in (document.prompt, document.text)])
        pairs = iter(zip(texts[::2], texts[1::2], strict=True))
        found = [self._encode_chat(d) if d.schema == "chat" else self._join(d, *next(pairs)) for d in documents]
        return [self._checked(each) for each in found]

    def _checked(self, encoded: Encoded | str) -> Encoded | str:
        if isinstance(encoded, str) or encoded.ids.max(initial=0) < self._state.vocabulary_size:
            return encoded
        highest = int(encoded.ids.max())
        return (
            f"it holds the token {self._tokenizer.id_to_token(highest)!r}, whose id {highest} the model does not know "
            f"(it knows {self._state.vocabulary_size})"
        )

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _join(self, document: Document, prompt: list[int], text: list[int]) -> Encoded:
        begin = self._state.prefix
        ids = np.array([*begin, *prompt, *text, self._state.eos_token_id], np.int32)
        mask = np.ones(len(ids), np.bool_)
        mask[: len(begin) + len(prompt)] = False
        return Encoded(ids, mask, document.id)

    def _encode_chat(self, document: Document) -> Encoded | str:
        from jinja2 import TemplateError

        messages = list(document.messages)
        try:
            text, spans = self._render_spans(messages)
            text.encode()
        except UnicodeEncodeError as error:
            return f"it holds half of a surrogate pair at character {error.start} of the chat, which is not text"
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            return f"the chat template refuses it ({error})"
        if not spans:
            return (
                "the chat template shows no answer of the assistant that can be distinguished from the rest; mark "
                "answers with {% generation %} in it"
            )
        num_answers = sum(message["role"] == "assistant" and bool(message["content"].strip()) for message in messages)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), np.bool_)
        for start, stop in spans:
            mask |= (stops > start) & (starts < stop) & (stops > starts)
        if (begin := self._state.prefix) and tuple(ids[: len(begin)].tolist()) != begin:
            ids = np.concatenate([np.array(begin, np.int32), ids])
            mask = np.concatenate([np.zeros(len(begin), np.bool_), mask])
        if len(ids) and ids[-1] != self._state.eos_token_id:
            ids, mask = np.append(ids, np.int32(self._state.eos_token_id)), np.append(mask, False)
        return Encoded(ids, mask, document.id, max(0, num_answers - len(spans)))

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
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        found = {i: self._answer(text, messages, i) for i in answers}
        if self._always_prompts and (last := found.get(len(messages) - 1)):
            text = text[: last[1]]  # nobody answers the prompt at its end
        return text, [span for span in found.values() if span]

    def _answer(self, text: str, messages: list[dict[str, Any]], i: int) -> tuple[int, int] | None:
        """Return from where to where a rendered chat holds its i-th message; None where that cannot be found."""
        after = self._render(messages[: i + 1], prompt=False, spans=False)[0].rstrip()
        before = self._render(messages[:i], prompt=True, spans=False)[0] if i else ""
        if i and not self._always_prompts and text.startswith(after) and after.startswith(before) and after != before:
            return len(before), len(after)
        said = messages[i]["content"].strip()
        start = self._start(text, messages, i, before)
        if not said or start is None or not text.startswith(said, start):
            return None
        closing = self._closing.match(text, start + len(said))
        return start, closing.end() if closing else start + len(said)

    def _start(self, text: str, messages: list[dict[str, Any]], i: int, before: str) -> int | None:
        """Return where a rendered chat's i-th message can begin, by what the template puts before any answer there."""
        sample = self._render([*messages[:i], {**messages[i], "content": SAMPLE}], prompt=False, spans=False)[0]
        header = sample.find(SAMPLE)
        if header >= 0 and text.startswith(sample[:header]):
            return header
        # As the last one it has more before it than here. The prompt, too, may go on with what this answer has not.
        start = len(os.path.commonprefix([text, before]))  # noqa: RUF071  characters are what is meant
        plain = self._render(messages[:i], prompt=False, spans=False)[0].rstrip() if i else ""
        return start if i and start >= len(plain) else None

    @cached_property
    def _always_prompts(self) -> bool:
        """Return whether the template ends with a prompt for an answer whether one is asked for or not."""
        from jinja2 import TemplateError

        probe = [{"role": "user", "content": "a"}]
        try:
            return self._render(probe, prompt=True, spans=False) == self._render(probe, prompt=False, spans=False)
        except TemplateError:  # it needs a longer chat
            return False
