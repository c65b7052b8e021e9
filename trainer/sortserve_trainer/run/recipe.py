"""How a checkpoint was made, as a document and as its card."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from sortserve import __version__
from sortserve_trainer.run.settings import TrainSettings

__all__ = ["card_text", "command_line", "versions"]

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers")


def versions() -> dict[str, str]:
    """What the result depends on: this package, Python, and the libraries under the trainer."""
    found = {"sortserve": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):  # peft is not needed by every run
            found[name] = importlib.metadata.version(name)
    return found


def command_line(argv: Sequence[str]) -> str:
    """The command as it was typed."""
    return shlex.join(["sortserve", "train", *argv])


def card_text(
    settings: TrainSettings, base: str, exits: Sequence[int], recipe: Mapping[str, Any]
) -> str:
    """``README.md`` of a checkpoint: what it is, how it was made, how to use it."""
    name = settings.output.name
    losses = recipe.get("held_out_loss", {})
    rows = [f"| {e} | {losses[str(e)]:.3f} |" for e in exits if str(e) in losses]
    table = ["| exit layer | held-out loss (nats) |", "|---|---|", *rows] if rows else []
    data = [
        f"* `{source['name']}`, {source['rows']} rows, weight {source['weight']:g}, "
        f"sha256 `{source['sha256'][:16]}`"
        for source in recipe["data"]
    ]
    unfinished = ""
    if "stopped_by" in recipe:
        unfinished = f" Stopped by {recipe['stopped_by']}, of {recipe['steps_planned']} steps."
    lines = [
        "---",
        "library_name: sortserve",
        f"base_model: {base}",
        "tags: [sorted-fine-tuning, early-exit]",
        "---",
        "",
        f"# {name}",
        "",
        f"A sorted checkpoint: its first n layers are a model of their own for each n of "
        f"{', '.join(map(str, exits))}.",
        "",
        *table,
        "",
        "Serve it at any depth:",
        "",
        "```",
        f"sortserve serve {name}",
        "```",
        "",
        "## How it was made",
        "",
        f"Method `{recipe['method']}`, {recipe['tokens']:,} tokens in {recipe['steps']} steps, "
        f"seed {recipe['seed']}.{unfinished}",
        "",
        "```",
        recipe["command"],
        "```",
        "",
        *data,
        "",
        f"Versions: {', '.join(f'{k} {v}' for k, v in recipe['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"
