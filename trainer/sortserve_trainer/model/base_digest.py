"""Whether a base is the one that a run began with, without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from sortserve.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sortserve.checkpoint.exit_modules import EXIT_MODULES
from sortserve.checkpoint.layout import CheckpointLayout

__all__ = ["base_digest"]

SLICES, SLICE_BYTES = 64, 1 << 16
"""Of each file, evenly spread: training changes nearly every weight, and a base of many gigabytes
is not to be read twice at each start."""


def base_digest(layout: CheckpointLayout) -> str:
    """The sha256, in hexadecimal, of samples of everything that is trained on top of.

    Scores beside the weights (``sorted.json``) do not count, nor does where the folders are.
    """
    digest = hashlib.sha256()
    for path in _files(layout):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for part in _samples(path):
            digest.update(part)
    return digest.hexdigest()


def _files(layout: CheckpointLayout) -> Iterator[Path]:
    if layout.gguf is not None:
        yield layout.gguf
    else:
        yield layout.model / "config.json"
        yield from sorted(layout.model.glob("model*.safetensors"))
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXIT_MODULES):
        if (layout.own / name).is_file():
            yield layout.own / name


def _samples(path: Path) -> Iterator[bytes]:
    last = max(0, path.stat().st_size - SLICE_BYTES)
    with path.open("rb") as file:
        for place in sorted({last * i // (SLICES - 1) for i in range(SLICES)}):
            file.seek(place)
            yield file.read(SLICE_BYTES)
