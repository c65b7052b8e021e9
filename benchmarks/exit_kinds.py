r"""Every kind of exit module at the same exits: quality against compute and measured step time.

Over one frozen trunk a new module of each kind is trained at each exit, all on the same packs, the
same sampled columns and the same teacher, in one pass: the trunk is asked once for all of them.
Each starts as it does in ``sortserve train``, is clipped and stepped alone, and is then evaluated
on files that it was not trained on, the whole vocabulary counted. A checkpoint of each kind goes
through ``benchmarks.offline``: the median decode step stands beside what ``compute`` says.
The last line is one JSON document; ``--plot`` draws it.

    python -m benchmarks.exit_kinds --exits 18,24 --max-tokens 100000 \
        --data train.jsonl --eval-data dev.jsonl --eval-data valid.txt
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.lib.common import ROOT, environment, print_json, print_table
from benchmarks.lib.kinds_plot import draw_kinds
from sortserve.checkpoint.exit_table import exit_table
from sortserve.checkpoint.sorted_json import SortedInfo
from sortserve.model.exit_module import EXIT_MODULE_KINDS, NO_MODULE
from sortserve_trainer.data import Pack, collate
from sortserve_trainer.model.exit_module import ExitModule, PackedRow, take_rows
from sortserve_trainer.model.exit_modules import TRAINED_EXIT_MODULES, ExitModules
from sortserve_trainer.model.last_layer import last_layer_tensors
from sortserve_trainer.model.load import LoadedModel, load_for_training
from sortserve_trainer.model.loss import VocabSample, exit_losses
from sortserve_trainer.run.run_data import load_run_data
from sortserve_trainer.run.save import save_checkpoint
from sortserve_trainer.run.settings import TrainSettings
from sortserve_trainer.run.terms import ExitTerm
from sortserve_trainer.run.warm_start import seen_states

__all__ = ["main"]

KINDS = tuple(kind for kind in EXIT_MODULE_KINDS if kind != "head")
WARM_START_PACKS = 12
CLIP_NORM = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, evaluates, times and prints."""
    arguments = parse_arguments(argv)
    described = environment()
    settings = _settings(arguments)
    loaded = load_for_training(settings, settings.resolved)
    with tempfile.TemporaryDirectory() as folder:
        data = load_run_data(settings, loaded.tokenizer, loaded.config, Path(folder) / "data")
        contest = Contest(loaded, arguments)
        contest.warm_start(
            [data.mixture[i] for i in range(min(WARM_START_PACKS, len(data.mixture)))]
        )
        num_tokens = contest.train([data.mixture[i] for i in range(len(data.mixture))])
        losses = {name: contest.evaluate(packs) for name, packs in data.held_out.items()}
        times = {
            kind: contest.step_times(kind, Path(folder) / kind)
            for kind in (arguments.kinds if arguments.steps else ())
        }
    results = contest.results(losses, times)
    _print(results, [Path(name).parent.name or name for name in losses])
    if arguments.plot is not None:
        arguments.plot.write_bytes(draw_kinds(results, arguments.plot.suffix[1:]))
    print_json("exit_kinds", arguments, described, {"tokens": num_tokens, "exits": results})
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exit_kinds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=TrainSettings.model_fields["base"].default)
    parser.add_argument("--exits", default="18,24", help="below full depth")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--data", action="append", required=True, help="to train on")
    parser.add_argument("--eval-data", action="append", required=True, help="other files")
    parser.add_argument("--max-tokens", type=int, default=100_000)
    parser.add_argument("--eval-tokens", type=int, default=8192, help="of all files")
    parser.add_argument("--pack-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, help="default: the method's")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are timed")
    parser.add_argument("--rows", type=int, default=1, help="of a decode step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="a .png or .svg; needs --steps above 0")
    arguments = parser.parse_args(argv)
    if arguments.plot is not None and (
        arguments.steps == 0 or arguments.plot.suffix not in (".png", ".svg")
    ):
        parser.error("--plot takes a .png or .svg, and times of steps to draw")
    return arguments


def _settings(arguments: argparse.Namespace) -> TrainSettings:
    """Of a run of ``sortserve train`` that trains the modules alone."""
    return TrainSettings(
        base=arguments.model,
        data=tuple(arguments.data),
        eval_data=tuple(arguments.eval_data),
        output=Path("none"),
        exits=tuple(int(part) for part in arguments.exits.split(",")),
        exit_modules="norm",
        freeze_trunk=True,
        train_on_prompts=True,
        max_tokens=arguments.max_tokens,
        eval_tokens=arguments.eval_tokens,
        max_length=min(512, arguments.pack_length),
        pack_length=arguments.pack_length,
        learning_rate=arguments.learning_rate,
        dtype=arguments.dtype,
        device="cpu",
        seed=arguments.seed,
    )


class Contest:
    """A module of each kind at each exit, over one trunk."""

    def __init__(self, loaded: LoadedModel, arguments: argparse.Namespace) -> None:
        self._loaded, self._arguments = loaded, arguments
        self._method = _settings(arguments).resolved
        self._model = loaded.model.requires_grad_(False)
        self._exits, self._full = self._model.exits[:-1], self._model.exits[-1]
        norm_D = self._model.base.model.norm.weight.detach().float()
        self._modules: dict[tuple[str, int], ExitModule | None] = {}
        for kind in arguments.kinds:
            make = TRAINED_EXIT_MODULES.get(kind)
            for exit_layer in self._exits:
                module = None if make is None else make(kind, loaded.config, norm_D)
                self._modules[kind, exit_layer] = module

    def warm_start(self, packs: Sequence[Pack]) -> None:
        """As before the first step of a run."""
        with self._autocast():
            seen = seen_states(self._model, self._exits, map(_one, packs))
            last_layer = last_layer_tensors(self._model.base.model.layers[-1])
            for (_, exit_layer), module in self._modules.items():
                if module is not None and module.reads_states:
                    module.warm_start(seen[exit_layer], last_layer, is_new=True)

    def train(self, packs: Sequence[Pack]) -> int:
        """One step of every module on each pack; returns the tokens."""
        modules = [module for module in self._modules.values() if module is not None]
        optimizer = torch.optim.AdamW(
            [p for module in modules for p in module.parameters()],
            lr=self._method.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self._method.learning_rate,
            total_steps=len(packs),
            pct_start=0.05,
            cycle_momentum=False,
        )
        distill = self._method.distill
        term = ExitTerm(ce=1.0 - distill, kl=distill)
        names = [name for name, module in self._modules.items() if module is not None]
        for step, pack in enumerate(packs):
            sample = VocabSample.of(self._method.vocab_sample, self._arguments.seed + step)
            loss, _ = self._losses(pack, names, term, sample)
            torch.autograd.backward(loss)
            for module in modules:
                torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            print(
                f"step {step + 1} of {len(packs)}: {float(loss.detach()):.4f}",
                file=sys.stderr,
                flush=True,
            )
        return sum(pack.num_tokens for pack in packs)

    @torch.no_grad()
    def evaluate(self, packs: Sequence[Pack]) -> dict[tuple[str, int], float]:
        """Mean cross-entropy over all targets, the full depth's as that of no kind."""
        names = list(self._modules)
        totals = torch.zeros(len(names) + 1, dtype=torch.float64)
        count = 0
        for pack in packs:
            _, means = self._losses(pack, names, ExitTerm(ce=1.0), None)
            num_targets = _one(pack)["target_rows"].numel()
            totals += num_targets * torch.stack(list(means.values())).double()
            count += num_targets
        found = (totals / max(1, count)).tolist()
        return {**dict(zip(names, found[:-1], strict=True)), ("", self._full): found[-1]}

    def _losses(
        self,
        pack: Pack,
        names: Sequence[tuple[str, int]],
        term: ExitTerm,
        sample: VocabSample | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Of the named modules by their places, and of the full depth, the last, by its own."""
        batch = _one(pack)
        rows = batch["target_rows"]
        with self._autocast():
            with torch.no_grad():
                states = self._model.trunk_states(
                    batch["input_ids"],
                    batch["position_ids"],
                    tuple(batch["lengths"].tolist()),
                    self._model.exits,
                )
            read = {i: self._read(name, states, states.row, rows) for i, name in enumerate(names)}
            full = len(names)
            read[full] = self._model.base.model.norm(take_rows(states[self._full], rows))
            head = self._model.head(self._full)
            return exit_losses(
                read,
                dict.fromkeys(read, head),
                batch["labels"][0].index_select(0, rows),
                {**dict.fromkeys(range(full), term), full: ExitTerm(ce=1.0)},
                num_targets=rows.numel(),
                sample=sample,
            )

    def _read(
        self, name: tuple[str, int], states: Mapping[int, Tensor], row: PackedRow, rows: Tensor
    ) -> Tensor:
        module, x_TD = self._modules[name], states[name[1]]
        if module is None:
            return cast(Tensor, self._model.base.model.norm(take_rows(x_TD, rows)))
        return cast(Tensor, module(x_TD, row, rows))

    def step_times(self, kind: str, folder: Path) -> dict[int, float]:
        """Milliseconds of the median decode step at each exit, the full depth among them."""
        model = self._model
        model.exit_modules = ExitModules({}, self._loaded.config, model.base.model.norm.weight)
        for exit_layer in self._exits:
            if (module := self._modules[kind, exit_layer]) is not None:
                model.exit_modules[str(exit_layer)] = module
        save_checkpoint(self._loaded, folder, recipe={}, card="", dtype=torch.bfloat16)
        return _offline_step_ms(folder, model.exits, self._arguments)

    def results(
        self, losses: Mapping[str, Mapping[tuple[str, int], float]], times: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """One entry of each kind at each exit."""
        return [
            {
                "kind": kind,
                "exit_layer": exit_layer,
                "compute": self._compute(kind, exit_layer),
                "step_ms": times.get(kind, {}).get(exit_layer),
                "step_of_full": times.get(kind)
                and times[kind][exit_layer] / times[kind][self._full],
                "losses": {file: found[kind, exit_layer] for file, found in losses.items()},
                "above_full": {
                    file: found[kind, exit_layer] / found["", self._full] - 1.0
                    for file, found in losses.items()
                },
            }
            for kind, exit_layer in self._modules
        ]

    def _compute(self, kind: str, exit_layer: int) -> float:
        """With a module of this kind there alone."""
        info = SortedInfo(
            format_version=1,
            base=None,
            num_layers=self._full,
            exits=self._model.exits,
            recipe={},
            exit_modules={} if kind == NO_MODULE else {exit_layer: kind},
        )
        table = exit_table(self._loaded.config, info, self._model.exits)
        return table[exit_layer].compute

    def _autocast(self) -> torch.autocast:
        dtype = self._loaded.dtype
        return torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32)


def _share(times: Mapping[int, float], exit_layer: int, full: int) -> float | None:
    return times[exit_layer] / times[full] if times else None


def _one(pack: Pack) -> dict[str, Tensor]:
    return dict(collate([pack]))


def _offline_step_ms(
    checkpoint: Path, exits: Sequence[int], arguments: argparse.Namespace
) -> dict[int, float]:
    """By ``benchmarks.offline`` in a process of its own: of several engines in one process the
    later ones were up to 17 % slower, whatever their kind.
    """
    command = [sys.executable, "-m", "benchmarks.offline", "--model", str(checkpoint)]
    command += ["--exits", ",".join(map(str, exits)), "--rows", str(arguments.rows)]
    command += ["--steps", str(arguments.steps), "--dtype", arguments.dtype]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    decode = json.loads(done.stdout.splitlines()[-1])["results"]["decode"][str(arguments.rows)]
    return {e: decode[str(e)]["step_ms"] for e in exits}


def _print(results: Sequence[Mapping[str, Any]], files: Sequence[str]) -> None:
    def lines() -> Iterator[list[str]]:
        for entry in results:
            time_ms, share = entry["step_ms"], entry["step_of_full"]
            yield [
                entry["kind"],
                str(entry["exit_layer"]),
                f"{entry['compute']:.1%}",
                "-" if time_ms is None else f"{time_ms:.2f}",
                "-" if share is None else f"{share:.0%}",
                *(f"{loss:.3f}" for loss in entry["losses"].values()),
                *(f"+{above:.0%}" for above in entry["above_full"].values()),
            ]

    header = ["kind", "exit", "compute", "step ms", "of full"]
    print_table([*header, *files, *(f"{name}, above full" for name in files)], lines())


if __name__ == "__main__":
    sys.exit(main())
