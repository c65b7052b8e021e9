"""What the numbers of a budget may be (no torch)."""

from __future__ import annotations

from sortserve.core.ranges import Range

__all__ = ["MILLISECONDS", "RANGES"]

MAX_MS = 86_400_000
"""The longest time that a budget may name: a day. Beyond it, leave the bound out."""
MILLISECONDS = Range(
    least=0,
    most=MAX_MS,
    without_least=True,
    allowed=f"a number of milliseconds above 0, to {MAX_MS}",
)
_SHARE = Range(least=0, most=1, without_least=True, allowed="a number above 0, to 1")
_QUALITY = Range(least=0, most=1, allowed="a number from 0 to 1")
_LAYER = Range(least=1, is_integer=True, allowed="an integer >= 1, an exit of the checkpoint")
RANGES = {
    "latency_ms": MILLISECONDS,
    "ttft_ms": MILLISECONDS,
    "tpot_ms": MILLISECONDS,
    "compute": _SHARE,
    "min_quality": _QUALITY,
    "exit_layer": _LAYER,
    "min_exit_layer": _LAYER,
}
"""By field of ``Budget``."""
