"""A model writes training data: one row per prompt, going on where it was cut."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sortserve import LLM
from sortserve.core.request import FinishReason
from sortserve_trainer.commands.selfdata import main
from support.tiny_models import make_tiny_checkpoint

PROMPTS = [
    {"instruction": "Say hello.", "input": ""},
    {"question": "What is up?", "answers": ["the sky"]},
    {"instruction": "Repeat this.", "input": "twice " * 200},
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "model", exits=None)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    return path


def write(model: Path, prompts: Path, output: Path, *more: str) -> list[dict[str, str]]:
    arguments = (
        f"{prompts} --model {model} --output {output} --max-prompt-tokens 64 --max-tokens 60"
    )
    assert main([*arguments.split(), *more]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_every_prompt_has_a_row_in_the_form_that_training_reads(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    rows = write(model, prompts, tmp_path / "out.jsonl")

    assert [row["instruction"][:12] for row in rows] == [
        "Say hello.",
        "What is up?",
        "Repeat this.",
    ]
    assert all(set(row) == {"instruction", "input", "output"} for row in rows)


def test_an_answer_that_was_cut_or_to_a_prompt_too_long_is_left_empty(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    rows = write(model, prompts, tmp_path / "out.jsonl", "--max-tokens", "1")

    assert [row["output"] for row in rows] == ["", "", ""]


def test_a_whole_answer_is_kept_unless_it_goes_around_in_circles(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Hello to you.", "so it goes and " * 9]

    def scripted(self: LLM, prompts: list[list[int]], *_: object, **__: object) -> list[Any]:
        answers = [SimpleNamespace(text=t, finish_reason=FinishReason.STOP) for t in texts]
        return [SimpleNamespace(outputs=(answer,)) for answer in answers[: len(prompts)]]

    monkeypatch.setattr(LLM, "generate", scripted)

    rows = write(model, prompts, tmp_path / "out.jsonl")

    assert [row["output"] for row in rows] == ["Hello to you.", "", ""]


def test_every_answer_can_be_kept_with_how_it_ended(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    rows = write(model, prompts, tmp_path / "out.jsonl", "--max-tokens", "1", "--keep-all")

    assert [row.get("finish_reason") for row in rows] == ["length", "length", None]
    assert rows[0]["output"]
    assert not rows[2]["output"]  # the prompt was too long


def test_a_run_that_was_cut_goes_on_after_its_last_whole_row(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    first = {"instruction": "kept", "input": "", "output": "as it is"}
    output.write_text(json.dumps(first) + '\n{"instruction": "half', encoding="utf-8")

    rows = write(model, prompts, output)

    assert rows[0] == first
    assert rows[1]["instruction"] == "What is up?"
    assert len(rows) == len(PROMPTS)


def test_a_model_that_does_not_exist_is_one_line_and_exit_code_2(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(prompts), "--model", str(tmp_path / "none"), "--output", str(tmp_path / "o")]

    assert main(arguments) == 2
    assert "does not exist" in capsys.readouterr().err
