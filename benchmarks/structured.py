"""What a grammar costs: constrained and free rows in the same steps, on a checkpoint.

    python -m benchmarks.structured --model sorted-smollm2-135m --rows 32

Steps of rows held to a schema alternate with steps of free rows, so that a machine that is busy
slows both. Every row of a step has its own place in the document. A step is the model and its
sampling, and then what the engine's thread does with the tokens: each held row's matcher takes its
token and looks up what is forced after it. Forced tokens still come one by one, so each step draws
one token a row. Prints the milliseconds of both, the overhead and its parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.grammar import Constraint, Grammar, OutputFormat
from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken, SamplingParams, SamplingRow
from sortserve.engine.assemble import EngineOptions, EngineParts, assemble
from sortserve.engine.sampling.bitmask import apply_bitmasks, make_masks, words_of
from sortserve.engine.sampling.vocab_ops import block_maxima

T = TypeVar("T")
PROMPT_TOKENS = 64
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "role": {"enum": ["admin", "user", "guest"]},
    },
    "required": ["name", "age", "city", "tags", "role"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="sorted-smollm2-135m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--schema", type=Path, help="a file with another schema")
    options = parser.parse_args()
    parts = assemble(load_checkpoint(options.model, dtype=options.dtype), EngineOptions())
    schema = json.loads(options.schema.read_text()) if options.schema else SCHEMA
    started_s = time.perf_counter()
    grammar = parts.tokenizer.grammars.compile(OutputFormat("json", json.dumps(schema)))
    print(f"tokenizer read and schema compiled in {1e3 * (time.perf_counter() - started_s):.0f} ms")
    report(parts, grammar, options.rows, options.steps)


def report(parts: EngineParts, grammar: Grammar, num_rows: int, num_steps: int) -> None:
    rows = {kind: make_rows(kind, grammar, num_rows) for kind in ("free", "held")}
    plans = {kind: make_plans(parts, rows[kind]) for kind in rows}
    times: dict[str, list[float]] = {kind: [] for kind in rows}
    accepts: dict[str, list[float]] = {kind: [] for kind in rows}
    works: dict[str, list[float]] = {kind: [] for kind in rows}
    for step in range(num_steps + 3):
        for kind in ("free", "held"):
            plan, cpu_started_s = plans[kind](), time.process_time()
            seconds, results = timed(partial(parts.runner.execute, plan))
            accept_s = advance(rows[kind], results, grammar)
            if step >= 3:
                works[kind].append(time.process_time() - cpu_started_s)
                times[kind].append(seconds + accept_s)
                accepts[kind].append(accept_s)
    free, held = (1e3 * statistics.median(times[kind]) for kind in ("free", "held"))
    ratios = [h / f for f, h in zip(times["free"], times["held"], strict=True)]
    print(f"{num_rows} rows, {num_steps} steps, {parts.num_threads} threads")
    print(f"a step of free rows      {free:8.2f} ms")
    print(f"a step of held rows      {held:8.2f} ms")
    print(f"overhead (median ratio)  {100 * (statistics.median(ratios) - 1):8.2f} %")
    free_cpu, held_cpu = (1e3 * statistics.median(works[kind]) for kind in ("free", "held"))
    print(
        f"processor time of both   {free_cpu:8.2f} and {held_cpu:.2f} ms, "
        f"{100 * (held_cpu / free_cpu - 1):.2f} % more; neighbours do not add to it"
    )
    accept_ms = 1e3 * statistics.median(accepts["held"])
    print(
        f"accepting their tokens   {accept_ms:8.2f} ms ({1e3 * accept_ms / num_rows:.0f} us a row, "
        f"{100 * accept_ms / free:.2f} % of a free step), on the engine's thread"
    )
    vocab_size = parts.tokenizer.vocab_size
    mask_s = statistics.median(
        cpu_s(lambda: make_masks(rows["held"], vocab_size)) for _ in range(num_steps)
    )
    every = dict(enumerate(rows["held"]))
    words = words_of(every, make_masks(rows["held"], vocab_size))
    logits_RV = torch.randn(num_rows, vocab_size)
    fast = parts.decoder.backend.sampling
    maxima_RK = block_maxima(logits_RV)
    apply = partial(apply_bitmasks, logits_RV, words)
    if fast is not None:
        apply = partial(fast.apply_bitmasks, logits_RV, maxima_RK, words)
    apply_s = statistics.median(cpu_s(apply) for _ in range(num_steps))
    print(
        f"masks alone              {1e3 * mask_s:8.2f} ms ({1e6 * mask_s / num_rows:.0f} us a row)"
    )
    print(f"their application alone  {1e3 * apply_s:8.2f} ms")


def make_rows(kind: str, grammar: Grammar, num_rows: int) -> list[SamplingRow]:
    return [
        SamplingRow(
            SamplingParams(max_tokens=10_000, temperature=1.0),
            r,
            tuple(range(100, 100 + PROMPT_TOKENS)),
            [],
            frozenset(),
            Constraint(grammar.start(), one_by_one=True) if kind == "held" else None,
        )
        for r in range(num_rows)
    ]


def make_plans(parts: EngineParts, rows: list[SamplingRow]) -> Callable[[], StepPlan]:
    """Each call gives the next decode step: always at the same place of the same few pages."""
    slabs, pages = parts.decoder.num_slabs, parts.runner.num_pages
    num_blocks = -(-(PROMPT_TOKENS + 1) // parts.runner.block_size)
    tables = np.arange(slabs * num_blocks * len(rows), dtype=np.int32) % pages
    tables_RSB = tables.reshape(len(rows), slabs, num_blocks)

    def plan() -> StepPlan:
        depth = parts.decoder.exits[-1]
        return StepPlan(
            rows=tuple(
                RowPlan(
                    request_id=str(r),
                    exit_layer=depth,
                    start=PROMPT_TOKENS,
                    token_ids=(row.output_token_ids[-1] if row.output_token_ids else 100,),
                    block_table_SB=tables_RSB[r],
                    sampling=row,
                    prompt_len=PROMPT_TOKENS,
                )
                for r, row in enumerate(rows)
            ),
            depth_cap=depth,
        )

    return plan


def advance(
    rows: list[SamplingRow], results: list[SampledToken | RowFailure], grammar: Grammar
) -> float:
    """Let each row take its token; one whose document is whole begins another.

    Returns:
        Seconds that the matchers took for it. Beginning a document is of admission, not of a step.
    """
    accept_s = 0.0
    for r, (row, result) in enumerate(zip(rows, results, strict=True)):
        assert isinstance(result, SampledToken), result
        constraint = row.constraint
        if constraint is not None:
            accept_s += timed(partial(constraint.accept, result.token_id))[0]
            if constraint.is_complete:
                new = Constraint(grammar.start(), one_by_one=True)
                rows[r] = SamplingRow(
                    row.params, row.seed, row.prompt_token_ids, [], row.stop_token_ids, new
                )
                continue
        row.output_token_ids.append(result.token_id)  # type: ignore[attr-defined]
    return accept_s


def cpu_s(work: Callable[[], object]) -> float:
    """Seconds of this thread, which no neighbour's work adds to."""
    started_s = time.thread_time()
    work()
    return time.thread_time() - started_s


def timed(work: Callable[[], T]) -> tuple[float, T]:
    started_s = time.perf_counter()
    result = work()
    return time.perf_counter() - started_s, result


if __name__ == "__main__":
    main()
