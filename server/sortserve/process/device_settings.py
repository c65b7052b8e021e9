"""Settings of ``sortserve serve`` that say what the model runs on: a part of ``ServeSettings``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from sortserve.engine.config import GPU_MEMORY_UTILIZATION
from sortserve.process.values import MAX_THREADS, Auto, Count, Number, Text

__all__ = ["DeviceSettings", "ReplicaSettings"]


class DeviceSettings(BaseSettings):
    """Device, backend, and what a model may take of them."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=False,
    )

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    backend: Text = "auto"
    """What the model computes with: reference (plain PyTorch), triton (our kernels for CUDA),
    cpu (our C++ kernels), flashinfer. auto: the fastest that works here, never flashinfer. One that
    does not compute what the reference does on this machine, or fails, is not used: the next that
    works is."""
    require_backend: Text | None = None
    """The backend that must be used: end with exit code 2 where it cannot be, or where it does not
    compute what the reference does. Default: none."""
    enforce_eager: bool = False
    """On a GPU, launch the operations of decode steps one by one, not as CUDA graphs."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), Number] = (
        GPU_MEMORY_UTILIZATION
    )
    """Share of a GPU's memory that may be in use, other programs counted: what weights and the
    largest step leave of it is the KV cache's, unless --kv-cache-memory says how much."""
    num_threads: Annotated[Annotated[int, Field(ge=1, le=MAX_THREADS), Number] | None, Auto] = None
    """CPU threads of each rank, at most 1024 and one a core. auto, the default: the ranks share the
    cores that the process may use (affinity, CPU quota, no second hardware thread), and steps use
    fewer while that is faster, because other programs keep the cores busy."""
    tensor_parallel_size: Count = 1
    """Ranks that the model is divided among: CUDA devices, or processes on a CPU."""


class ReplicaSettings(DeviceSettings):
    """How many engines there are, and who runs them."""

    replicas: Annotated[Annotated[int, Field(ge=1, le=1024), Number] | None, Auto] = None
    """Engines behind this server, each in a process of its own, on any machine of a Ray cluster
    (`RAY_ADDRESS`) or of a Ray that is started here. Needs the extra `ray`. auto, the default: one,
    in this process, without Ray."""
    max_replicas: Annotated[Annotated[int, Field(ge=1, le=1024), Number] | None, Auto] = None
    """Most engines: between --replicas and so many, as pressure and missed budgets ask. auto, the
    default: always --replicas."""
