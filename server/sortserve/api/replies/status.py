"""The body of ``GET /status``."""

from __future__ import annotations

from pydantic import BaseModel

__all__ = ["BudgetTotals", "ServerStatus"]


class BudgetTotals(BaseModel):
    """Requests that bounded a time, by what became of them."""

    met: int
    missed: int
    rejected: int


class ServerStatus(BaseModel):
    """Reply of `GET /status`. Keys of `..._by_exit` are exits."""

    status: str
    model: str
    max_model_len: int
    time_s: float
    num_running: int
    num_waiting: int
    running_by_exit: dict[str, int]
    kv_cache_usage: float
    pressure: float
    overload_level: int
    default_exit_layer: int
    tokens_by_exit: dict[str, int]
    layers_run: int
    layers_full: int
    budgets: BudgetTotals
