"""Examples of one source: read, rendered, tokenised, marked."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sortserve_trainer.data.chat_format import ChatFormat, Span
from sortserve_trainer.data.examples import Example
from sortserve_trainer.data.forms import Conversation, Document, parse_row
from sortserve_trainer.data.hub import is_hub_id, read_hub_rows
from sortserve_trainer.data.rows import SUFFIXES, Row, data_suffix, read_rows
from sortserve_trainer.data.source import DataSource, bad_data
from sortserve_trainer.model.repetition import repeated_places

__all__ = ["load_examples"]

logger = logging.getLogger(__name__)

_WELL_KNOWN_ENDS = ("<|endoftext|>", "</s>")
"""Written at the end of answers in data that was made for another tokenizer."""
_BATCH = 1024
"""Rows tokenised at once: what the tokenizer's threads share, and what waits in memory."""
_CHUNK = 1 << 18
"""Characters of a long document tokenised at once."""


def load_examples(
    source: DataSource,
    tokenizer: Any,
    *,
    max_length: int,
    train_on_prompts: bool,
    split: str = "train",
) -> list[Example]:
    """The examples of a source, in its order.

    A conversation is one example, cut on the right at ``max_length``; where no answer is left, and
    where the answer is empty, the row is skipped, which the log tells. A document is cut into
    consecutive examples of ``max_length``, with an end-of-text token after the last.

    Args:
        source: what to load; its weight plays no part here.
        tokenizer: transformers' fast tokenizer of the base; its truncation and padding are switched
            off.
        max_length: most tokens of an example.
        train_on_prompts: make all tokens of a conversation targets, not those of answers alone.
        split: of a hub data set; a file has none.

    Raises:
        ConfigError: the source cannot be read, a row is bad, or no example is left. One line, which
            names file and line where there is one.
    """
    encoder = _Encoder(tokenizer, max_length, train_on_prompts)
    end_tokens = tuple(dict.fromkeys([*tokenizer.all_special_tokens, *_WELL_KNOWN_ENDS]))
    rows = _open(source.reference, split)
    examples: list[Example] = []
    num_rows = num_empty = 0
    while batch := list(itertools.islice(rows, _BATCH)):
        parsed = [parse_row(row, end_tokens) for row in batch]
        filled = [item for item in parsed if item is not None]
        num_rows += len(batch)
        num_empty += len(batch) - len(filled)
        examples += encoder.encode(filled)
    skipped = f"skipped {num_empty} empty and {encoder.num_lost} without an answer"
    if not examples:
        if not num_rows:
            raise bad_data(source.reference, "there is no row in it")
        problem = f"no row to learn from: {skipped} in the first {max_length} tokens (--max-length)"
        raise bad_data(source.reference, problem)
    logger.log(
        logging.WARNING if num_empty or encoder.num_lost or encoder.num_cut else logging.INFO,
        "%s: %d examples of %d tokens; %s in the first %d tokens (--max-length), and cut %d that "
        "are longer.",
        source.reference,
        len(examples),
        sum(map(len, examples)),
        skipped,
        max_length,
        encoder.num_cut,
    )
    return examples


def _open(reference: str, split: str) -> Iterator[Row]:
    path = Path(reference).expanduser()
    if path.is_dir():
        raise bad_data(reference, "is a folder: name a file in it")
    is_readable = bool(data_suffix(path))
    if path.is_file() and not is_readable:
        known = ", ".join(SUFFIXES)
        raise bad_data(reference, f"only {known} files can be read (and, but for parquet, .gz)")
    if is_readable or not is_hub_id(reference):
        return read_rows(path)
    return read_hub_rows(reference, split)


class _Encoder:
    """Conversations and documents to examples, with a count of what did not fit."""

    def __init__(self, tokenizer: Any, max_length: int, train_on_prompts: bool) -> None:
        self._format = ChatFormat(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos_token_id: int | None = tokenizer.eos_token_id
        self._max_length = max_length
        self._train_on_prompts = train_on_prompts
        self.num_cut = 0
        """Conversations that lost tokens."""
        self.num_lost = 0
        """Conversations that lost all answers, and are no examples."""

    def encode(self, batch: list[Conversation | Document]) -> list[Example]:
        """Examples in the order of the batch."""
        rendered = [self._format.render(c) for c in batch if isinstance(c, Conversation)]
        encodings = self._backend.encode_batch(
            [text for text, _ in rendered], add_special_tokens=self._format.adds_special_tokens
        )
        spans = (spans for _, spans in rendered)
        conversations = zip(encodings, spans, strict=True)
        examples: list[Example] = []
        for item in batch:
            if isinstance(item, Document):
                examples += self._cut_document(item.text)
            elif (example := self._mark_answers(item, *next(conversations))) is not None:
                examples.append(example)
        return examples

    def _mark_answers(
        self, conversation: Conversation, encoding: Any, spans: list[Span]
    ) -> Example | None:
        """The conversation up to its last answer: what a template writes after it is left out."""
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        answers = [(ends > start) & (starts < end) for start, end in spans]
        is_target = np.any(answers, axis=0)
        is_target[:1] = False
        length = int(is_target.nonzero()[0][-1]) + 1 if is_target.any() else 0
        self.num_cut += length > self._max_length
        length = min(length, self._max_length)
        if not is_target[:length].any():
            self.num_lost += 1
            return None
        if self._train_on_prompts:
            is_target[1:] = True
        token_ids = np.array(encoding.ids[:length], dtype=np.int32)
        is_target = is_target[:length].copy()
        if not conversation.is_generated:
            return Example(token_ids, is_target)
        is_unwanted = np.any([_repeats(token_ids, a[:length]) for a in answers], axis=0)
        is_unwanted[0] = False
        return Example(token_ids, is_target & ~is_unwanted, is_unwanted)

    def _cut_document(self, text: str) -> list[Example]:
        first, *others = _chunks(text)
        encodings = [self._backend.encode(first), *self._encode_plain(others)]
        ids = [token_id for encoding in encodings for token_id in encoding.ids]
        if self._eos_token_id is not None and ids[-1:] != [self._eos_token_id]:
            ids.append(self._eos_token_id)
        token_ids = np.array(ids, dtype=np.int32)
        is_target = np.ones(len(ids), dtype=np.bool_)
        is_target[:: self._max_length] = False
        cuts = range(self._max_length, len(ids), self._max_length)
        pieces = zip(np.split(token_ids, cuts), np.split(is_target, cuts), strict=True)
        # A single token at the end has nothing to be predicted from.
        return [Example(piece, targets) for piece, targets in pieces if len(piece) >= 2]

    def _encode_plain(self, texts: list[str]) -> list[Any]:
        encodings: list[Any] = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return encodings


def _repeats(token_ids: NDArray[np.int32], is_answer: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where a token of an answer completes an n-gram that the same answer has had."""
    found = np.zeros(len(token_ids), dtype=np.bool_)
    places = is_answer.nonzero()[0]
    found[places[repeated_places(token_ids[places].tolist())]] = True
    return found


def _chunks(text: str) -> list[str]:
    """A text in parts that end with a line, where tokens end as well; memory stays bounded."""
    parts, start = [], 0
    while len(text) - start > _CHUNK:
        end = text.find("\n", start + _CHUNK) + 1 or len(text)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]] if start < len(text) else parts
