"""The results of a long benchmark as they come: one that was cut off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Journal"]


class Journal:
    """Finished parts by name, in a file of JSON lines whose first says what run they are of.

    Args:
        path: of the file; None: nothing is kept.
        run: what must be equal for parts to belong together: the arguments that matter.

    Raises:
        ValueError: the file holds another run.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        self._path = path
        self._parts: dict[str, Any] = {}
        head = json.loads(json.dumps(dict(run), default=str))
        if path is None:
            return
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, _ = text.rpartition("\n")  # the last line may be half
        if not whole:
            whole = json.dumps({"run": head})
        self._read(path, whole, head)

    def _read(self, path: Path, whole: str, head: Mapping[str, Any]) -> None:
        first, *lines = map(json.loads, whole.splitlines())
        found = first.get("run")
        if found != head:
            other = found if isinstance(found, dict) else {}
            names = sorted(n for n in {*head, *other} if other.get(n) != head.get(n))
            raise ValueError(
                f"--journal {path} is of a run with other values of {', '.join(names)}: give them, "
                "or another file."
            )
        self._parts = {line["part"]: line["value"] for line in lines}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(whole + "\n", encoding="utf-8")

    def __contains__(self, part: str) -> bool:
        return part in self._parts

    def __getitem__(self, part: str) -> Any:
        return self._parts[part]

    def add(self, part: str, value: Any) -> Any:
        """Keep a finished part; returns it as it is read back."""
        line = json.dumps({"part": part, "value": value})
        self._parts[part] = json.loads(line)["value"]
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        return self._parts[part]
