"""Calibrations kept between starts: one small file per machine, model, dtype and thread count."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from sortserve.core.atomic_write import PRIVATE, write_atomically
from sortserve.core.cache_bound import prune
from sortserve.core.user_cache import is_private, make_private
from sortserve.cost.model import Samples, StepShape, is_time

__all__ = ["cache_path", "machine_name", "read_samples", "write_samples"]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
MAX_SAMPLES = 10_000
MAX_BYTES = 4 * 2**20
MAX_COUNT = 2**53
"""No number of a step's shape is larger."""


def machine_name() -> str:
    """The processor and how many of its cores this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return f"{model} x {num_cores}"


def cache_path(folder: Path, key: Mapping[str, object]) -> Path:
    """The file of a key: all that step times depend on."""
    text = json.dumps({name: str(value) for name, value in key.items()}, sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return folder / "calibration" / f"{name}.json"


def read_samples(path: Path) -> list[tuple[StepShape, float]] | None:
    """The samples of an earlier calibration; None if there is none that can be used."""
    try:
        if not is_private(path) or path.stat().st_size > MAX_BYTES:
            return None
        document = json.loads(path.read_text())
        if document["format_version"] != FORMAT_VERSION:
            return None
        if document.pop("digest", None) != _digest(document):
            raise ValueError("it is not what was written")
        samples = [_sample(shape, seconds) for shape, seconds in document["samples"][:MAX_SAMPLES]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("the calibration in %s cannot be used: %s", path, error)
        return None
    with suppress(OSError):  # a cache that we may only read
        os.utime(path)  # so that it is not the one that was used longest ago
    return samples or None


def _sample(shape: list[object], seconds: object) -> tuple[StepShape, float]:
    """A sample as it was written; ValueError or TypeError if it was not."""
    if not isinstance(seconds, int | float) or not is_time(seconds):
        raise ValueError(f"{seconds!r} is no time of a step")
    counts = [count for count in shape if isinstance(count, int) and 0 <= count <= MAX_COUNT]
    if len(counts) != len(shape) or 0 in counts[:3]:
        raise ValueError(f"{shape!r} is no shape of a step")
    return StepShape(*counts), float(seconds)


def write_samples(path: Path, samples: Samples, key: Mapping[str, object]) -> None:
    """Keep a calibration. A folder that cannot be written costs the next start its seconds."""
    document = {
        "format_version": FORMAT_VERSION,
        "key": {name: str(value) for name, value in key.items()},
        "samples": [[astuple(shape), seconds] for shape, seconds in samples],
    }
    document["digest"] = _digest(document)
    try:
        make_private(path.parent)
        write_atomically(path, json.dumps(document).encode(), mode=PRIVATE)
        prune(path.parent.parent)
    except OSError as error:
        logger.warning("the calibration cannot be kept in %s: %s", path, error)


def _digest(document: Mapping[str, object]) -> str:
    text = json.dumps(document, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
