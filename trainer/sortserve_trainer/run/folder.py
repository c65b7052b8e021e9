"""``OUTPUT.run``: what a run needs beside its result, and what lets it be resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sortserve.core.atomic_write import write_atomically
from sortserve.core.errors import ConfigError
from sortserve_trainer.run.save import check_output, disk_errors, is_unfinished
from sortserve_trainer.run.settings import TrainSettings

__all__ = ["Run", "plain_settings"]

OF_ONE_START = {"max_time", "max_steps_per_run", "prepare_only", "dry_run"}
"""Settings that are not the run's, but of one start of it."""
FREE = {"log_every", "save_every", "report_to"}
"""Settings that a run may be resumed with other values of: no weight hangs on them."""


@dataclass(frozen=True)
class Run:
    """``OUTPUT.run``: everything of a run but its result."""

    folder: Path

    @classmethod
    def open(cls, settings: TrainSettings) -> Run:
        """Begin a run, or find the one that these very settings began."""
        run = cls(settings.output.with_name(f"{settings.output.name}.run"))
        record, wanted = run.folder / "run.json", plain_settings(settings)
        is_begun = record.is_file()
        if not (is_begun and is_unfinished(settings.output)):
            check_output(settings.output)
        if int(os.environ.get("RANK", "0")) > 0:
            return run
        if is_begun:
            _check_same(json.loads(record.read_text(encoding="utf-8")), wanted, run.folder)
            return run
        with disk_errors(f"--output {settings.output}"):
            run.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(record, json.dumps(wanted, indent=2).encode())
        return run

    @property
    def prepared(self) -> Path:
        """Folder of examples that ``--prepare-only`` has made."""
        return self.folder / "data"

    def finish(self) -> None:
        """The states have done their work; the logs stay."""
        for path in (self.folder / "states", self.folder / "heads", self.prepared):
            shutil.rmtree(path, ignore_errors=True)
        (self.folder / "run.json").unlink(missing_ok=True)


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    names = {*before, *now} - FREE
    different = sorted(k for k in names if before.get(k) != now.get(k))
    if different:
        name = different[0]
        raise ConfigError(
            f"{folder} holds an unfinished run with --{name.replace('_', '-')} "
            f"{before.get(name)!r}, not {now.get(name)!r}: give the same flags to resume it, "
            "name another --output, or delete that folder.",
            param=name.replace("_", "-"),
        )


def plain_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that the recipe tells, as JSON values."""
    values: dict[str, Any] = settings.model_dump(
        mode="json", exclude={"output", "device", *OF_ONE_START}
    )
    return values
