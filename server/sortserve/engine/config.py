"""Limits and choices of one engine (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from sortserve.core.plan import Runner
from sortserve.scheduling.kv_cache import KVCacheManager
from sortserve.scheduling.objective import DEFAULT_OBJECTIVE
from sortserve.scheduling.policies.table import DEFAULT_POLICY

__all__ = ["GPU_MEMORY_UTILIZATION", "EngineConfig"]

GPU_MEMORY_UTILIZATION = 0.9
"""Share of a GPU's memory that may be in use unless told; vLLM's default."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits and choices of one engine."""

    max_model_len: int
    """Most tokens of prompt and output together."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 1024
    policy: str = DEFAULT_POLICY
    """Its name in the table of policies."""
    objective: str = DEFAULT_OBJECTIVE
    """What the choice of exits makes most of: its name in the table of objectives."""
    min_quality: float = 0.0
    """The floor of requests that name none: see ``ExitTable``."""
    overload_delay_s: float = 2.0
    """Predicted wait beyond which requests that may be made shallower start so; 0: never."""
    overload_degrade: bool = False
    """Whether requests without a budget may be made shallower for the sake of others."""
    enable_prefix_caching: bool = True
    pages_are_resident: bool = False
    """Every page of the KV cache takes memory from the start, as on a GPU: see ``BlockPool``."""
    async_scheduling: bool = False
    """Plan a step while the one before it runs, on a runner that can ``launch``."""
    max_failed_steps: int = 3
    """So many steps that fail and give no token, nor their self-tests, end the engine."""
    seed: int | None = None
    """Of the generator that draws seeds for requests without one."""
    vocab_size: int | None = None
    """Token ids are below it; None: the caller answers for them."""

    def make_kv_cache(self, runner: Runner) -> KVCacheManager:
        """The books of a runner's KV cache, which is empty."""
        return KVCacheManager(
            num_pages=runner.num_pages,
            block_size=runner.block_size,
            slabs=runner.slabs,
            enable_prefix_caching=self.enable_prefix_caching,
            pages_are_resident=self.pages_are_resident,
        )
