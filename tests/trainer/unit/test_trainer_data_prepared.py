"""Prepared examples are those of the data, and are found only by what made them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sortserve.core.errors import ConfigError
from sortserve_trainer.data import DataSource, Example, PreparedData
from sortserve_trainer.data.prepared import read_examples, write_examples
from support.tiny_models import tiny_tokenizer

ROWS = [
    {"instruction": f"Count to {i}.", "output": "one two three", "finish_reason": reason}
    for i, reason in enumerate(["stop", "length"] * 5)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def prepared(folder: Path, max_length: int = 64, *, train_on_prompts: bool = False) -> PreparedData:
    return PreparedData(folder / "prepared", tiny_tokenizer(), max_length, train_on_prompts)


def same(left: list[Example], right: list[Example]) -> bool:
    def parts(examples: list[Example]) -> list[object]:
        return [
            (e.token_ids.tolist(), e.is_target.tolist(), e.is_unwanted is None)
            + (() if e.is_unwanted is None else tuple(e.is_unwanted.tolist()))
            for e in examples
        ]

    return parts(left) == parts(right)


@pytest.mark.parametrize("largest", [60_000, 70_000])
def test_examples_are_read_as_they_were_written(tmp_path: Path, largest: int) -> None:
    draw = np.random.default_rng(0)

    def example(length: int, *, generated: bool) -> Example:
        is_target, is_unwanted = np.zeros((2, length), dtype=np.bool_)
        is_target[1:], is_unwanted[-1] = draw.random(length - 1) < 0.5, generated
        is_target[-1] &= not generated
        ids = draw.integers(0, largest, length).astype(np.int32)
        return Example(ids, is_target, is_unwanted if generated else None)

    examples = [example(n, generated=n % 2 == 0) for n in (2, 3, 50, 7)]
    examples[2].token_ids[0] = largest

    write_examples(tmp_path / "examples.npz", examples)

    assert same(read_examples(tmp_path / "examples.npz"), examples)
    assert [path.name for path in tmp_path.iterdir()] == ["examples.npz"]


def test_the_data_file_is_not_needed_any_more(data: Path, tmp_path: Path) -> None:
    source = DataSource(str(data))
    examples, digest = prepared(tmp_path).prepare(source)
    data.unlink()

    found, found_digest = prepared(tmp_path).load(source)

    assert same(found, examples)
    assert found_digest == digest


def test_a_data_file_that_has_changed_is_read_anew(data: Path, tmp_path: Path) -> None:
    source = DataSource(str(data))
    before, _ = prepared(tmp_path).prepare(source)
    data.write_text(data.read_text().replace("three", "four"))

    after, _ = prepared(tmp_path).load(source)

    assert not same(after, before)


@pytest.mark.parametrize(
    "other", [{"max_length": 20}, {"train_on_prompts": True}], ids=["length", "prompts"]
)
def test_examples_cut_in_another_way_are_others(
    data: Path, tmp_path: Path, other: dict[str, int]
) -> None:
    source = DataSource(str(data))
    prepared(tmp_path).prepare(source)
    data.unlink()

    with pytest.raises(ConfigError, match=r"data\.jsonl"):
        prepared(tmp_path, **other).load(source)  # type: ignore[arg-type]


def test_a_damaged_file_is_named(data: Path, tmp_path: Path) -> None:
    source = DataSource(str(data))
    prepared(tmp_path).prepare(source)
    (path,) = (tmp_path / "prepared").glob("*.npz")
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ConfigError, match=path.name):
        prepared(tmp_path).load(source)
