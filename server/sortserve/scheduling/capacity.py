"""How much of the machine the live promises need: one number (no torch).

A row with a gap of g seconds needs 1 / g steps a second that reach its exit. Steps nest: one to
layer 30 also serves exit 9. So with R(e) the largest rate of any row at exit e or deeper,

    decode = sum over exits e of (R(e) - R(next deeper)) * base(e) + sum over rows of row / gap

and 1 would be the whole time. Prompts come on top. In the order in which they are due, all up to
each one must fit the time until it is due, beside the rows that decode by then:

    pressure = max(decode, over prompts i: decode before i + work up to i / time until i is due)

Every promise can be kept, in the mean, as long as the pressure is at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sortserve.scheduling.demand import Demand, StepCosts
from sortserve.scheduling.demand_table import DemandTable

__all__ = ["pressure"]


def pressure(
    demands: Sequence[Demand],
    costs: StepCosts,
    *,
    now: float,
    busy_s: float = 0.0,
    from_due_s: float = -math.inf,
) -> float:
    """The share of the machine that these demands need; above 1 some promise will be broken.

    Args:
        demands: of all live requests.
        costs: of steps.
        now: the engine's clock.
        busy_s: seconds until the machine can begin with them; below 0: it has begun so long ago.
        from_due_s: prompts that are due before are taken to be in time: one that is due later waits
            for them, and changes nothing for them.
    """
    if not demands:
        return 0.0
    exits = sorted({e for d in demands for e in (d.exit_layer, d.floor_layer)})
    table = DemandTable.of(demands, costs, exits)
    return table.need(table.level, now=now, busy_s=busy_s, from_due_s=from_due_s).share
