"""The metrics of several processes as one text, each series with the name of its process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["CONTENT_TYPE", "merged"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def merged(
    texts: Mapping[str, str],
    *,
    label: str = "replica",
    keeps: Callable[[str, str], bool] = lambda process, family: True,
) -> str:
    """One exposition in Prometheus' text format of several, family by family.

    Args:
        texts: the exposition of each process by its name; the names have no quotes or line ends.
        label: the label that gets the name.
        keeps: told a process and a family, whether its series are told.
    """
    heads: dict[str, list[str]] = {}
    series: dict[str, list[str]] = {}
    for process, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                _, kind, family, *_ = line.split(" ", 3)
                head = heads.setdefault(family, [])
                if keeps(process, family) and not any(h.split(" ", 2)[1] == kind for h in head):
                    head.append(line)
            elif line and keeps(process, family):
                series.setdefault(family, []).append(_labelled(line, label, process))
    return "".join(
        f"{line}\n" for name, lines in series.items() for line in (*heads.get(name, ()), *lines)
    )


def _labelled(line: str, label: str, value: str) -> str:
    name, brace, rest = line.partition("{")
    if brace:
        return f'{name}{{{label}="{value}",{rest}'
    name, _, rest = line.partition(" ")
    return f'{name}{{{label}="{value}"}} {rest}'
