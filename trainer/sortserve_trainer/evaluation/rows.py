"""Rows of the files that are answered: questions with their accepted answers, and prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sortserve_trainer.data.rows import Row, json_kind, read_rows
from sortserve_trainer.data.source import bad_data

__all__ = ["Prompt", "Question", "choose", "read_prompts", "read_questions"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A question of a closed-book test."""

    text: str
    aliases: tuple[str, ...]
    """Every accepted answer; at least one."""


@dataclass(frozen=True)
class Prompt:
    """What a user might ask."""

    text: str


def read_questions(path: Path) -> list[Question]:
    """The rows of a question file: ``question``, ``answers``, and perhaps ``target``.

    Raises:
        ConfigError: the file cannot be read or is empty, or a row is bad; the message begins with
            its file and line.
    """
    return _not_empty(path, [_question(row) for row in read_rows(path)])


def read_prompts(path: Path) -> list[Prompt]:
    """The rows of a prompt file: ``instruction`` and perhaps ``input``, or ``turns``.

    Raises:
        ConfigError: as ``read_questions``.
    """
    return _not_empty(path, [_prompt(row) for row in read_rows(path)])


def choose(rows: Sequence[_T], limit: int | None, seed: int) -> list[_T]:
    """At most ``limit`` rows, in their order, the same for the same seed."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def _question(row: Row) -> Question:
    if "question" not in row.fields or "answers" not in row.fields:
        raise bad_data(row.place, "a row of --qa has `question` and `answers`")
    answers = row.fields["answers"]
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers:
        raise bad_data(row.place, f"`answers` is {_kind(answers)}, not a list of answers")
    texts = [_text(row, f"answers[{i}]", answer) for i, answer in enumerate(answers)]
    if row.fields.get("target") is not None:
        texts.append(_text(row, "target", row.fields["target"]))
    return Question(_text(row, "question", row.fields["question"]).strip(), tuple(texts))


def _prompt(row: Row) -> Prompt:
    if "turns" in row.fields:
        turns = row.fields["turns"]
        if not isinstance(turns, list) or not turns:
            raise bad_data(row.place, f"`turns` is {_kind(turns)}, not a list of texts")
        return Prompt(_text(row, "turns[0]", turns[0]).strip())
    if "instruction" not in row.fields:
        raise bad_data(row.place, "a row of --prompts has `instruction` or `turns`")
    parts = [row.fields["instruction"], row.fields.get("input") or ""]
    names = ("instruction", "input")
    texts = [_text(row, name, part).strip() for name, part in zip(names, parts, strict=True)]
    return Prompt("\n\n".join(text for text in texts if text))


def _not_empty(path: Path, rows: list[_T]) -> list[_T]:
    if not rows:
        raise bad_data(str(path), "there is no row in it")
    return rows


def _kind(value: object) -> str:
    return "an empty list" if value == [] else json_kind(value)


def _text(row: Row, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise bad_data(row.place, f"`{name}` is {json_kind(value)}, not a string")
    return value
