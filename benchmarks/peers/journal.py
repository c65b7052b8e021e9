"""What was measured so far, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.table import Measured

__all__ = ["Journal"]


class Journal:
    """A file of JSON lines; those of another commit, processor or length do not count."""

    def __init__(
        self, path: Path, circumstances: Mapping[str, Any], *, fresh: bool = False
    ) -> None:
        self._path = path
        self._circumstances = json.loads(json.dumps(circumstances))
        if fresh:
            path.unlink(missing_ok=True)
        self.measured = self._read()

    def has(self, configuration: str, num_clients: int, turn: int) -> bool:
        """Whether this was measured before."""
        return any(
            (m.configuration, m.num_clients, m.turn) == (configuration, num_clients, turn)
            for m in self.measured
        )

    def add(self, measured: Measured) -> None:
        """Keeps a measurement, on disk at once."""
        self.measured.append(measured)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            line = {"circumstances": self._circumstances} | vars(measured)
            file.write(json.dumps(line) + "\n")

    def _read(self) -> list[Measured]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                document = json.loads(line)
            except ValueError:
                continue  # the run was cut off while it wrote this
            if document.pop("circumstances", None) == self._circumstances:
                found.append(Measured(**document))
        return found
