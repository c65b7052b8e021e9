"""What a terminal can show: colours, a dim line, and text that cannot move its cursor."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

__all__ = ["PLAIN", "has_colours", "print_dim", "printable", "tint", "tints"]

PLAIN = "\033[0m"
DIM = "\033[2m"
RAMP = ("179", "107", "73", "74", "104")
"""From the shallowest exit to the deepest, as on the playground: gold, green, teal, blue, indigo.
Numbers of the 256-colour palette, of a lightness that can be read on black and on white."""


def has_colours(stream: TextIO | None, environ: Mapping[str, str] | None = None) -> bool:
    """Whether to colour what goes to ``stream``: a terminal that can, and a user who wants it.

    ``NO_COLOR`` counts if it is not empty (no-color.org).
    """
    environ = os.environ if environ is None else environ
    if stream is None or environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def tints(exits: Sequence[int]) -> Mapping[int, str]:
    """The escape sequence of each exit; exits that are many share neighbouring colours.

    Args:
        exits: ascending.
    """
    last, steps = len(RAMP) - 1, len(exits) - 1
    # The full depth, which may be the only exit, has the last colour.
    places = [last - round((steps - i) * last / max(1, steps)) for i in range(len(exits))]
    return {e: f"\033[38;5;{RAMP[place]}m" for e, place in zip(exits, places, strict=True)}


def tint(text: str, escape: str | None) -> str:
    """``text`` in a colour, which ends with it; as it is without one."""
    return f"{escape}{text}{PLAIN}" if escape and text else text


def printable(text: str) -> str:
    """``text`` without what would move the cursor or change the terminal: a model may write it."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def print_dim(line: str) -> None:
    """A line on stderr, dim where it has colours."""
    if sys.stderr is None:
        return
    print(f"{DIM}{line}{PLAIN}" if has_colours(sys.stderr) else line, file=sys.stderr)
