"""Where a report goes: ``sorted.json``, and a folder of files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sortserve.checkpoint.sorted_json import SORTED_JSON, SortedInfo
from sortserve.core.atomic_write import write_atomically
from sortserve.core.errors import ConfigError
from sortserve_trainer.evaluation.plot import draw_quality
from sortserve_trainer.evaluation.report import Report

__all__ = ["prepare_folder", "write_files", "write_quality"]


def prepare_folder(folder: Path) -> None:
    """Find out before hours of work that their result could not be kept.

    Raises:
        ConfigError: the folder cannot be made.
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib  # noqa: F401

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def write_files(report: Report, folder: Path) -> None:
    """Write ``report.json``, ``quality.svg`` and ``quality.png``, each in one atomic step.

    Raises:
        ConfigError: they cannot be written.
    """
    plots = draw_quality(report)
    document = json.dumps(report.document(), indent=2, ensure_ascii=False) + "\n"
    files = {
        "report.json": document.encode(),
        "quality.svg": plots["svg"],
        "quality.png": plots["png"],
    }
    try:
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def write_quality(report: Report, model: str) -> str:
    """Put the report into ``sorted.json`` as ``quality`` and ``schedules``, in one atomic step.

    Those of an earlier run are replaced.

    Args:
        report: of ``model``.
        model: as the user named it.

    Returns:
        One line that says what was done, or why nothing was.

    Raises:
        ConfigError: ``sorted.json`` cannot be written.
        CheckpointError: it is no longer valid.
    """
    folder = Path(model).expanduser()
    info = SortedInfo.read(folder) if folder.is_dir() else None
    if info is None:
        return f"{report.model} has no {SORTED_JSON} here: the result is not written into it."
    quality = report.quality()
    missing = [exit_layer for exit_layer in info.exits if exit_layer not in quality]
    path = folder / SORTED_JSON
    if missing:
        left_out = ", ".join(map(str, missing))
        return f"{path} is left as it is: exits {left_out} were not measured."
    kept = {exit_layer: quality[exit_layer] for exit_layer in info.exits}
    usable = {e: verdict for e, verdict in report.usable().items() if e in kept}
    try:
        schedules = report.schedule_quality()
        replace(info, quality=kept, usable=usable, schedules=schedules).write(folder)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    return f"{path} has the result as quality{' and schedules' if report.schedules else ''}."


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"--output {folder} cannot be written: {reason}.", param="output")
