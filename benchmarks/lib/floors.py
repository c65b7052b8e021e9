"""How fast this machine could be at best: the floor that stands beside every measured time.

A step reads each weight it needs once and each row's keys and values once (memory floor), and
multiplies every token with every weight (compute floor). Both are divided by rates measured here,
in the same process: the better of a large copy and a large sum in bytes per second, and a large
matrix product in the model's dtype in FLOP per second. No step can be faster than the larger of
the two, unless the model fits a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sortserve.model.config import ModelConfig
from sortserve.model.weight import Weight
from sortserve.model.weights import ModelWeights, OwnLayerWeights

__all__ = [
    "Machine",
    "ModelCost",
    "Work",
    "best_s",
    "figure",
    "measure_machine",
    "speedups",
    "synchronize",
]

BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""By the type of the device: well above any last-level cache of the machines we run on, and so much
that a launch on a GPU is nothing beside it."""
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
REPEATS, LEAST_S = 5, 0.5
"""Runs of each, and how long they go on at least: another program may hold a core for a while."""


@dataclass(frozen=True)
class Work:
    """What one step has to move and to compute."""

    num_bytes: float
    num_flops: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured rates of one device."""

    copy_bytes_per_s: float
    """Bytes read plus bytes written."""
    read_bytes_per_s: float
    gemm_flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """The better of the two memory rates."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def memory_floor_s(self, work: Work) -> float:
        """Least time to move the bytes."""
        return work.num_bytes / self.bytes_per_s

    def compute_floor_s(self, work: Work) -> float:
        """Least time to do the arithmetic."""
        return work.num_flops / self.gemm_flops_per_s

    def floor_s(self, work: Work) -> float:
        """The larger of the two floors."""
        return max(self.memory_floor_s(work), self.compute_floor_s(work))


def measure_machine(
    device: torch.device, dtype: torch.dtype, *, gemm_size: int | None = None
) -> Machine:
    """Measures the rates; takes a second or two, and memory for two buffers.

    Args:
        device: of which.
        dtype: of the matrix product.
        gemm_size: rows and columns of its matrices; None: enough to fill the device.
    """
    buffer_bytes, gemm_size = BUFFER_BYTES[device.type], gemm_size or GEMM_SIZE[device.type]
    source = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_s = best_s(lambda: target.copy_(source), device)
    read_s = best_s(source.sum, device)
    a, b = (torch.randn(gemm_size, gemm_size, device=device).to(dtype) for _ in range(2))
    gemm_s = best_s(lambda: a @ b, device)
    return Machine(
        copy_bytes_per_s=2 * buffer_bytes / copy_s,
        read_bytes_per_s=buffer_bytes / read_s,
        gemm_flops_per_s=2 * gemm_size**3 / gemm_s,
    )


