"""The public JSON Schema test suite, held to what models can write.

Each of its schemas is kept or refused. Of one that is kept, no invalid document can be written, and
every valid one can, but for ``cannot_be_written``; of one that is refused, the error names a word
of it. The suite comes in jsonschema's source package and is looked for where the environment
variable says (docs/structured-outputs.md has the command); the counts are printed: run it with
``-s``.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import (
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
)
from jsonschema.protocols import Validator

from sortserve.core.errors import InvalidRequestError
from sortserve.core.grammar import Grammar
from support.schemas import EOS, can_write, compiler, format_of, write
from support.tiny_models import tiny_tokenizer

VARIABLE = "SORTSERVE_JSON_SCHEMA_SUITE"
SUITE = os.environ.get(VARIABLE, "")
DRAFTS: dict[str, type[Validator]] = {
    "draft4": Draft4Validator,
    "draft6": Draft6Validator,
    "draft7": Draft7Validator,
    "draft2019-09": Draft201909Validator,
    "draft2020-12": Draft202012Validator,
}
MAX_ORDERS = 50
"""Orders of an object's fields that are tried: a document has them in the schema's."""
DOCUMENTS = 2000
_SIBLINGS_OF_REF = ("draft4", "draft6", "draft7")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not SUITE, reason=f"{VARIABLE} names no folder with the suite's tests"),
]
Case = tuple[str, dict[str, Any]]


def cases(folder: str) -> Iterator[Case]:
    paths = sorted((Path(SUITE) / folder).glob("*.json"))
    assert paths, f"no tests in {folder}"
    for path in paths:
        for case in json.loads(path.read_text(encoding="utf-8")):
            yield f"{folder}/{path.stem}: {case['description']}", case


def orders(value: Any) -> Iterator[Any]:
    """The same document, its fields in any order."""
    if isinstance(value, dict):
        for some in itertools.permutations(value.items()):
            inner = [list(itertools.islice(orders(one), 4)) for _, one in some]
            for ones in itertools.product(*inner):
                yield dict(zip((name for name, _ in some), ones, strict=True))
    elif isinstance(value, list):
        inner = [list(itertools.islice(orders(one), 4)) for one in value]
        yield from (list(ones) for ones in itertools.product(*inner))
    else:
        yield value


def is_writable(grammar: Grammar, document: Any) -> bool:
    texts = (json.dumps(one, ensure_ascii=False) for one in orders(document))
    return any(can_write(grammar, text) for text in itertools.islice(texts, MAX_ORDERS))


def cannot_be_written(folder: str, schema: dict[str, Any], test: dict[str, Any]) -> bool:
    """Valid documents that are not needed: there is another of the same meaning, or none cares."""
    document, said = test["data"], test["description"]
    has_long_number = any(abs(number) >= 10**20 for number in numbers(document))
    has_whole_float = any(type(n) is float and n.is_integer() for n in numbers(document))
    is_annotation = "only an annotation" in said  # a format is always kept
    overrides = folder in _SIBLINGS_OF_REF and "ignored" in said  # words beside $ref count
    return has_long_number or has_whole_float or is_annotation or overrides


def numbers(document: Any) -> Iterator[float]:
    if isinstance(document, dict):
        document = list(document.values())
    if isinstance(document, list):
        for one in document:
            yield from numbers(one)
    elif isinstance(document, int | float) and not isinstance(document, bool):
        yield document


def words_of(schema: Any) -> set[str]:
    """The words of a schema, and of those in it."""
    words: set[str] = set()
    if isinstance(schema, dict):
        words |= schema.keys()
        schema = list(schema.values())
    if isinstance(schema, list):
        words |= {word for one in schema for word in words_of(one)}
    return words


@pytest.mark.parametrize("folder", [*DRAFTS, "draft2020-12/optional"])
def test_every_schema_is_kept_or_refused_by_name(folder: str) -> None:
    counts: Counter[str] = Counter()
    faults = []
    for name, case in cases(folder):
        schema = case["schema"]
        try:
            grammar = compiler().compile(format_of(schema))
        except InvalidRequestError as error:
            counts["schemas refused"] += 1
            is_named = any(word in str(error) for word in words_of(schema))
            if not is_named and not isinstance(schema, bool) and "is false" not in str(error):
                faults.append(f"{name} refused: {error}")
            continue
        counts["schemas kept"] += 1
        for test in case["tests"]:
            can = is_writable(grammar, test["data"])
            excused = test["valid"] and not can and cannot_be_written(folder, schema, test)
            kind = "valid" if test["valid"] else "invalid"
            counts[f"{kind}, {'written' if can else 'not written'}"] += 1
            if can != test["valid"] and not excused and not is_known(name, test):
                faults.append(f"{name} ({test['description']}): {test['data']!r} {can}")
    print(f"\n{folder}: {dict(sorted(counts.items()))}")
    assert not faults, "\n".join(faults)


def is_known(name: str, test: dict[str, Any]) -> bool:
    """U+FEFF is white space to ECMAScript, and not to the regular expressions here."""
    return "ecmascript-regex" in name and "zero-width whitespace" in test["description"]


def test_formats_let_nothing_invalid_through() -> None:
    counts: Counter[str] = Counter()
    faults = []
    for name, case in cases("draft2020-12/optional/format"):
        try:
            grammar = compiler().compile(format_of(case["schema"]))
        except InvalidRequestError as error:
            counts["formats refused"] += 1
            faults += [] if "format" in str(error) else [f"{name} refused: {error}"]
            continue
        counts["formats kept"] += 1
        for test in case["tests"]:
            can = is_writable(grammar, test["data"])
            kind = "valid" if test["valid"] else "invalid"
            counts[f"{kind}, {'written' if can else 'not written'}"] += 1
            if can and not test["valid"]:
                faults.append(f"{name}: {test['data']!r}")
    print(f"\nformats: {dict(sorted(counts.items()))}")
    assert not faults, "\n".join(faults)


def hasty_choice(seed: int) -> Callable[[list[int]], int]:
    """Draws any token, and often one that may end something."""
    drawn = random.Random(seed)
    ends = {EOS, *(tiny_tokenizer().convert_tokens_to_ids(c) for c in '"]}')}

    def choose(allowed: list[int]) -> int:
        ending = [token for token in allowed if token in ends]
        return drawn.choice(ending if ending and drawn.random() < 0.3 else allowed)

    return choose


def test_two_thousand_random_documents_are_valid() -> None:
    """Over all schemas of the suite that are kept, in turn, until there are so many."""
    kept = []
    for folder, validator in DRAFTS.items():
        for name, case in cases(folder):
            try:
                grammar = compiler().compile(format_of(case["schema"]))
            except InvalidRequestError:
                continue
            kept.append((name, grammar, validator(case["schema"])))
    num_ended = num_begun = 0
    for seed, (name, grammar, validator_) in enumerate(itertools.cycle(kept)):
        tokens, _, ended = write(grammar, hasty_choice(seed), most=200)
        num_begun += 1
        if ended:
            num_ended += 1
            text = tiny_tokenizer().decode(tokens)
            assert validator_.is_valid(json.loads(text)), f"{name}: {text}"
        if num_ended == DOCUMENTS:
            break
    print(f"\n{DOCUMENTS} documents of {len(kept)} schemas, {num_begun} begun")
    assert num_begun < 3 * DOCUMENTS
