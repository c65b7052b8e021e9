"""Machines to simulate (see ``sortserve.simulation``): one that was measured, two computed."""

from __future__ import annotations

from sortserve.cost.machine import Machine

__all__ = ["MACHINES"]


def _machine_8b(name: str, source: str, *, bytes_per_s: float, flop_per_s: float) -> Machine:
    """Llama-3.1-8B in bf16, 32 layers, from a card's memory and arithmetic rates.

    218 M parameters a layer and 525 M in the head; 8 KV heads of 128. Rates reached are taken as
    80 % of the memory's and 50 % of the arithmetic's; 1 ms a step for launches and the host.
    """
    layer_bytes, head_bytes, kv_bytes = 2 * 218e6, 2 * 525e6, 2 * 2 * 8 * 128
    memory, arithmetic = 0.8 * bytes_per_s, 0.5 * flop_per_s
    c0, a = 1e-3 + head_bytes / memory, layer_bytes / memory
    b, d, h = 2 * 218e6 / arithmetic, kv_bytes / memory, 2 * 525e6 / arithmetic
    exits = (8, 16, 24, 32)
    compute = {e: (218 * e + 525) / (218 * 32 + 525) for e in exits}
    line = (c0, a, b, d, h)
    return Machine(
        name=name, source=source, exits=exits, small=line, large=line, compute=compute, noise=0.03
    )


MACHINES = {
    "cpu2": Machine(
        name="cpu2",
        source="SmolLM2-135M bf16 on 2 cores of a server CPU: benchmarks/results, 2026-11-24",
        exits=(9, 15, 21, 30),
        small=(3.4e-3, 2.3e-4, 2.5e-5, 6e-8, 1e-4),
        large=(5e-3, 2.3e-4, 2.1e-5, 6e-8, 1e-4),
        compute={9: 0.447, 15: 0.605, 21: 0.763, 30: 1.0},
    ),
    "h100": _machine_8b(
        "h100",
        "computed, not measured: Llama-3.1-8B on H100 SXM data-sheet rates, 3.35 TB/s, 989 TFLOP/s",
        bytes_per_s=3.35e12,
        flop_per_s=989e12,
    ),
    "a100": _machine_8b(
        "a100",
        "computed, not measured: Llama-3.1-8B on A100 80 GB data-sheet rates, 2.04 TB/s, "
        "312 TFLOP/s",
        bytes_per_s=2.039e12,
        flop_per_s=312e12,
    ),
}
