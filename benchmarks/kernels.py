"""Linear layers, attention and whole steps by backend, each beside what the machine allows.

    python -m benchmarks.kernels [--isa all] [--steps-only] [--threads N] [--dtype bfloat16]

``--isa`` measures one instance of the CPU kernels, ``all`` every one that this machine can run,
one after another. The model is random and shaped like SmolLM2-135M: nothing is loaded. Every time
is the median of several runs in which the backends take turns, so that a busy moment of the machine
hits all alike; linear layers go through copies of their weights, so that none waits in a cache. The
floor is that of ``--dtype``, beside int8 too: the larger of bytes / memory rate and FLOPs / matrix
rate, both measured in this run (``floors``). Beside linear layers stand the first alone, and
torch's fp32 GEMM of the same product. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.common import environment, print_json, print_table
from benchmarks.lib.floors import Machine, ModelCost, Work, measure_machine
from benchmarks.lib.random_model import (
    CONFIG,
    LINEARS,
    generator,
    make_rope,
    random,
    random_weights,
)
from sortserve.core.errors import ConfigError
from sortserve.core.slabs import Slabs
from sortserve.model.attention import Attention, KVCache
from sortserve.model.backend import Backend
from sortserve.model.backends import BACKENDS, choose_backend
from sortserve.model.backends.kernels import ISA_VARIABLE, ISAS, cpu_isa
from sortserve.model.batch import Batch
from sortserve.model.decoder import Decoder
from sortserve.model.quantization import quantize_int8
from sortserve.model.weight import LinearOp, Weight
from sortserve.model.weights import ModelWeights

NUM_TOKENS = (1, 4, 8, 16, 32, 128, 1024)
ROTATED_BYTES = 128 << 20
"""Of weights that a linear layer goes through: above the last-level caches we run on."""
BLOCK_SIZE = 16
ATTENTION_SHAPES = ((1, 200), (8, 200), (32, 200), (32, 1000), (1, 4000))
"""(rows, cached tokens)"""
DECODE_ROWS = (1, 8, 32)
DECODE_CONTEXT = 200
PREFILL_TOKENS = (128, 512, 1500)

Row = dict[str, float | str | None]


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    described = environment()
    with torch.inference_mode():
        machine = measure_machine(torch.device("cpu"), dtype)
        rates = {
            "threads": torch.get_num_threads(),
            "memory_gb_per_s": round(machine.bytes_per_s / 1e9, 1),
            "matrix_gflops_per_s": round(machine.gemm_flops_per_s / 1e9, 1),
        }
        print(f"machine: {rates}\n")
        results: dict[str, Any] = {"machine": rates}
        for isa in isas(arguments.isa):
            os.environ[ISA_VARIABLE] = isa
            print(f"instruction set: {cpu_isa()}\n")
            results[isa or "auto"] = measure(dtype, machine, steps_only=arguments.steps_only)
    print_json("kernels", arguments, described, results)


def isas(chosen: str) -> list[str]:
    """Values of the variable that forces an instruction set; empty: the server's own choice."""
    if chosen != "all":
        return [chosen]
    return [name for name, isa in ISAS.items() if isa.can_run()]


def measure(dtype: torch.dtype, machine: Machine, *, steps_only: bool) -> dict[str, list[Row]]:
    results = {}
    if not steps_only:
        results["linear"] = show("linear (us)", bench_linears(dtype, machine))
        results["attention"] = show("attention, 1 layer (us)", bench_attention(dtype, machine))
    results["steps"] = show("steps, 30 layers (ms)", bench_steps(dtype, machine))
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kernel times beside their floors.")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--isa", choices=("all", *ISAS), default="", help="of the CPU kernels; or all of them"
    )
    parser.add_argument("--steps-only", action="store_true", help="whole steps alone")
    return parser.parse_args()


def show(title: str, rows: list[Row]) -> list[Row]:
    print(title)
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    print()
    return rows


