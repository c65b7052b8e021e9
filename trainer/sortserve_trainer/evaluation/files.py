"""The held-out files of an evaluation: read before any weights, so that a bad row costs no time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortserve_trainer.data import (
    DataSource,
    Example,
    Pack,
    file_digest,
    load_examples,
    pack_examples,
)
from sortserve_trainer.evaluation.rows import (
    Prompt,
    Question,
    choose,
    read_prompts,
    read_questions,
)
from sortserve_trainer.evaluation.settings import EvalSettings

__all__ = ["HeldOut", "file_names", "load_packs", "read_held_out"]

PACK_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What is measured on, by the short name of each file."""

    data: dict[str, str]
    """A file or hub data set; tokenised later, by the tokenizer of each model."""
    questions: dict[str, list[Question]]
    prompts: dict[str, list[Prompt]]
    described: list[dict[str, Any]]
    """Name, kind and sha256 of each, and how many rows were taken."""


def read_held_out(settings: EvalSettings) -> HeldOut:
    """Read and choose the rows of all files that are answered; find the others.

    Raises:
        ConfigError: a file cannot be read or is empty, or a row is bad; file and line are named.
    """
    data = dict(zip(file_names(settings.data), settings.data, strict=True))
    questions = {
        name: choose(read_questions(path), settings.limit_rows, settings.seed)
        for name, path in zip(file_names(settings.qa), settings.qa, strict=True)
    }
    prompts = {
        name: choose(read_prompts(path), settings.limit_rows, settings.seed)
        for name, path in zip(file_names(settings.prompts), settings.prompts, strict=True)
    }
    described: list[dict[str, Any]] = [
        {"name": name, "kind": "data", "sha256": _digest(reference)}
        for name, reference in data.items()
    ]
    described += _describe("qa", settings.qa, questions)
    described += _describe("prompts", settings.prompts, prompts)
    return HeldOut(data=data, questions=questions, prompts=prompts, described=described)


def _describe(
    kind: str, paths: Sequence[Path], rows: Mapping[str, Sequence[object]]
) -> list[dict[str, Any]]:
    return [
        {"name": name, "kind": kind, "rows": len(chosen), "sha256": file_digest(path)}
        for path, (name, chosen) in zip(paths, rows.items(), strict=True)
    ]


def file_names(references: Sequence[str | Path]) -> list[str]:
    """A short name for each, all different: ``dolly-3k-dev`` for ``data/dolly-3k/dev.jsonl``."""
    names: list[str] = []
    for reference in references:
        path = Path(reference).expanduser()
        name = f"{path.resolve().parent.name}-{path.stem}" if path.is_file() else str(reference)
        same = sum(other == name or other.startswith(f"{name}#") for other in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return names


def load_packs(
    reference: str, tokenizer: Any, settings: EvalSettings, *, max_length: int
) -> list[Pack]:
    """The examples of one --data file that the limits leave, packed.

    Args:
        reference: a file or a hub data set id.
        tokenizer: of the model that is measured.
        settings: the limits and the seed.
        max_length: most tokens of an example.

    Raises:
        ConfigError: as ``load_examples``.
    """
    examples = load_examples(
        DataSource(reference), tokenizer, max_length=max_length, train_on_prompts=False
    )
    examples = choose(examples, settings.limit_rows, settings.seed)
    if settings.limit_tokens is not None:
        examples = _cut(examples, settings.limit_tokens, settings.seed)
    return pack_examples(examples, max(PACK_LENGTH, max_length))


def _cut(examples: Sequence[Example], limit_tokens: int, seed: int) -> list[Example]:
    """Random examples with at most ``limit_tokens`` targets, in their order; at least one."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    num_targets = 0
    for i in order:
        num_targets += int(examples[i].is_target.sum())
        if chosen and num_targets > limit_tokens:
            break
        chosen.append(i)
    return [examples[i] for i in sorted(chosen)]


def _digest(reference: str) -> str | None:
    """None for what is no file here: a data set of the hub."""
    return file_digest(reference) if Path(reference).expanduser().is_file() else None
