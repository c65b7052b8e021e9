"""What may be chosen of an engine, before there is one."""

from __future__ import annotations

from dataclasses import dataclass

from sortserve.core.budget import DEFAULT_MIN_QUALITY
from sortserve.core.errors import ConfigError
from sortserve.core.ranges import numbers
from sortserve.engine.config import GPU_MEMORY_UTILIZATION
from sortserve.model.backends import AUTO, check_backend_name
from sortserve.scheduling.objective import DEFAULT_OBJECTIVE

__all__ = ["EngineOptions", "check_count"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What may be chosen of an engine; names and defaults are those of ``sortserve serve``.

    Raises:
        ConfigError: a name or a number is not allowed.
    """

    max_model_len: int | None = None
    """None: what the checkpoint allows."""
    backend: str = AUTO
    enforce_eager: bool = False
    require_backend: str | None = None
    """The only backend to be used; None: any that passes its check."""
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    policy: str = "deadline"
    objective: str = DEFAULT_OBJECTIVE
    min_quality: float = DEFAULT_MIN_QUALITY
    overload_degrade: bool = False
    overload_delay: float = 2.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 1024
    async_scheduling: bool | None = None
    """None: on a GPU."""
    kv_cache_memory: int | None = None
    """Bytes; None: what a GPU has left, or a share of what a CPU's machine has free."""
    block_size: int = 16
    enable_prefix_caching: bool = True
    max_failed_steps: int = 3
    step_timeout: float = 300.0
    """Seconds; a rank that is longer at one step is lost. 0: never."""
    tensor_parallel_size: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        check_backend_name(self.backend)
        self._check_required_backend()
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_failed_steps"):
            check_count(name, getattr(self, name))
        check_count("tensor_parallel_size", self.tensor_parallel_size)
        _check_share("min_quality", self.min_quality)
        _check_share("gpu_memory_utilization", self.gpu_memory_utilization)
        for name, least in (("max_model_len", 2), ("kv_cache_memory", 1)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)

    def _check_required_backend(self) -> None:
        if self.require_backend is None:
            return
        check_backend_name(self.require_backend, "require-backend")
        if self.backend not in (AUTO, self.require_backend):
            raise ConfigError(
                f"--require-backend={self.require_backend} and --backend={self.backend} name two "
                "different ones.",
                param="require-backend",
            )


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no integer from ``least`` on, as the value of a flag.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag}={value!r} is not allowed: an integer >= {least}.", param=flag)


def _check_share(name: str, value: object) -> None:
    share = numbers(0, 1)
    if value not in share:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag}={value!r} is not allowed: {share.allowed}.", param=flag)
