"""How many examples a search looks at.

    @settings(max_examples=examples(100))

The default suite looks at half of what a test names, other ones in each run.
``SORTSERVE_TEST_EXAMPLES`` is a factor: ``make test-search`` takes all, 10 is for a night.
"""

from __future__ import annotations

import os

__all__ = ["examples"]

_FACTOR = float(os.environ.get("SORTSERVE_TEST_EXAMPLES", "0.5"))


def examples(count: int) -> int:
    """``count`` times the factor, at least one."""
    return max(1, round(count * _FACTOR))
