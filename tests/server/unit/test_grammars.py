"""Formats compiled by llguidance: what they let through, what they refuse, and what they force."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.core.errors import InvalidRequestError
from sortserve.core.grammar import OutputFormat
from sortserve.text.schemas import check_schema
from sortserve.text.tokenizer import Tokenizer
from support.byte_tokenizer import make_byte_tokenizer, make_metaspace_tokenizer
from support.schemas import (
    FIVE_FIELDS,
    can_write,
    check_document,
    compiler,
    format_of,
    random_choice,
    schemas,
    write,
)
from support.tiny_models import tiny_tokenizer

WHEELS: dict[str, Any] = {
    "$defs": {
        f"d{i}": {
            "type": ["null", "object"] if i == 0 else "object",
            "properties": {
                "x": {"$ref": f"#/$defs/d{max(i - 1, 0)}"},
                "y": {"$ref": f"#/$defs/d{min(i + 1, 30)}"},
            },
            "required": ["x"],
        }
        for i in range(31)
    },
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/d0"}, "b": {"$ref": "#/$defs/d30"}},
    "required": ["b"],
}
"""Each definition needs the one before it, and leads to the one after it."""

NINE_PATTERNS_OF_ONE_FIELD: dict[str, Any] = {
    "allOf": [{"properties": {"a": {"type": "string", "pattern": f"^.*{i}.*$"}}} for i in range(8)]
    + [{"additionalProperties": {"type": "string", "format": "email"}}]
}
TOKENIZER = Tokenizer(tiny_tokenizer(), frozenset({2}))


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


@given(schema=schemas(), seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_a_schema_gives_only_valid_documents_or_is_refused(
    schema: dict[str, Any], seed: int
) -> None:
    try:
        grammar = compiler().compile(format_of(schema))
    except InvalidRequestError:
        return

    tokens, _, ended = write(grammar, random_choice(seed))

    if ended:
        check_document(text_of(tokens), schema)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_random_documents_are_valid() -> None:
    """With the figures printed: run it with ``-s``."""
    counts = {"schemas": 0, "refused": 0, "ended": 0, "cut": 0}

    @given(schema=schemas(), seed=st.integers(0, 1000))
    @settings(max_examples=2000, deadline=None, database=None)
    def check(schema: dict[str, Any], seed: int) -> None:
        counts["schemas"] += 1
        try:
            grammar = compiler().compile(format_of(schema))
        except InvalidRequestError:
            counts["refused"] += 1
            return
        tokens, _, ended = write(grammar, random_choice(seed), most=2000)
        counts["ended" if ended else "cut"] += 1
        if ended:
            check_document(text_of(tokens), schema)

    check()

    print(counts)
    assert counts["ended"] > 1500


@given(schema=schemas(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_forced_tokens_are_the_same_in_a_run_and_one_by_one(
    schema: dict[str, Any], seed: int
) -> None:
    try:
        grammar = compiler().compile(format_of(schema))
    except InvalidRequestError:
        return

    # The choice depends on what is allowed and on nothing else: no draw for a forced token.
    def choose(allowed: list[int]) -> int:
        return allowed[(seed * 7919 + len(allowed)) % len(allowed)]

    run, _, run_ended = write(grammar, choose, most=300)
    single, _, single_ended = write(grammar, choose, most=300, one_by_one=True)

    shared = min(len(run), len(single))
    assert run[:shared] == single[:shared]
    assert not (run_ended and single_ended) or run == single


def test_most_of_an_object_is_forced() -> None:
    grammar = compiler().compile(format_of(FIVE_FIELDS))
    ratios = []
    for seed in range(20):
        tokens, num_sampled, ended = write(grammar, random_choice(seed))
        assert ended
        ratios.append(num_sampled / len(tokens))

    assert sum(ratios) / len(ratios) <= 0.7


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"type": "strnig"}, "", "Invalid type: strnig"),
        ({"type": "array", "uniqueItems": True}, "", 'Unimplemented keys: ["uniqueItems"]'),
        (
            {"type": "object", "properties": {"a": {"type": "array", "contains": {}}}},
            ".properties.a",
            'Unimplemented keys: ["contains"]',
        ),
        (
            {
                "$defs": {"P": {"type": "object", "properties": {"q": {"not": {}}}}},
                "anyOf": [{"type": "null"}, {"$ref": "#/$defs/P"}],
            },
            ".$defs.P.properties.q",
            'Unimplemented keys: ["not"]',
        ),
        ({"type": "string", "pattern": "(?=a)"}, "", "look-around"),
        ({"type": "string", "pattern": "(a{999}){999}"}, ".pattern", "written out"),
        ({"type": "string", "format": "colour"}, "", "Unknown format: colour"),
        ({"$ref": "#/$defs/nowhere"}, "", "does not exist"),
        ({"$ref": "#/mine", "mine": {"divisibleBy": 2}}, ".mine.divisibleBy", "multipleOf"),
        ({"$ref": "#/a%20b", "a b": {"divisibleBy": 2}}, ".a%20b.divisibleBy", "multipleOf"),
        ({"$ref": "#mine", "$defs": {"a": {"$anchor": "mine"}}}, ".$ref", "begin with"),
        ({"items": {"$id": "http://example.com/a"}}, ".items.$id", "below the root"),
        ({"$ref": "http://example.com/schema"}, ".$ref", "http://example.com/schema"),
        ({"$ref": "#"}, "", "no end"),
        ({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}, "", "no end"),
        (WHEELS, "", "too many $refs"),
        ({"type": "array", "minItems": 10**6, "items": {"const": 1}}, "", "shortest document"),
        ({"type": "integer", "multipleOf": 123456789}, "", "multipleOf"),
        ({"type": "integer", "multipleOf": 0}, ".multipleOf", "above 0"),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": True}, ".exclusiveMinimum", "draft"),
        ({"type": "integer", "divisibleBy": 2}, ".divisibleBy", "multipleOf"),
        ({"x-guidance": {"lenient": True}, "not": {}}, ".x-guidance", "the server sets it"),
        ({"const": 1e300}, ".const", "not exact"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "", "Unsatisfiable"),
        ({"enum": []}, "", "Unsatisfiable"),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "", "oneOf is not supported"),
        (
            {"patternProperties": {"a*": {}, "aa*": {"type": "null"}}},
            "",
            "patternProperties may not overlap",
        ),
        ({"type": "number", "maximum": 1e30}, "", "minimum, maximum, exclusive"),
        ({"$schema": "http://example.com/mine"}, ".$schema", "json-schema.org"),
        ({"disallow": "string"}, ".disallow", "not supported"),
        ({"required": "a"}, "", "required"),
        ({"type": "object", "required": [{}]}, "", "required"),
        ({"allOf": [{"pattern": f"{i}"} for i in range(9)]}, "", "patterns"),
        ({"properties": {"x": NINE_PATTERNS_OF_ONE_FIELD}}, ".properties.x", "patterns"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_its_place(
    schema: dict[str, Any], place: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as refused:
        compiler().compile(format_of(schema))

    assert refused.value.param == f"schema{place}"


@pytest.mark.parametrize("value", [True, False])
def test_a_schema_that_is_no_object_is_refused(value: bool) -> None:
    with pytest.raises(InvalidRequestError, match="give an object"):
        compiler().compile(OutputFormat("json", json.dumps(value), "schema"))


def allows(schema: dict[str, Any], text: str) -> bool:
    return can_write(compiler().compile(format_of(schema)), text)


@pytest.mark.parametrize(
    ("schema", "fits", "fits_not"),
    [
        ({"type": "array", "maxItems": 1.0, "items": {"const": 1}}, "[1]", "[1, 1]"),
        ({"type": "string", "minLength": 2.0}, '"ab"', '"a"'),
        ({"type": "array", "uniqueItems": False, "items": {"const": 1}}, "[1, 1]", "[2]"),
        ({"type": "string", "format": "date"}, '"2024-02-29"', '"2023-02-29"'),
        ({"type": "string", "format": "date"}, '"2000-02-29"', '"1900-02-29"'),
        ({"type": "string", "format": "date"}, '"0001-04-30"', '"0000-04-30"'),
        ({"type": "string", "format": "date", "pattern": "^2"}, '"2024-01-31"', '"1999-01-31"'),
        ({"type": "string", "format": "time"}, '"23:59:59.5Z"', '"23:59:60Z"'),
        (
            {"type": "string", "format": "date-time", "allOf": [{"pattern": "Z$"}]},
            '"2024-02-29T00:00:00Z"',
            '"2024-02-29T00:00:00+01:00"',
        ),
    ],
)
def test_what_the_library_does_not_take_so_is_said_otherwise(
    schema: dict[str, Any], fits: str, fits_not: str
) -> None:
    assert allows(schema, fits)
    assert not allows(schema, fits_not)


@given(day=st.dates())
def test_every_date_can_be_written(day: date) -> None:
    assert allows({"type": "string", "format": "date"}, f'"{day.isoformat()}"')


@given(year=st.integers(1, 9999), month=st.integers(0, 19), day=st.integers(0, 39))
def test_only_dates_can_be_written(year: int, month: int, day: int) -> None:
    text = f"{year:04d}-{month:02d}-{day:02d}"
    try:
        date.fromisoformat(text)
        exists = True
    except ValueError:
        exists = False

    assert allows({"type": "string", "format": "date"}, f'"{text}"') == exists


def test_a_schema_that_may_contain_itself_is_served() -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["x"],
        "additionalProperties": False,
    }

    tokens, _, ended = write(compiler().compile(format_of(schema)), random_choice(1))

    assert ended
    check_document(text_of(tokens), schema)


@pytest.mark.parametrize(
    ("kind", "text", "allowed"),
    [
        ("regex", r"[a-z]{2,4}@x\.com", r"[a-z]{2,4}@x\.com"),
        ("choice", json.dumps(["yes", "no", "é\n\"'", "😀"]), "yes|no|é\n\"'|😀"),
        ("grammar", 'root ::= "a" | "b" root', "b*a"),
        ("grammar", 'start: /[0-9]/ "+" start | /[0-9]/', r"([0-9]\+)*[0-9]"),
    ],
)
def test_other_formats_give_what_they_describe(kind: str, text: str, allowed: str) -> None:
    grammar = compiler().compile(OutputFormat(kind, text))

    for seed in range(20):
        tokens, _, ended = write(grammar, random_choice(seed))
        assert ended
        assert re.fullmatch(allowed, text_of(tokens))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a"),
        ("regex", "(ab){100000}"),
        ("grammar", "start: nothing"),
        ("grammar", 'start: "a" start'),
        ("grammar", "root ::= ("),
    ],
)
def test_other_formats_that_make_no_sense_are_refused(kind: str, text: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        compiler().compile(OutputFormat(kind, text, "structured_outputs.grammar"))

    assert refused.value.param == "structured_outputs.grammar"


@pytest.mark.parametrize("schema", [{}, {"type": "number"}, {"type": "integer"}])
def test_digits_do_not_run_away(schema: dict[str, Any]) -> None:
    """A model that writes a digit wherever it can still ends its number."""
    ones = [i for i in range(260) if TOKENIZER.token_bytes(i) == b"1"]

    def prefers_one(allowed: list[int]) -> int:
        return next((t for t in allowed if t in ones), allowed[0])

    tokens, _, ended = write(compiler().compile(format_of(schema)), prefers_one)

    assert ended
    assert json.loads(text_of(tokens)) == int("1" * 20)


def test_white_space_does_not_run_away() -> None:
    blanks = [i for i in range(260) if TOKENIZER.token_bytes(i).strip(b" \n\t\r") == b""]
    grammar = compiler().compile(format_of(FIVE_FIELDS))

    def prefers_blanks(allowed: list[int]) -> int:
        return next((t for t in allowed if t in blanks and t != 2), allowed[-1])

    tokens, _, ended = write(grammar, prefers_blanks)

    assert ended
    check_document(text_of(tokens), FIVE_FIELDS)


def test_the_same_format_is_compiled_once() -> None:
    one = compiler().compile(format_of(FIVE_FIELDS))

    assert compiler().compile(format_of(dict(FIVE_FIELDS))) is one


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"type": "string", "pattern": f"^{i}$"} for i in range(20)]},
        {
            "allOf": [
                {"properties": {f"p{i}": {"type": "string", "pattern": "a"}}} for i in range(20)
            ]
        },
    ],
)
def test_patterns_of_different_values_may_be_many(schema: dict[str, Any]) -> None:
    compiler().compile(format_of(schema))


def test_what_fails_at_the_first_field_is_refused_before() -> None:
    """More optional fields than the library follows at once."""
    fields = {f"p{i}": {"type": "string", "pattern": f"a{i}.*"} for i in range(1500)}
    schema = {"type": "object", "properties": fields, "additionalProperties": False}

    with pytest.raises(InvalidRequestError, match="items"):
        compiler().compile(format_of(schema))


def test_the_place_of_a_fault_is_not_looked_for_at_any_price() -> None:
    """Each of 40 schemas around the fault holds 100,000 characters: ten of them are tried."""
    schema: dict[str, Any] = {"not": {}, "title": "x" * 100_000}
    for _ in range(40):
        schema = {"type": "array", "items": schema}

    with pytest.raises(InvalidRequestError, match="not") as refused:
        compiler().compile(format_of(schema))

    assert refused.value.param is not None
    assert refused.value.param.count(".items") == 10


@pytest.mark.parametrize("order", [range(3000), range(2999, -1, -1)])
def test_a_long_chain_of_references_is_looked_at_once(order: range) -> None:
    """Whichever way round its definitions stand: it takes seconds if each hop is a pass."""
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in order}
    definitions["d3000"] = {"type": "string", "minLength": 16_383}

    with pytest.raises(InvalidRequestError, match="shortest document"):
        check_schema({"$defs": definitions, "$ref": "#/$defs/d0"}, "format")


@pytest.mark.parametrize("make", [make_byte_tokenizer, make_metaspace_tokenizer])
def test_both_kinds_of_tokenizer_write_what_they_say(make: Any) -> None:
    hf_tokenizer = make()
    eos = hf_tokenizer.eos_token_id
    tokenizer = Tokenizer(hf_tokenizer, frozenset({eos}))
    schema = {"enum": ["the hello world", "é 你好"]}

    grammar = tokenizer.grammars.compile(format_of(schema))
    matcher = grammar.start()
    tokens: list[int] = []

    mask_W = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
    while not matcher.is_complete:
        matcher.fill_mask(mask_W)
        allowed = np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))
        assert allowed.max() < tokenizer.vocab_size
        matcher.accept(int(allowed[-1]))
        tokens.append(int(allowed[-1]))

    prompt = tokenizer.encode("a", add_special_tokens=False)
    text = tokenizer.decode([*prompt, *tokens]).removeprefix(tokenizer.decode(prompt))
    assert json.loads(text) in schema["enum"]


@pytest.mark.parametrize(
    ("format_", "texts"),
    [
        (OutputFormat("choice", '["<|im_end|>"]'), ["<|im_end|>"]),
        (OutputFormat("choice", '["x <|im_end|> y", "b"]'), ["x <|im_end|> y", "b"]),
        (OutputFormat("regex", r"[ab]<\|im_end\|>c"), ["a<|im_end|>c", "b<|im_end|>c"]),
        (OutputFormat("json", '{"enum": ["a<|im_start|>", "b"]}'), ['"a<|im_start|>"', '"b"']),
    ],
)
def test_what_looks_like_a_special_token_is_text(format_: OutputFormat, texts: list[str]) -> None:
    grammar = compiler().compile(format_)
    tokenizer = tiny_tokenizer()

    ways: list[Callable[[list[int]], int]] = [min, max, *map(random_choice, range(8))]
    answers = [write(grammar, choose) for choose in ways]

    assert all(ended for _, _, ended in answers)
    assert not {0, 1, 2} & {token for tokens, _, _ in answers for token in tokens}
    assert {tokenizer.decode(tokens) for tokens, _, _ in answers} == set(texts)


def test_a_grammar_cannot_name_a_special_token() -> None:
    with pytest.raises(InvalidRequestError, match="unknown special token") as refused:
        compiler().compile(OutputFormat("grammar", 'start: "a" <|im_end|>'))

    assert "available" not in str(refused.value)
