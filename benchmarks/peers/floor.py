"""The machine's own limits, and what they allow a server of these weights under this load at best.

    python -m benchmarks.peers.floor --isa native     # measures, prints one JSON line

It runs as a process of its own, because an instruction set is forced by variables that torch reads
once. Weights alone are counted: no attention, no KV cache, no activations. The ceiling is what no
server can pass that reads each weight once a step and multiplies at the rate of torch's matrix
product. Kernels for integers may pass it where torch has no fast product of integers.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ceiling", "ModelSize", "Rates", "ceiling", "model_size"]


@dataclass(frozen=True)
class ModelSize:
    """Weights of the layers' matrices and of the head; a step reads each once."""

    num_trunk: int
    num_head: int


@dataclass(frozen=True)
class Rates:
    """What the machine does at best."""

    bytes_per_s: float
    flops_per_s: Mapping[int, float]
    """By the bits of the weights."""


@dataclass(frozen=True)
class Ceiling:
    """What the limits allow for one number of clients."""

    step_memory_ms: float
    """To read all weights once."""
    step_compute_ms: float
    """To multiply one token of each client with them."""
    tokens_per_s: float
    """Output tokens of the whole load: prompts are read, too."""


def model_size(folder: Path) -> ModelSize:
    """Counts the matrices of a Hugging Face folder from its header; nothing is loaded.

    Raises:
        OSError: there is no model.
    """
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    sizes = {
        name: entry["shape"][0] * entry["shape"][1]
        for name, entry in header.items()
        if name != "__metadata__" and len(entry["shape"]) == 2
    }
    embedding = sizes.pop("model.embed_tokens.weight")
    head = sizes.pop("lm_head.weight", embedding)  # tied: one matrix, read as the head
    return ModelSize(sum(sizes.values()), head)


def ceiling(
    rates: Rates,
    size: ModelSize,
    *,
    bits_per_weight: float,
    bits: int,
    num_clients: int,
    prompt_tokens: int,
    output_tokens: int,
) -> Ceiling:
    """The best that a closed loop of ``num_clients`` can come to.

    A client's answer is one prompt and ``output_tokens - 1`` steps, whose time all clients share.
    """
    flops_per_s = rates.flops_per_s[bits]
    num_weights = size.num_trunk + size.num_head
    memory_s = num_weights * bits_per_weight / 8 / rates.bytes_per_s
    compute_s = 2 * num_weights * num_clients / flops_per_s
    prompt_s = 2 * (size.num_trunk * prompt_tokens + size.num_head) / flops_per_s
    round_s = num_clients * prompt_s + (output_tokens - 1) * max(memory_s, compute_s)
    return Ceiling(
        step_memory_ms=round(memory_s * 1e3, 2),
        step_compute_ms=round(compute_s * 1e3, 2),
        tokens_per_s=round(num_clients * output_tokens / round_s, 1),
    )


def read_rates(text: str) -> Rates:
    """What this program printed."""
    document = json.loads(text.splitlines()[-1])
    flops = {int(bits): rate for bits, rate in document["flops_per_s"].items()}
    return Rates(document["bytes_per_s"], flops)


def _measure(isa: str) -> dict[str, Any]:
    """Memory, and matrix products by bits: bf16 where the processor has it, else fp32."""
    import torch

    from benchmarks.lib.common import environment
    from benchmarks.lib.floors import GEMM_SIZE, best_s, measure_machine

    flags = environment()["cpu_flags"] if isa == "native" else []
    has_bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    machine = measure_machine(torch.device("cpu"), torch.bfloat16 if has_bf16 else torch.float32)
    flops = {16: machine.gemm_flops_per_s, 8: machine.gemm_flops_per_s}
    if "avx512_vnni" in flags:
        size = GEMM_SIZE["cpu"]
        a = torch.randint(-100, 100, (size, size), dtype=torch.int8)
        product_s = best_s(lambda: torch._int_mm(a, a), torch.device("cpu"))
        flops[8] = max(flops[8], 2 * size**3 / product_s)
    return {
        "bytes_per_s": machine.bytes_per_s,
        "flops_per_s": flops | {4: flops[8]},
        "matrix_product": "bf16" if has_bf16 else "fp32",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", default="native")
    print(json.dumps(_measure(parser.parse_args().isa)))
