"""What a server holds in memory beyond what it must: its imports, the weights, and the KV in use.

Measured after the imports alone (those that loading needs among them), after the engine was put
together, and while requests of ever new prompts keep it busy. ``ratio`` is what the engine added
to the imports, over the weights plus the KV pages that live requests hold; the weights are counted
once, in the dtype they are served in. Resident figures are proportional ones (PSS of smaps), so
that shared libraries are not counted in full. The last line is one JSON document.

    python -m benchmarks.memory --seconds 30
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.common import environment, print_json, print_table
from benchmarks.lib.workload import PromptMaker
from sortserve.admission.choose import ExitChoice
from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.errors import ConfigError, SortserveError
from sortserve.core.request import Request
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.assemble import EngineOptions, EngineParts, assemble, start_threads
from sortserve.model.weight import Weight
from sortserve.model.weights import ModelWeights

__all__ = ["main", "weights_bytes"]

SMAPS = Path("/proc/self/smaps_rollup")
MIB = 2**20


def resident_bytes() -> int:
    """Memory of this process, its share of what it shares with others included (PSS)."""
    for line in SMAPS.read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{SMAPS} has no line Pss")


def weights_bytes(weights: ModelWeights) -> int:
    """Bytes of all tensors, those that are one counted once."""
    values: list[object] = [weights.embed, weights.lm_head, weights.final_norm, weights.inv_freq]
    for layer in weights.layers:
        values += vars(layer).values()
    for module in weights.exit_modules.values():
        values += [*module.tensors.values(), module.head]
        if module.layer is not None:
            values += vars(module.layer).values()
    parts = [*values]
    for value in values:
        if isinstance(value, Weight):
            parts += [value.values, value.scales]
    tensors = {part.data_ptr(): part for part in parts if isinstance(part, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


class Load:
    """As many requests at once as there is room for, each of a prompt that never came before."""

    def __init__(self, parts: EngineParts, vocab_size: int, arguments: argparse.Namespace) -> None:
        self._parts = parts
        self._arguments = arguments
        self._prompts = PromptMaker(random.Random(arguments.seed), vocab_size=vocab_size)
        self._ids = itertools.count()

    def run(self, seconds: float) -> dict[str, Any]:
        """Memory and pages, a sample each second."""
        engine, page_bytes = self._parts.engine, self._parts.cache.page_bytes
        samples: list[dict[str, float]] = []
        started_s = time.perf_counter()
        while (now_s := time.perf_counter() - started_s) < seconds:
            while len(list(engine.scheduler.sequences())) < self._arguments.num_clients:
                self._add()
            engine.step()
            if now_s >= len(samples):
                pool = engine.kv_cache.pool
                samples.append(
                    {
                        "resident_mib": round(resident_bytes() / MIB, 1),
                        "kv_in_use_mib": round(pool.num_used * page_bytes / MIB, 1),
                        "kv_cached_mib": round(pool.num_kept * page_bytes / MIB, 1),
                        "kv_touched_mib": round(pool.num_touched * page_bytes / MIB, 1),
                    }
                )
        return {"num_requests": next(self._ids), "samples": samples}

    def _add(self) -> None:
        engine, arguments = self._parts.engine, self._arguments
        request = Request(
            request_id=str(next(self._ids)),
            prompt_token_ids=tuple(self._prompts.make(arguments.prompt_tokens)),
            sampling=SamplingParams(
                temperature=0.0, max_tokens=arguments.output_tokens, ignore_eos=True
            ),
            arrival_s=engine.clock(),
        )
        engine.add_request(request, ExitChoice(arguments.exit, estimate=None, fits=True))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole story of one engine."""
    import peft  # noqa: F401 (merges the adapter)
    from transformers import LlamaForCausalLM  # noqa: F401 (the same)

    import sortserve.process.build  # noqa: F401 (what `sortserve serve` imports)

    start_threads(arguments.num_threads)
    torch.ones(512, 512) @ torch.ones(512, 512)  # threads and their stacks
    imports = resident_bytes()
    checkpoint = load_checkpoint(arguments.model, dtype=arguments.dtype, device="cpu")
    num_weights_bytes = weights_bytes(checkpoint.weights)
    arguments.exit = arguments.exit or checkpoint.exits.layers[-1]
    if arguments.exit not in checkpoint.exits.layers:
        raise ConfigError(
            f"--exit={arguments.exit} is none of {checkpoint.exits.layers}.", param="exit"
        )
    parts = assemble(
        checkpoint, EngineOptions(max_num_seqs=arguments.num_clients), release_weights=True
    )
    loaded = resident_bytes()
    load = Load(parts, checkpoint.config.vocab_size, arguments).run(arguments.seconds)
    last = load["samples"][-1]
    used = num_weights_bytes / MIB + last["kv_in_use_mib"]
    return {
        "imports_mib": round(imports / MIB, 1),
        "loaded_mib": round(loaded / MIB, 1),
        "weights_mib": round(num_weights_bytes / MIB, 1),
        "loaded_ratio": round((loaded - imports) / num_weights_bytes, 2),
        "ratio": round((last["resident_mib"] - imports / MIB) / used, 2),
        **load,
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="checkpoints/sorted-smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--exit", type=int, help="default: full depth")
    parser.add_argument("--num-clients", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; 2 if the checkpoint cannot be served, or this is not Linux."""
    arguments = parse_arguments(argv)
    described = environment()
    if not SMAPS.is_file():
        print(f"{SMAPS} is needed, which only Linux has.", file=sys.stderr)
        return 2
    try:
        results = measure(arguments)
    except SortserveError as error:
        print(error, file=sys.stderr)
        return 2
    figures = {key: value for key, value in results.items() if key != "samples"}
    print_table(["figure", "value"], figures.items())
    print()
    samples = results["samples"]
    print_table(["second", *samples[0]], ([i, *at.values()] for i, at in enumerate(samples)))
    print_json("memory", arguments, described, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