def best_s(run: Callable[[], Tensor], device: torch.device) -> float:
    """The shortest of a few runs, after one that is not counted: a floor is a best case."""
    times: list[float] = []
    began_s = time.perf_counter()
    while len(times) <= REPEATS or time.perf_counter() < began_s + LEAST_S:
        synchronize(device)
        started_s = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started_s)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ModelCost:
    """Bytes and FLOPs of steps of one model, counted from its weights."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self._config = config
        self._weights = weights

    def decode(self, exit_layer: int, *, num_rows: int, context_len: float) -> Work:
        """One token for each of ``num_rows`` rows that have ``context_len`` tokens cached."""
        trunk, top = self._trunk(exit_layer), self._top(exit_layer)
        num_layers = exit_layer + (exit_layer in self._own_layers())
        kv_bytes = num_rows * context_len * self._kv_bytes_per_token(num_layers)
        attention = self._attention_flops(num_layers, num_rows * context_len)
        return Work(
            num_bytes=trunk.num_bytes + top.num_bytes + kv_bytes,
            num_flops=num_rows * (trunk.num_flops + top.num_flops) + attention,
        )

    def prefill(self, exit_layer: int, *, num_tokens: int) -> Work:
        """A whole prompt in one step; its last token passes the head."""
        trunk, top = self._trunk(exit_layer), self._top(exit_layer)
        num_pairs = num_tokens * (num_tokens + 1) / 2  # each token sees itself and those before
        own_pairs = num_tokens if exit_layer in self._own_layers() else 0
        return Work(
            num_bytes=trunk.num_bytes
            + top.num_bytes
            + num_tokens * self._kv_bytes_per_token(exit_layer),
            num_flops=num_tokens * trunk.num_flops
            + top.num_flops
            + self._attention_flops(exit_layer, num_pairs)
            + self._attention_flops(1, own_pairs),
        )

    def _trunk(self, exit_layer: int) -> Work:
        """The layers up to the exit, and the keys and values of exits' own layers up to there;
        FLOPs of one token.
        """
        layers = self._weights.layers
        parts = [_work(layers[i % len(layers)]) for i in range(exit_layer)]
        for passed, layer in self._own_layers().items():
            if passed <= exit_layer:
                parts.append(Work(layer.kv.nbytes, 2 * layer.kv.num_elements))
        return _sum(parts)

    def _own_layers(self) -> dict[int, OwnLayerWeights]:
        modules = self._weights.exit_modules
        return {e: module.layer for e, module in modules.items() if module.layer is not None}

    def _top(self, exit_layer: int) -> Work:
        """Exit module and head; FLOPs of one row."""
        module = self._weights.exit_modules.get(exit_layer)
        head = self._weights.lm_head if module is None or module.head is None else module.head
        parts = [Work(head.nbytes, 2 * head.num_elements)]
        if module is not None:
            kind, config = module.kind, self._config
            num_elements = kind.num_matrix_elements(config) - kind.num_passing_elements(config)
            num_bytes: float = sum(tensor.nbytes for tensor in module.tensors.values())
            if module.layer is not None:
                num_bytes += _work(module.layer).num_bytes - module.layer.kv.nbytes
            parts.append(Work(num_bytes, 2 * num_elements))
        return _sum(parts)

    def _kv_bytes_per_token(self, exit_layer: int) -> int:
        return exit_layer * 2 * self._config.kv_size * self._weights.dtype.itemsize

    def _attention_flops(self, exit_layer: int, num_pairs: float) -> float:
        """Two products (scores, values) for each pair of a query and a cached token."""
        return exit_layer * num_pairs * 4 * self._config.q_size


def _work(weights: object) -> Work:
    """What a weights dataclass has: all of it is read, the matrices multiply."""
    values = [getattr(weights, f.name) for f in fields(weights)]  # type: ignore[arg-type]
    return Work(
        num_bytes=sum(value.nbytes for value in values if isinstance(value, Tensor | Weight)),
        num_flops=sum(2 * value.num_elements for value in values if isinstance(value, Weight)),
    )


def _sum(parts: list[Work]) -> Work:
    return Work(sum(p.num_bytes for p in parts), sum(p.num_flops for p in parts))


def figure(median_s: float, num_tokens: int, work: Work, machine: Machine) -> dict[str, float]:
    """One measured step beside its floors; times in milliseconds."""
    return {
        "step_ms": round(median_s * 1e3, 3),
        "tokens_per_s": round(num_tokens / median_s, 1),
        "memory_floor_ms": round(machine.memory_floor_s(work) * 1e3, 3),
        "compute_floor_ms": round(machine.compute_floor_s(work) * 1e3, 3),
        "percent_of_floor": round(100 * machine.floor_s(work) / median_s, 1),
    }


def speedups(figures: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """By exit: how much faster than full depth a step is, and how much faster it could be."""
    full = figures[max(figures)]

    def floor_ms(at: dict[str, float]) -> float:
        return max(at["memory_floor_ms"], at["compute_floor_ms"])

    rows = {}
    for exit_layer, at in figures.items():
        ideal = floor_ms(full) / floor_ms(at)
        measured = full["step_ms"] / at["step_ms"]
        rows[exit_layer] = {
            "ideal": round(ideal, 3),
            "measured": round(measured, 3),
            "share_of_ideal": round(measured / ideal, 3),
        }
    return rows
