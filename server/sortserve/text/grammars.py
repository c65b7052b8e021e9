"""Grammars compiled by llguidance: JSON schemas, regular expressions, choices, Lark and GBNF.

Compiling takes a millisecond to some hundred, bounded by the library's limits on its own work, and
lets other threads run; what has been compiled is kept, by the digest of its format. JSON is written
as ``json.dumps`` writes it: one blank after each comma and colon and no other, so that white space
cannot run away, and most of what is not data is forced.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sortserve.core.errors import InvalidRequestError
from sortserve.core.grammar import Grammar, GrammarError, Matcher, OutputFormat, num_words
from sortserve.text.compile_errors import sentence, with_keyword
from sortserve.text.kept_grammars import KeptGrammars
from sortserve.text.number_guard import NumberGuard, NumberTable
from sortserve.text.schema_nodes import children
from sortserve.text.schemas import check_expression, check_schema
from sortserve.text.special_names import with_hidden_special_tokens

__all__ = ["GrammarCompiler", "Grammars"]

MAX_FORCED_AT_START = 16_384
NUM_PROBED = 3
"""Tokens of an answer that are tried before its grammar is taken."""
MAX_PLACE_CHARS = 1_048_576
"""Of all schemas that are compiled to look for the place of an error."""
_JSON_OPTIONS: Any = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
_MAX_LEXER_STATES = 50_000
"""Some KiB each, so at most some hundred MiB for the most hostile expression."""


class GrammarCompiler:
    """Compiles formats for one vocabulary. Any thread may ask.

    Args:
        tokenizer_json: the Hugging Face tokenizer, as JSON.
        vocab_size: of the model: ids from there on never come.
        num_token_ids: one above the tokenizer's largest id.
        eos_token_ids: end a generation.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        vocab_size: int,
        num_token_ids: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        import llguidance

        self._library = llguidance
        self.vocab_size = vocab_size
        self._num_ids = max(vocab_size, num_token_ids)
        ends = [token_id for token_id in sorted(eos_token_ids) if token_id < self._num_ids]
        self._tokenizer = llguidance.LLTokenizer(
            # Forced text that names a special token is text, and would be forced as the token.
            with_hidden_special_tokens(tokenizer_json),
            n_vocab=self._num_ids,
            eos_token=ends or None,
        )
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False
        )
        self._numbers = NumberTable(
            [self._tokenizer.decode_bytes([i]) for i in range(self._num_ids)]
        )
        self._kept: KeptGrammars[_Grammar] = KeptGrammars()

    def kept(self, format_: OutputFormat) -> Grammar | None:
        """The same, if it has been compiled already; never takes long."""
        return self._kept.get(format_.key)

    def compile(self, format_: OutputFormat) -> Grammar:
        """The grammar of a format.

        Raises:
            InvalidRequestError: it cannot be compiled; ``param`` is the place.
        """
        kept = self.kept(format_)
        if kept is not None:
            return kept
        try:
            grammar = self._compile(format_)
        except InvalidRequestError as error:
            raise _as_written(error, format_) from None
        self._kept.keep(format_.key, grammar, len(format_.text))
        return grammar

    def _compile(self, format_: OutputFormat) -> _Grammar:
        is_json = format_.kind == "json"
        text = format_.text
        if is_json:
            schema = json.loads(text)
            check_schema(schema, format_.param)
            text = json.dumps(schema)
        elif format_.kind != "choice":
            check_expression(text, format_.param)
        try:
            matcher, error = self._try(self._source(format_.kind, text))
        except ValueError as failure:
            matcher, error = None, str(failure)
        if error:
            param, say = format_.param, sentence
            if is_json:
                (param, error), say = self._place(schema, error, param), with_keyword
            raise InvalidRequestError(f"{param}: {say(error)}", param=param)
        return _Grammar(
            format_.key,
            matcher,
            self._num_ids,
            self.vocab_size,
            numbers=self._numbers if is_json else None,
            may_force=format_.kind in ("json", "choice"),
        )

    def _source(self, kind: str, text: str) -> str:
        """The library's own form of a format."""
        matcher = self._library.LLMatcher
        if kind == "json":
            source: str = matcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
        elif kind == "regex":
            source = matcher.grammar_from_regex(text)
        elif kind == "choice":
            choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
            source = matcher.grammar_from_lark("start: " + " | ".join(choices))
        else:
            source = self._library.grammar_from("grammar", text)
        return source

    def _try(self, source: str) -> tuple[Any, str]:
        """A matcher, and what is wrong with it: whether anything can follow is seen, too."""
        matcher = self._library.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
            if len(matcher.compute_ff_tokens()) > MAX_FORCED_AT_START:
                return matcher, f"more than {MAX_FORCED_AT_START} tokens are forced at its start"
        error = str(matcher.get_error()) if matcher.is_error() else self._beginning(matcher)
        return matcher, error or "; ".join(matcher.get_grammar_warnings())

    def _beginning(self, matcher: Any) -> str:
        """What is wrong with an answer's first tokens; empty: nothing.

        An object of a thousand optional fields fails when its first field begins.
        """
        matcher = matcher.deep_copy()
        for _ in range(NUM_PROBED):
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            if matcher.is_error() or matcher.is_stopped() or not mask.any():
                break
            bits = np.unpackbits(mask, bitorder="little")
            if not matcher.consume_token(int(bits.argmax())):
                break
        return str(matcher.get_error()) if matcher.is_error() else ""

    def _place(self, schema: Any, error: str, param: str) -> tuple[str, str]:
        """The innermost subschema that fails for the same reason, and what it says."""
        shared = {}
        if isinstance(schema, Mapping):
            shared = {word: schema[word] for word in ("$defs", "definitions") if word in schema}
        left = MAX_PLACE_CHARS
        searching = True
        while searching:
            searching = False
            for name, child in children(schema):
                if not isinstance(child, Mapping):
                    continue
                text = json.dumps({**shared, **child})
                left -= len(text)
                if left < 0:
                    return param, error
                _, found = self._try(
                    self._library.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
                )
                if found == error:
                    schema, param, searching = child, f"{param}.{name}", True
                    break
        return param, error


