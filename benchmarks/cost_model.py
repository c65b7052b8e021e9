"""How well is the time of a step predicted? Random mixes of depth, batch, context and prefill.

The cost model is calibrated as at start-up (every time anew here). Then random steps run that no
calibration has seen: up to `--max-rows` decoding rows of random exits and contexts, and in two
steps of five a chunk of a prompt beside them. Each is predicted before it runs, by the calibration
alone (`static`) and by the model that learns from the steps before (`online`). The promise: a
median error of at most 10 %, a 95th percentile of at most 30 %. Needs a quiet machine. The last
line is one JSON document.

    python -m benchmarks.cost_model --steps 300 --plot errors.svg
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.common import environment, percentile, print_json, print_table
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import SamplingParams, SamplingRow
from sortserve.cost.calibration import calibrate
from sortserve.cost.learner import CostLearner
from sortserve.cost.model import CostModel, step_shape
from sortserve.engine.runner import ModelRunner
from sortserve.model.decoder import Decoder
from sortserve.process.config import ServeSettings
from sortserve.process.plot import Series, line_chart

__all__ = ["main", "random_plan"]

BLOCK_SIZE = 16
MAX_CONTEXT = 1024
PREFILL_SHARE = 0.4
MAX_CHUNK = 512


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=ServeSettings.model_fields["model"].default)
    parser.add_argument("--exits", default="9,15,21,30", help="to open; empty: the checkpoint's")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--max-rows", type=int, default=48)
    parser.add_argument("--plot", type=Path, help="draw predicted over measured as an SVG")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def random_plan(
    rng: random.Random, exits: Sequence[int], *, slab_size: int, vocab_size: int, max_rows: int
) -> StepPlan:
    """A step of random rows, each with pages of its own."""
    shapes = [
        (rng.choice(exits), rng.randint(1, MAX_CONTEXT - 1), 1)
        for _ in range(rng.randint(0, max_rows))
    ]
    if not shapes or rng.random() < PREFILL_SHARE:
        start = rng.choice((0, 0, 256))
        shapes.append((rng.choice(exits), start, rng.randint(16, MAX_CHUNK)))
    shapes.sort(reverse=True)
    rows, first_page = [], 0
    for exit_layer, start, num_tokens in shapes:
        num_slabs, num_blocks = exit_layer // slab_size, -(-(start + num_tokens) // BLOCK_SIZE)
        pages = first_page + np.arange(num_slabs * num_blocks, dtype=np.int32)
        first_page += num_slabs * num_blocks
        rows.append(_row(rng, exit_layer, start, num_tokens, vocab_size, pages, num_slabs))
    return StepPlan(rows=tuple(rows), depth_cap=shapes[0][0])


def _row(
    rng: random.Random,
    exit_layer: int,
    start: int,
    num_tokens: int,
    vocab_size: int,
    pages: np.ndarray,
    num_slabs: int,
) -> RowPlan:
    return RowPlan(
        request_id="benchmark",
        exit_layer=exit_layer,
        start=start,
        token_ids=[rng.randrange(vocab_size) for _ in range(num_tokens)],
        block_table_SB=pages.reshape(num_slabs, -1),
        sampling=SamplingRow(
            params=SamplingParams(temperature=0.0),
            seed=0,
            prompt_token_ids=(),
            output_token_ids=(),
            stop_token_ids=frozenset(),
        ),
    )


def _runner(checkpoint: LoadedCheckpoint, max_rows: int) -> ModelRunner:
    decoder = Decoder(
        checkpoint.config,
        checkpoint.weights,
        exits=checkpoint.exits.layers,
        max_model_len=2 * MAX_CONTEXT,
    )
    blocks = max_rows * (MAX_CONTEXT // BLOCK_SIZE) + 2 * MAX_CHUNK // BLOCK_SIZE
    return ModelRunner(decoder, num_pages=blocks * decoder.num_slabs, block_size=BLOCK_SIZE)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, then predict and time random steps."""
    exits = tuple(int(e) for e in arguments.exits.split(",") if e) or None
    checkpoint = load_checkpoint(
        arguments.model, exits=exits, dtype=arguments.dtype, device=arguments.device
    )
    runner = _runner(checkpoint, arguments.max_rows)
    layers, vocab_size = checkpoint.exits.layers, checkpoint.config.vocab_size
    started_s = time.perf_counter()
    samples = calibrate(
        runner,
        exits=layers,
        vocab_size=vocab_size,
        max_model_len=MAX_CONTEXT,
        max_num_batched_tokens=1024,
        max_num_seqs=arguments.max_rows,
        clock=time.perf_counter,
    )
    calibration_s = time.perf_counter() - started_s
    learner, static = CostLearner(samples), CostModel.fit(samples)
    rng, steps = random.Random(arguments.seed), []
    for _ in range(arguments.steps):
        plan = random_plan(
            rng,
            layers,
            slab_size=runner.slabs.size,
            vocab_size=vocab_size,
            max_rows=arguments.max_rows,
        )
        shape = step_shape(plan)
        predicted = {"static": static.step_s(shape), "online": learner.model.step_s(shape)}
        started_s = time.perf_counter()
        runner.execute(plan)
        seconds = time.perf_counter() - started_s
        learner.observe(shape, seconds)
        steps.append((seconds, predicted, shape.num_tokens))
    return {
        "calibration_s": round(calibration_s, 2),
        "safety": round(learner.model.safety, 3),
        "errors": {
            name: _errors([(seconds, p[name]) for seconds, p, _ in steps])
            for name in ("static", "online")
        },
        "points": [
            [round(1e3 * seconds, 3), round(1e3 * p["online"], 3)] for seconds, p, _ in steps
        ],
    }


def _errors(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Relative errors of (measured, predicted), and the mean of predicted over measured."""
    errors = [abs(predicted / seconds - 1.0) for seconds, predicted in pairs]
    ratios = [predicted / seconds for seconds, predicted in pairs]
    return {
        "p50": round(percentile(errors, 0.5), 4),
        "p95": round(percentile(errors, 0.95), 4),
        "max": round(max(errors), 4),
        "mean_ratio": round(sum(ratios) / len(ratios), 4),
    }


def draw(points: Sequence[Sequence[float]]) -> bytes:
    """Predicted over measured as an SVG, with the line on which they agree."""
    highest = max(max(point) for point in points)
    agree = Series("equal", [(0.0, 0.0), (highest, highest)], colour=1)
    dots = Series("steps", [(p[0], p[1]) for p in points], dots=True, colour=0)
    return line_chart(
        "Predicted and measured time of a step", "measured ms", "predicted ms", [agree, dots]
    )


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the errors, draws them."""
    arguments = parse_arguments(argv)
    described = environment()
    results = measure(arguments)
    errors: Mapping[str, Mapping[str, float]] = results["errors"]
    print(f"calibration: {results['calibration_s']} s; safety factor: {results['safety']}")
    rows = (
        [name, *(f"{100 * e:.1f}" for e in list(of.values())[:3])] for name, of in errors.items()
    )
    print_table(["model", "median error %", "95th %", "worst %"], rows)
    if arguments.plot is not None:
        arguments.plot.write_bytes(draw(results["points"]))
        print(f"plot: {arguments.plot}")
    print_json("cost_model", arguments, described, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
