"""JSON schemas over all keywords that are supported, and documents that a grammar lets through."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from numpy.typing import NDArray

from sortserve.core.grammar import Constraint, Grammar, OutputFormat, num_words
from sortserve.text.grammars import GrammarCompiler
from support.tiny_models import VOCAB_SIZE, tiny_tokenizer

__all__ = [
    "EOS",
    "FIVE_FIELDS",
    "can_write",
    "check_document",
    "compiler",
    "format_of",
    "random_choice",
    "schemas",
    "write",
]

EOS = 2
Schema = dict[str, Any]

FIVE_FIELDS: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string", "maxLength": 12},
        "active": {"type": "boolean"},
        "role": {"enum": ["admin", "user", "guest"]},
    },
    "required": ["name", "age", "city", "active", "role"],
    "additionalProperties": False,
}


@cache
def compiler() -> GrammarCompiler:
    backend = tiny_tokenizer().backend_tokenizer
    return GrammarCompiler(
        backend.to_str(),
        vocab_size=VOCAB_SIZE,
        num_token_ids=backend.get_vocab_size(),
        eos_token_ids={EOS},
    )


def format_of(schema: Schema) -> OutputFormat:
    return OutputFormat("json", json.dumps(schema), "schema")


def write(
    grammar: Grammar,
    choose: Callable[[list[int]], int],
    *,
    most: int = 600,
    one_by_one: bool = False,
) -> tuple[list[int], int, bool]:
    """An answer chosen from the masks: its tokens, how many were sampled, and whether it ended."""
    constraint = Constraint(grammar.start(), one_by_one=one_by_one)
    tokens: list[int] = []
    mask_W = np.zeros(num_words(VOCAB_SIZE), dtype=np.int32)
    num_sampled = 0
    while len(tokens) < most:
        constraint.fill_mask(mask_W)
        bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little")
        token_id = choose([int(t) for t in np.flatnonzero(bits)])
        num_sampled += 1
        if token_id == EOS:
            return tokens, num_sampled, True
        constraint.accept(token_id)
        tokens.append(token_id)
        while (forced := constraint.next_forced()) is not None:
            constraint.accept(forced)
            tokens.append(forced)
        if constraint.is_complete:
            return tokens, num_sampled, True
    return tokens, num_sampled, False


def can_write(grammar: Grammar, text: str) -> bool:
    """Whether a model could write this text, and end with it."""
    matcher = grammar.start()
    mask_W = np.zeros(num_words(VOCAB_SIZE), dtype=np.int32)
    tokens = tiny_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids
    for token_id in tokens:
        if matcher.is_complete:
            return False
        matcher.fill_mask(mask_W)
        if not _has(mask_W, token_id):
            return False
        matcher.accept(token_id)
    if matcher.is_complete:
        return True
    matcher.fill_mask(mask_W)
    return _has(mask_W, EOS)


def _has(mask_W: NDArray[np.int32], token_id: int) -> bool:
    return bool((int(mask_W[token_id // 32]) >> (token_id % 32)) & 1)


def random_choice(seed: int) -> Callable[[list[int]], int]:
    return random.Random(seed).choice


def check_document(text: str, schema: Schema) -> None:
    """The document is JSON, with no number beyond a float's, and valid."""
    document = json.loads(text, parse_constant=_no_constant)
    Draft202012Validator(schema).validate(document)


def _no_constant(name: str) -> object:
    raise AssertionError(f"{name} is no JSON")


def _numbers(kind: str) -> st.SearchStrategy[Schema]:
    bounds = st.fixed_dictionaries(
        {"type": st.just(kind)},
        optional={
            "minimum": st.integers(-1000, 0),
            "maximum": st.integers(1, 1000),
        },
    )
    exclusive = st.fixed_dictionaries(
        {"type": st.just(kind), "exclusiveMinimum": st.integers(-9, 0)},
        optional={"exclusiveMaximum": st.integers(2, 99)},
    )
    multiples = st.fixed_dictionaries(
        {"type": st.just(kind), "multipleOf": st.sampled_from([1, 2, 3, 5, 7, 10])}
    )
    return st.one_of(bounds, exclusive, multiples)


_STRINGS = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={"minLength": st.integers(0, 3), "maxLength": st.integers(3, 8)},
    ),
    st.sampled_from(["^[a-z]{2,5}$", "[0-9]{3}-[0-9]{2}", "^(a|bc)*d$", "x", "^\\d+$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(
        ["date", "time", "date-time", "uuid", "ipv4", "email", "hostname", "duration"]
    ).map(lambda name: {"type": "string", "format": name}),
)
_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=5), st.just([1, {"a": "b"}])
)
_LEAVES = st.one_of(
    _numbers("integer"),
    _numbers("number"),
    _STRINGS,
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}]),
    _VALUES.map(lambda value: {"const": value}),
    st.lists(_VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)


def _objects(children: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    names = st.sampled_from(["a", "b", "the name", "é", "x-1"])
    properties = st.dictionaries(names, children, min_size=1, max_size=3)

    def closed(fields: dict[str, Schema], num_required: int, extra: object) -> Schema:
        schema = {"type": "object", "properties": fields, "required": [*fields][:num_required]}
        return {**schema, "additionalProperties": extra}

    extras = st.one_of(st.just(False), children)
    return st.builds(closed, properties, st.integers(0, 3), extras)


def _arrays(children: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.one_of(
        st.fixed_dictionaries(
            {"type": st.just("array"), "items": children, "maxItems": st.integers(2, 4)},
            optional={"minItems": st.integers(0, 2)},
        ),
        st.lists(children, min_size=1, max_size=3).map(
            lambda items: {"type": "array", "prefixItems": items, "items": False}
        ),
    )


def _combined(children: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    options = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        options.map(lambda some: {"anyOf": some}),
        children.map(lambda one: {"allOf": [one, {"title": "a note"}]}),
    )


def schemas() -> st.SearchStrategy[Schema]:
    """Schemas of every supported keyword, some levels deep."""
    plain = st.recursive(
        _LEAVES,
        lambda children: st.one_of(_objects(children), _arrays(children), _combined(children)),
        max_leaves=5,
    )
    referring = plain.map(lambda one: {"$defs": {"T": one}, "$ref": "#/$defs/T"})
    return st.one_of(plain, plain, referring)
