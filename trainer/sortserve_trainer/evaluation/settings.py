"""Every setting of ``sortserve eval``, in one frozen model; the command line is read off it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, InstanceOf, model_validator

from sortserve.core.schedule import DepthSchedule
from sortserve.process.values import Count, FilePath, Layers, Text
from sortserve_trainer.run.settings import CountOrZero, Seed
from sortserve_trainer.run.validation import validated

__all__ = ["GROUPS", "EvalSettings", "load_eval_settings"]

GROUPS = {
    "model": "What to measure",
    "data": "Held-out files",
    "limit_tokens": "How much",
    "max_tokens": "Generation",
    "dtype": "Computing",
    "output": "Results",
}
"""Title of the group of flags that begins at a field."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


def _as_schedule(value: object) -> object:
    return DepthSchedule.parse(value) if isinstance(value, str) else value


Schedule = Annotated[InstanceOf[DepthSchedule], BeforeValidator(_as_schedule)]
Files = Annotated[tuple[FilePath, ...], BeforeValidator(_as_list)]


class EvalSettings(BaseModel):
    """What an evaluation is started with."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    # What to measure
    model: Text
    """What to measure: a folder, a Hugging Face id, or `package:PKG/FILE.gguf`."""
    exits: Layers | None = None
    """Exit layers to measure, separated by commas; the full depth is added. Default: those of the
    checkpoint's sorted.json."""
    schedule: Annotated[tuple[Schedule, ...], BeforeValidator(_as_list)] = ()
    """Depth schedule to measure as well, as K:E,K:E: from output token K on, exit E, as in
    0:30,32:27,96:24. May be repeated."""
    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face id."""
    base: Text = "auto"
    """Model to measure at full depth for comparison. auto: what the checkpoint was trained from;
    none: no comparison."""

    # Held-out files
    data: Annotated[tuple[Text, ...], BeforeValidator(_as_list)] = ()
    """Text to predict: a .json, .jsonl or .txt file in any form `sortserve train` reads. Gives
    loss, agreement and score. May be repeated."""
    qa: Files = ()
    """Questions to answer from memory: rows of `question` and `answers`, all accepted answers. May
    be repeated."""
    prompts: Files = ()
    """Prompts to answer freely: rows of `instruction` (and `input`) or `turns`, of which the first
    is asked. May be repeated."""

    # How much
    limit_tokens: Count | None = None
    """Most target tokens of a --data file. Default: all."""
    limit_rows: Count | None = None
    """Most rows of each file. Default: all."""
    seed: Seed = 0
    """Chooses the rows where there is a limit."""
    max_length: Count = 1024
    """Most tokens of an example: longer answers are cut, longer texts are split."""

    # Generation
    max_tokens: Count = 256
    """Most tokens of an answer to a prompt."""
    qa_max_tokens: Count = 24
    """Most tokens of an answer to a question."""
    qa_instruction: str = "Answer in a few words."
    """Added to each question on a line of its own. Empty adds nothing."""
    samples: CountOrZero = 5
    """Answers of each exit that the report quotes: those to the first prompts."""
    batch_size: Count = 64
    """Answers generated at once."""

    # Computing
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What is computed in; losses and agreement are taken in float32 from there. auto: bfloat16
    where the device is fast at it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    quantize: Text = "none"
    """Measure the model with its weights made smaller, as `sortserve serve --quantize` serves it.
    Such a result is not written into sorted.json."""

    # Results
    output: FilePath | None = None
    """Folder for report.json, quality.svg and quality.png. Default: none."""
    write: bool = True
    """Put the result into the checkpoint's sorted.json as `quality`, if it has one and all its
    exits were measured."""

    @model_validator(mode="after")
    def _check_together(self) -> EvalSettings:
        if not (self.data or self.qa or self.prompts):
            raise ValueError("there is nothing to measure: give --data, --qa or --prompts")
        return self


def load_eval_settings(flags: Mapping[str, Any]) -> EvalSettings:
    """The settings from flags, by field name.

    Raises:
        ConfigError: one line that names the flag, its value and what is allowed.
    """
    return validated(EvalSettings, flags)