def medians_s(
    runs: Mapping[str, Callable[[], object]], *, budget_s: float = 0.6
) -> dict[str, float]:
    """Median time of each run, in turns, for about ``budget_s`` seconds each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + budget_s * len(runs)
    while time.perf_counter() < until or len(times[next(iter(runs))]) < 5:
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def row_of(name: str, times_s: Mapping[str, float], floor_s: float, unit: float) -> Row:
    """Times by backend, the floor, and how near the fastest comes to it."""
    best = min(times_s.values())
    return {
        "shape": name,
        **{backend: round(seconds * unit, 1) for backend, seconds in times_s.items()},
        "floor": round(floor_s * unit, 1),
        "% of floor": round(100 * floor_s / best, 1),
    }


# ---- linear layers


def bench_linears(dtype: torch.dtype, machine: Machine) -> list[Row]:
    rows = []
    for name, (num_outputs, num_inputs) in LINEARS.items():
        copies = max(2, ROTATED_BYTES // (num_outputs * num_inputs * dtype.itemsize))
        weights = [random(num_outputs, num_inputs).to(dtype) for _ in range(copies)]
        ops = linear_ops(weights)
        for num_tokens in NUM_TOKENS:
            if name == "head" and num_tokens > max(DECODE_ROWS):
                continue  # only rows that sample pass the head
            x = random(num_tokens, num_inputs).to(dtype)
            runs = {backend: rotate(each, x) for backend, each in ops.items()}
            work = Work(
                num_bytes=num_outputs * num_inputs * dtype.itemsize,
                num_flops=2 * num_outputs * num_inputs * num_tokens,
            )
            memory_us = machine.memory_floor_s(work) * 1e6
            x_fp32, weight_fp32 = x.float(), weights[0].float()
            runs["gemm fp32"] = partial(torch.nn.functional.linear, x_fp32, weight_fp32)
            times = medians_s(runs, budget_s=0.2)
            gemm_s = times.pop("gemm fp32")
            rows.append(
                row_of(f"{name} x {num_tokens}", times, machine.floor_s(work), 1e6)
                | {"memory": round(memory_us, 1), "gemm fp32": round(gemm_s * 1e6, 1)}
            )
    return rows


def linear_ops(weights: Sequence[Tensor]) -> dict[str, list[LinearOp]]:
    """The same weights packed by every backend that works here, and by the kernels in int8."""
    ops: dict[str, list[LinearOp]] = {}
    for name, backend in backends(weights[0].dtype).items():
        ops[name] = [backend.linear(Weight.plain(weight)) for weight in weights]
        if name == "cpu":
            ops["cpu int8"] = [backend.linear(quantize_int8(weight)) for weight in weights]
    return ops


def backends(dtype: torch.dtype) -> dict[str, Backend]:
    """Those that work here, but for a reference that would take minutes.

    Where oneDNN has no products in bf16 (any CPU with AVX2 at most), torch has a plain loop.
    """
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    found = {}
    for name in BACKENDS:
        if name == "reference" and dtype == torch.bfloat16 and not has_bf16:
            continue
        with suppress(ConfigError):
            found[name] = choose_backend(CONFIG, dtype, torch.device("cpu"), name)
    return found


def rotate(ops: Sequence[LinearOp], x: Tensor) -> Callable[[], object]:
    following: Iterator[LinearOp] = itertools.cycle(ops)
    return lambda: next(following)(x)


# ---- attention


def bench_attention(dtype: torch.dtype, machine: Machine) -> list[Row]:
    attentions: dict[str, Attention] = {
        name: backend.attention(make_rope()) for name, backend in backends(dtype).items()
    }
    rows = []
    for num_rows, context_len in ATTENTION_SHAPES:
        num_pages = num_rows * math.ceil(context_len / BLOCK_SIZE)
        # Other layers' pages go through the caches between two uses of a layer's own.
        copies = max(2, ROTATED_BYTES // (num_pages * page_bytes(dtype)))
        cache = KVCache.allocate(CONFIG, Slabs(copies), num_pages, BLOCK_SIZE, dtype, "cpu")
        cache.pages.normal_()
        batch = make_batch(num_rows, 1, context_len, num_slabs=1)
        qkv = random(num_rows, CONFIG.q_size + 2 * CONFIG.kv_size).to(dtype)
        runs = {n: attention_run(a, batch, qkv, cache) for n, a in attentions.items()}
        work = Work(
            num_bytes=num_rows * context_len * 2 * CONFIG.kv_size * dtype.itemsize,
            num_flops=num_rows * context_len * 4 * CONFIG.q_size,
        )
        name = f"{num_rows} rows x {context_len}"
        rows.append(row_of(name, medians_s(runs), machine.floor_s(work), 1e6))
    return rows


def attention_run(
    attention: Attention, batch: Batch, qkv: Tensor, cache: KVCache
) -> Callable[[], object]:
    (attend,) = attention.prepare(batch, range(1), batch.num_rows)
    layers = itertools.cycle(range(cache.slabs.size))
    return lambda: attend(qkv, None, cache.pages[next(layers)])


def page_bytes(dtype: torch.dtype) -> int:
    return KVCache.page_bytes(CONFIG, 1, BLOCK_SIZE, dtype)


# ---- whole steps


def bench_steps(dtype: torch.dtype, machine: Machine) -> list[Row]:
    weights = random_weights(dtype)

    def make_decoder(weights: ModelWeights, backend: Backend) -> Decoder:
        return Decoder(CONFIG, weights, exits=(9, 15, 21, 30), max_model_len=2048, backend=backend)

    available = backends(dtype)
    decoders = {name: make_decoder(weights, backend) for name, backend in available.items()}
    if "cpu" in available:
        in_int8 = random_weights(dtype, quantize_int8)
        decoders["cpu int8"] = make_decoder(in_int8, available["cpu"])
    num_slabs = next(iter(decoders.values())).num_slabs
    num_pages = max(DECODE_ROWS) * num_slabs * math.ceil(max(PREFILL_TOKENS) / BLOCK_SIZE)
    cache = next(iter(decoders.values())).allocate_kv_cache(num_pages, BLOCK_SIZE)
    cost = ModelCost(CONFIG, weights)
    rows = []
    for num_rows in DECODE_ROWS:
        batch = make_batch(num_rows, 1, DECODE_CONTEXT, num_slabs)
        work = cost.decode(30, num_rows=num_rows, context_len=DECODE_CONTEXT)
        name = f"{num_rows} rows x {DECODE_CONTEXT}"
        rows.append(step_row(name, decoders, batch, cache, machine.floor_s(work)))
    for num_tokens in PREFILL_TOKENS:
        batch = make_batch(1, num_tokens, num_tokens, num_slabs)
        floor_s = machine.floor_s(cost.prefill(30, num_tokens=num_tokens))
        rows.append(step_row(f"prefill {num_tokens}", decoders, batch, cache, floor_s))
    return rows


def step_row(
    name: str, decoders: Mapping[str, Decoder], batch: Batch, cache: KVCache, floor_s: float
) -> Row:
    def run(decoder: Decoder) -> Callable[[], object]:
        return lambda: decoder.logits(decoder.forward(batch, cache))

    runs = {label: run(decoder) for label, decoder in decoders.items()}
    return row_of(name, medians_s(runs, budget_s=1.5), floor_s, 1e3)


def make_batch(num_rows: int, num_tokens: int, context_len: int, num_slabs: int) -> Batch:
    """Rows of equal length at full depth, their pages scattered over the pool."""
    num_blocks = math.ceil(context_len / BLOCK_SIZE)
    pages = torch.randperm(num_slabs * num_rows * num_blocks, generator=generator())
    tables = pages.view(num_slabs, num_rows, num_blocks).int()
    positions = torch.arange(context_len - num_tokens, context_len).repeat(num_rows)
    row_T = torch.arange(num_rows).repeat_interleave(num_tokens)
    slots = tables[:, row_T, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    starts = [row * num_tokens for row in range(num_rows + 1)]
    return Batch(
        token_ids_T=positions % CONFIG.vocab_size,
        positions_T=positions,
        query_starts=tuple(starts),
        context_lens=(context_len,) * num_rows,
        exit_layers=(CONFIG.num_layers,) * num_rows,
        samples=(True,) * num_rows,
        query_starts_R1=torch.tensor(starts, dtype=torch.int32),
        context_lens_R=torch.full((num_rows,), context_len, dtype=torch.int32),
        block_tables_SRB=tables,
        slots_ST=slots,
        num_prompt_tokens=(num_tokens if num_tokens > 1 else 0,) * num_rows,
    )


if __name__ == "__main__":
    main()