class Grammars:
    """A compiler that is made when the first format comes: few servers see any.

    Args:
        backend: the Hugging Face tokenizer.
        vocab_size: as ``GrammarCompiler`` has it.
        num_token_ids: likewise.
        eos_token_ids: likewise.
    """

    def __init__(
        self,
        backend: Tokenizer,
        vocab_size: int,
        num_token_ids: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._backend = backend
        self._vocab_size, self._num_token_ids = vocab_size, num_token_ids
        self._eos_token_ids = eos_token_ids
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    def prepare(self) -> bool:
        """Read the vocabulary now; False: the library is not installed.

        Takes half a second of one core for 50,000 tokens, in which no thread gets on.
        """
        with self._lock:
            try:
                self._compiler = self._compiler or GrammarCompiler(
                    self._backend.to_str(),
                    vocab_size=self._vocab_size,
                    num_token_ids=self._num_token_ids,
                    eos_token_ids=self._eos_token_ids,
                )
            except ImportError:
                return False
        return True

    def kept(self, format_: OutputFormat) -> Grammar | None:
        """The grammar of a format that has been compiled already; None: it has not."""
        return None if self._compiler is None else self._compiler.kept(format_)

    def compile(self, format_: OutputFormat) -> Grammar:
        """The grammar of a format. Any thread may ask.

        Raises:
            InvalidRequestError: it cannot be compiled, or llguidance is not installed.
        """
        if self._compiler is None and not self.prepare():
            raise InvalidRequestError(
                f"{format_.param} needs the package llguidance, which is not installed: "
                "pip install 'sortserve[server]'.",
                param=format_.param,
            )
        assert self._compiler is not None
        return self._compiler.compile(format_)


class _Grammar:
    """A compiled grammar: each answer gets a copy of a matcher that has not begun."""

    def __init__(
        self,
        key: str,
        matcher: Any,
        num_ids: int,
        vocab_size: int,
        *,
        numbers: NumberTable | None,
        may_force: bool,
    ) -> None:
        self.key = key
        self._matcher = matcher
        self._num_ids = num_ids
        self._vocab_size = vocab_size
        self._numbers = numbers
        self._may_force = may_force

    def start(self) -> Matcher:
        """The place of an answer that has not begun."""
        guard = None if self._numbers is None else NumberGuard(self._numbers)
        return _Matcher(
            self._matcher.deep_copy(), self._num_ids, self._vocab_size, guard, self._may_force
        )


class _Matcher:
    def __init__(
        self,
        matcher: Any,
        num_ids: int,
        vocab_size: int,
        guard: NumberGuard | None,
        may_force: bool,
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._guard = guard
        self._may_force = may_force
        self._words = np.zeros(num_words(num_ids), dtype=np.int32)
        self._address = self._words.ctypes.data

    def fill_mask(self, mask_W: NDArray[np.int32]) -> None:
        """See ``Matcher``."""
        words = self._words
        self._matcher.unsafe_compute_mask_ptr(self._address, words.nbytes)
        self._check()
        mask_W[:] = words[: len(mask_W)]
        beyond = self._vocab_size % 32
        if beyond and len(mask_W) == num_words(self._vocab_size):
            mask_W[-1] &= np.int32((1 << beyond) - 1)
        if self._guard is not None:
            self._guard.restrict(mask_W)

    def accept(self, token_id: int) -> None:
        """See ``Matcher``."""
        if not self._matcher.consume_token(token_id):
            self._check()
            raise GrammarError(f"token {token_id} does not fit")
        if self._guard is not None:
            self._guard.accept(token_id)

    def forced_tokens(self) -> list[int]:
        """See ``Matcher``."""
        if not self._may_force or self._matcher.is_stopped():
            return []
        forced: list[int] = self._matcher.compute_ff_tokens()
        for i, token_id in enumerate(forced):
            if token_id >= self._vocab_size:
                return forced[:i]
        return forced

    @property
    def is_complete(self) -> bool:
        """See ``Matcher``."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(sentence(str(self._matcher.get_error())).rstrip("."))


def _as_written(error: InvalidRequestError, format_: OutputFormat) -> InvalidRequestError:
    """The same error with the place where a client wrote what is wrong."""
    for place, written in format_.places:
        if error.param is not None and error.param.startswith(place):
            param = written + error.param.removeprefix(place)
            return InvalidRequestError(str(error).replace(place, written), param=param)
    return error
