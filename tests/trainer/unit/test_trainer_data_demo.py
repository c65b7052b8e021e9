"""The demo data is what its script writes, and what is held out is not in the training rows."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from sortserve_trainer.data import DataSource, load_examples
from support.tiny_models import tiny_tokenizer

FOLDER = Path(__file__).parents[3] / "examples" / "data"


@pytest.mark.parametrize("name", ["demo.jsonl", "demo-dev.jsonl"])
def test_the_file_has_the_rows_of_the_script(name: str) -> None:
    rows = runpy.run_path(str(FOLDER / "make_demo.py"))["files"]()[name]

    assert [json.loads(line) for line in (FOLDER / name).read_text().splitlines()] == rows


def test_a_held_out_question_is_not_trained_on_but_its_answer_is_known() -> None:
    train, held_out = (
        [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]
        for name in ("demo.jsonl", "demo-dev.jsonl")
    )

    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in held_out}
    assert {row["output"] for row in held_out} <= {row["output"] for row in train}


def test_the_demo_is_small_and_its_rows_are_short() -> None:
    examples = load_examples(
        DataSource(str(FOLDER / "demo.jsonl")),
        tiny_tokenizer(),
        max_length=256,
        train_on_prompts=False,
    )

    assert 200 <= len(examples) <= 300
    assert max(map(len, examples)) <= 128
