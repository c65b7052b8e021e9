"""``GET /status``: how the server stands, as one small JSON object for pages and scripts."""

from __future__ import annotations

from fastapi import APIRouter

from sortserve.api.replies.status import BudgetTotals, ServerStatus
from sortserve.api.routes.dependencies import Serving
from sortserve.api.routes.responses import errors

__all__ = ["router"]

router = APIRouter(tags=["operations"])
"""The status route."""


@router.get("/status", responses=errors(401))
async def status(service: Serving) -> ServerStatus:
    """What runs and waits now, and what was done since the start.

    Rates are for the reader to take, from two replies and their `time_s`.
    """
    worker, totals = service.worker, service.totals
    stats = worker.stats()
    newcomer = worker.admission_stats(service.settings.default_budget)
    tokens_by_exit = totals.tokens_by_exit
    layers_run, layers_full = totals.layers
    exits = worker.exits.layers
    return ServerStatus(
        status=worker.state,
        model=service.settings.served_model_name,
        max_model_len=worker.max_model_len,
        time_s=round(worker.clock(), 6),
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        running_by_exit={str(e): stats.running_by_exit.get(e, 0) for e in exits},
        kv_cache_usage=round(stats.kv_pages_used / max(1, stats.kv_pages_total), 4),
        pressure=round(newcomer.pressure, 4),
        overload_level=newcomer.overload_level,
        default_exit_layer=newcomer.default_exit_layer,
        tokens_by_exit={str(e): tokens_by_exit.get(e, 0) for e in exits},
        layers_run=layers_run,
        layers_full=layers_full,
        budgets=BudgetTotals(**totals.budgets),
    )
