"""Documents to token ids and loss masks.

Promise: a document becomes what its tokenizer makes of it (it begins with what the tokenizer puts first, which is no
target, a chat too whose template leaves that out), ended by the end-of-text token; the mask is true on exactly the
tokens that the schema's table in `documents.py` names.
A prompt and its completion are tokenized apart, as they are when the model is used.

Chats are rendered by the tokenizer's chat template, or by `DEFAULT_TEMPLATE` where it has none, and tokenized once;
which characters the assistant said comes from the template's `{% generation %}` blocks, or else by rendering: what
`messages[:i+1]` adds to `messages[:i]` and the generation prompt. Where a template renders a turn differently once the
chat goes on (Qwen3 gives the last answer an empty thought), it is the answer's own text with the token that closes it.
An answer whose text is not there either (its thoughts are dropped) is not a target, and is counted; one that its row
takes out (`weight` 0) is neither. Tools and tool calls are what the template makes of them; a chat whose calls, or
whose calls' tools, the template does not show is refused, other things that it does not show are named in `unused`.
Dates in templates are fixed to `TEMPLATE_DATE`, since the same chat must give the same tokens tomorrow.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stages.prepare.documents import Document
from stages.prepare.rendering import ChatTemplate, is_answer

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}Assistant:"
    "{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers without a chat template: `User: …`, a new line, `Assistant: …`, end of text. The space after the colon
belongs to the answer, since byte-level tokenizers join it to the word that follows."""


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
    unused: tuple[str, ...] = ()
    """What the document holds and its template does not show, e.g. `tools`."""


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
        self._template = ChatTemplate(
            state.chat_template,
            names=dict(state.special_tokens),
            special_tokens=[t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special],
        )

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

    def unused(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Leave out of the counts of unread fields those of messages that the chat template names: it may show them."""
        prefix = "messages[]."
        return {
            name: count
            for name, count in counts.items()
            if not (name.startswith(prefix) and self._template.mentions(name.removeprefix(prefix)))
        }

    def _encode_chat(self, document: Document) -> Encoded | str:
        from jinja2 import TemplateError

        try:
            text, spans = self._template.render_chat(document)
            text.encode()
            hidden = tuple(dict.fromkeys(self._template.hidden(document, text)))
        except UnicodeEncodeError as error:
            return f"it holds half of a surrogate pair at character {error.start} of the chat, which is not text"
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            return f"the chat template refuses it ({error})"
        if "tool_calls" in hidden:
            return "the chat template shows no tool calls, so that answers would be learned empty"
        if "tools" in hidden and any("tool_calls" in message for message in document.messages):
            return "the chat template does not show the tools that its answers call"
        if not spans:
            return (
                "the chat template shows no answer of the assistant that can be distinguished from the rest; mark "
                "answers with {% generation %} in it"
            )
        num_answers = sum(is_answer(m) and i not in document.masked for i, m in enumerate(document.messages))
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
        return Encoded(ids, mask, document.id, max(0, num_answers - len(spans)), hidden)
