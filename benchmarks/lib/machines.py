"""Machines to simulate (see ``sortserve.simulation``): one that was measured, others computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sortserve.core.schedule import DepthSchedule, ScheduleInfo
from sortserve.cost.machine import Machine
from sortserve.cost.step_curve import StepCurve

__all__ = ["MACHINES", "document_of", "machine_named", "machine_of", "soft_scores"]


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


JUDGED = {
    12: -0.709,
    16: -0.529,
    20: -0.309,
    24: -0.165,
    28: -0.162,
    32: 0.009,
    36: 0.015,
    40: 0.091,
}
"""SoFT LLaMA-2 13B after four epochs, each exit against the whole model of plain fine-tuning: wins
less losses over comparisons, by PandaLM. Table 5 of "Sorted LLaMA" (arXiv 2309.08968 v2)."""


def soft_scores(beside: float) -> dict[int, float]:
    """Scores relative to a model that was judged ``beside``: how often each wins.

    A judgement s in [-1, 1] means that (1 + s) / 2 of the comparisons are won, ties counted half.
    The score of exit E is (1 + s_E) / (1 + beside), at most 1. Beside the plainly fine-tuned model
    (0), which is how the paper tells it, the exit at 80 % of the layers ties full depth. Beside
    the deepest exit of its own model (0.091) it has 0.925, because that one beats the plain model.
    """
    return {e: min(1.0, (1.0 + s) / (1.0 + beside)) for e, s in JUDGED.items()}


def _soft_13b(name: str, about: str, *, beside: float) -> Machine:
    """LLaMA-2 13B in bf16 on one H100 SXM, with the exits and the quality that SoFT published.

    From the model's configuration: 40 layers, hidden 5120, MLP 13824, 40 heads of 128 for queries,
    keys and values alike, a vocabulary of 32,000 and an output matrix of its own. So 317 M
    parameters a layer, 164 M in the head, and 20 KiB of keys and values for each token and layer.
    Rates as for the 8B model. What 90 % of 80 GB leave beside the weights holds the KV cache.
    """
    hidden, inner, vocab, num_layers = 5120, 13824, 32_000, 40
    layer, head = 4 * hidden**2 + 3 * hidden * inner, vocab * hidden
    memory, arithmetic = 0.8 * 3.35e12, 0.5 * 989e12
    kv_bytes = 2 * 2 * hidden
    line = (
        1e-3 + 2 * head / memory,
        2 * layer / memory,
        2 * layer / arithmetic,
        kv_bytes / memory,
        2 * head / arithmetic,
    )
    page_bytes = 16 * 4 * kv_bytes  # a block of 16 tokens in the 4 layers between two exits
    free_bytes = 0.9 * 80e9 - 2 * (num_layers * layer + 2 * head)
    full = num_layers * layer + head
    return Machine(
        name=name,
        source="computed, not measured: LLaMA-2 13B bf16 on H100 SXM data-sheet rates, 3.35 TB/s, "
        f"989 TFLOP/s; quality as published for Sorted Fine-Tuning (arXiv 2309.08968 v2, Table 5), "
        f"{about}",
        exits=tuple(JUDGED),
        small=line,
        large=line,
        compute={e: (layer * e + head) / full for e in JUDGED},
        score=soft_scores(beside),
        noise=0.03,
        num_pages=int(free_bytes / page_bytes),
    )


MACHINES = {
    "soft-13b": _soft_13b("soft-13b", "beside plain fine-tuning, as the paper has it", beside=0.0),
    "soft-13b-own": _soft_13b("soft-13b-own", "beside its own full depth", beside=JUDGED[40]),
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


def machine_named(name: str) -> Machine:
    """One of ``MACHINES``, or the one of a file: the last line of ``benchmarks.goodput`` is JSON.

    Raises:
        ValueError: it is neither.
    """
    if name in MACHINES:
        return MACHINES[name]
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        found = next(line for line in reversed(lines) if line.startswith("{"))
        return machine_of(json.loads(found)["results"]["machine"])
    except (OSError, StopIteration, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--machine {name!r} is none of {', '.join(sorted(MACHINES))}, and no file whose last "
            f"JSON line holds results.machine: {error!r}."
        ) from None


def document_of(machine: Machine) -> dict[str, Any]:
    """A machine as JSON has it; ``machine_of`` reads it."""
    schedules = [
        {**asdict(own), "schedule": [list(part) for part in own.schedule.parts]}
        for own in machine.schedules
    ]
    return {**asdict(machine), "schedules": schedules}


def machine_of(document: Mapping[str, Any]) -> Machine:
    """The machine that a document stands for."""
    values, score = dict(document), document["score"]
    values["exits"] = tuple(document["exits"])
    values["compute"] = _by_exit(document["compute"])
    values["score"] = None if score is None else _by_exit(score)
    values["small"], values["large"] = tuple(document["small"]), tuple(document["large"])
    values["curve"] = None if document["curve"] is None else _curve_of(document["curve"])
    values["schedules"] = tuple(
        ScheduleInfo(**{**own, "schedule": DepthSchedule(tuple(map(tuple, own["schedule"])))})
        for own in document["schedules"]
    )
    return Machine(**values)


def _curve_of(document: Mapping[str, Any]) -> StepCurve:
    start_small_s, start_large_s = document["start_s"]
    kv_small_s, kv_large_s = document["kv_s"]
    return StepCurve(
        start_s=(start_small_s, start_large_s),
        layer_s=tuple(document["layer_s"]),
        kv_s=(kv_small_s, kv_large_s),
        sampled_s=document["sampled_s"],
    )


def _by_exit(values: Mapping[str, float]) -> dict[int, float]:
    return {int(exit_layer): value for exit_layer, value in values.items()}
