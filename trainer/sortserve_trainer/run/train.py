"""``sortserve train``: one run, from its settings to a checkpoint.

A run lives in ``OUTPUT.run`` beside its target: what it was started with, states to resume from,
logs. When it is done, the checkpoint appears at ``OUTPUT`` in one step. Run the same command again
after any end but success, or after a limit (``--max-time``), and it goes on from the newest whole
state, to the same weights that it would have had undisturbed.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sortserve.core.errors import ConfigError
from sortserve.process.arguments import Parser
from sortserve.process.flags import add_flags
from sortserve_trainer.commands.console import Console
from sortserve_trainer.data import Mixture, collate
from sortserve_trainer.model.load import LoadedModel, load_for_training
from sortserve_trainer.run import hub
from sortserve_trainer.run.arguments import tensorboard_logs_in, training_arguments
from sortserve_trainer.run.cached_trunk import CachedTrunk
from sortserve_trainer.run.choice import Choice, metric_name
from sortserve_trainer.run.folder import Run, plain_settings
from sortserve_trainer.run.launcher import follow_launcher
from sortserve_trainer.run.limits import RunLimits
from sortserve_trainer.run.methods import Method
from sortserve_trainer.run.prepare import dry_run, prepare
from sortserve_trainer.run.progress import ProgressDisplay
from sortserve_trainer.run.recipe import card_text, command_line, versions
from sortserve_trainer.run.run_data import RunData, load_run_data
from sortserve_trainer.run.save import STOPPED_BY, disk_errors, save_checkpoint
from sortserve_trainer.run.settings import GROUPS, TrainSettings, load_train_settings
from sortserve_trainer.run.trainer import SortedTrainer, newest_state
from sortserve_trainer.run.warm_start import warm_start

__all__ = ["train", "train_command", "train_parser"]

WARM_START_PACKS = 12
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def train_parser() -> Parser:
    """The command line of ``sortserve train``."""
    parser = Parser(
        prog="sortserve train", description="Turn a pretrained model into a sorted one."
    )
    add_flags(parser, TrainSettings, GROUPS)
    return parser


def train_command(argv: Sequence[str]) -> int:
    """Parse the command line and train; returns the exit code."""
    settings = load_train_settings(vars(train_parser().parse_args(argv)))
    with warnings.catch_warnings():
        # Names that transformers and peft are about to change are not the user's concern.
        warnings.filterwarnings("ignore", category=FutureWarning)
        if settings.dry_run:
            print(dry_run(settings))
        elif settings.prepare_only:
            prepare(settings)
        else:
            train(settings, command=command_line(argv))
    return 0


def train(settings: TrainSettings, *, command: str = "") -> Path:
    """Train and write the checkpoint; returns its folder.

    Raises:
        ConfigError: settings, data or output are wrong; one line says which and why.
        CheckpointError: the base cannot be trained.
    """
    started_s = time.monotonic()
    follow_launcher(settings)
    limits = RunLimits(
        max_time_s=settings.max_time, max_steps=settings.max_steps_per_run, started_s=started_s
    )
    with Run.open(settings) as run:
        if settings.push_to_hub:
            hub.check_hub(hub.default_api())
        _seed_everything(settings.seed)
        method = settings.resolved
        loaded = load_for_training(settings, method)
        run.check_base(loaded.base_digest)
        data = load_run_data(settings, loaded.tokenizer, loaded.config, run.prepared)
        run.check_data(data.described, data.evaluated)
        trainer = _train_phase(settings, method, loaded, data, run, "states", limits)
        held_out = trainer.last_evaluation()
        steps = trainer.state.global_step
        if method.has_head_phase and limits.reached is None:
            _freeze_and_add_heads(loaded)
            heads = replace(method, trains_exits=True, protect=0.0, has_head_phase=False)
            trainer = _train_phase(settings, heads, loaded, data, run, "heads", limits)
            held_out = trainer.last_evaluation()
            steps += trainer.state.global_step
        loaded = _whole(trainer, loaded, settings, method)
        if trainer.is_world_process_zero():
            recipe = {
                "method": method.name,
                "command": command,
                "steps": steps,
                "tokens": _tokens_trained(trainer, data.mixture),
                "seed": settings.seed,
                "data": [_told(source) for source in data.described],
                "versions": versions(),
                "held_out_loss": _by_exit(held_out),
                "seconds_of_last_start": round(time.monotonic() - started_s, 1),
                "world_size": trainer.args.world_size,
                "settings": plain_settings(settings),
            }
            if data.evaluated:
                recipe["eval_data"] = [_told(source) for source in data.evaluated]
            if (best := trainer.best_step) is not None:
                recipe["best_step"] = best
            _save(loaded, settings, trainer, limits, recipe)
            if limits.reached is None:
                run.finish()
                _push(settings)
            else:
                _tell_unfinished(settings, trainer, limits.reached)
        trainer.accelerator.wait_for_everyone()
    return settings.output


def _save(
    loaded: LoadedModel,
    settings: TrainSettings,
    trainer: SortedTrainer,
    limits: RunLimits,
    recipe: dict[str, Any],
) -> None:
    if limits.reached is not None:
        recipe[STOPPED_BY] = limits.reached
        recipe["steps_planned"] = trainer.state.max_steps
    if loaded.sorted_info is not None:
        recipe["continued_from"] = loaded.sorted_info.recipe
    save_checkpoint(
        loaded,
        settings.output,
        recipe=recipe,
        card=card_text(settings, loaded.base, loaded.model.exits, recipe),
        dtype=_DTYPES[settings.save_dtype],
    )


def _push(settings: TrainSettings) -> None:
    if not settings.push_to_hub:
        return
    repo_id = hub.push_checkpoint(
        hub.default_api(),
        settings.output,
        model_id=settings.hub_model_id,
        private=settings.hub_private_repo,
    )
    text = f"{settings.output} is {repo_id} on the hub."
    Console(file=sys.stderr).print(text, soft_wrap=True, highlight=False)


def _told(source: Mapping[str, Any]) -> dict[str, Any]:
    """Of a source what a recipe tells: not where it lay."""
    return {name: value for name, value in source.items() if name != "reference"}


# One phase of training


def _train_phase(
    settings: TrainSettings,
    method: Method,
    loaded: LoadedModel,
    data: RunData,
    run: Run,
    name: str,
    limits: RunLimits,
) -> SortedTrainer:
    states = run.folder / name
    # What can be refused is, before the trunk's states are asked for, which may take hours.
    arguments = training_arguments(settings, method, loaded, data, states)
    choice = _choice(settings, loaded.model.exits, data)
    cache = _fill_trunk_cache(settings, method, loaded, data)
    with tensorboard_logs_in(run.folder / "tensorboard"):
        trainer = SortedTrainer(
            loaded.model,
            method,
            seed=settings.seed,
            mixture=data.mixture,
            held_out=data.held_out,
            args=arguments,
            callbacks=[ProgressDisplay(), limits],
            cache=cache,
            decays_all=run.decays_all,
            average=settings.average,
            choice=choice,
        )
    state = newest_state(states)
    loaded.model.train()
    if state is None:
        _warm_start(loaded, data.mixture)
    if cache is not None:
        loaded.model.forget_layers()
    if state is None and data.held_out:
        trainer.evaluate()
    run.begin(data.described, data.evaluated)
    with disk_errors(str(states)):
        trainer.go_on(state)
    return trainer


def _choice(settings: TrainSettings, exits: Sequence[int], data: RunData) -> Choice | None:
    metric = metric_name(settings.metric_for_best_model, exits)
    if not settings.chooses:
        return None
    if not data.held_out:
        raise ConfigError(
            "--load-best-model-at-end and --early-stopping-patience need something to evaluate, "
            "and one row is never held out: give more data, or --eval-data.",
            param="held-out",
        )
    return Choice(
        metric=metric,
        keeps_best=settings.load_best_model_at_end,
        patience=settings.early_stopping_patience,
        threshold=settings.early_stopping_threshold,
    )


def _fill_trunk_cache(
    settings: TrainSettings, method: Method, loaded: LoadedModel, data: RunData
) -> CachedTrunk | None:
    if settings.trunk_cache is None:
        return None
    cache = CachedTrunk(
        settings.trunk_cache,
        loaded,
        dtype=_DTYPES[settings.trunk_cache_dtype],
        keeps_likely=bool(method.vocab_sample),
    )
    mixture = data.mixture
    packs = itertools.chain(
        (mixture[i] for i in range(len(mixture))),
        (pack for packs in data.held_out.values() for pack in packs),
    )
    cache.fill(
        packs,
        max_bytes=int(settings.trunk_cache_gb * 1e9),
        writes=int(os.environ.get("RANK", "0")) == 0,
    )
    return cache


def _tokens_trained(trainer: SortedTrainer, mixture: Mixture) -> int:
    """Of the last phase; all of them where it was not stopped."""
    if trainer.state.global_step >= trainer.state.max_steps:
        return mixture.num_tokens
    args = trainer.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return sum(mixture[i].num_tokens for i in range(trainer.state.global_step * per_step))


def _tell_unfinished(settings: TrainSettings, trainer: SortedTrainer, reached: str) -> None:
    state = trainer.state
    Console(file=sys.stderr).print(
        f"stopped by {reached} after step {state.global_step} of {state.max_steps}: "
        f"{settings.output} is a checkpoint of it, and the same command goes on.",
        soft_wrap=True,
        highlight=False,
    )


def _warm_start(loaded: LoadedModel, mixture: Mixture) -> None:
    packs = (mixture[i] for i in range(min(WARM_START_PACKS, len(mixture))))
    batches: Iterable[Mapping[str, Tensor]] = (collate([pack]) for pack in packs)
    uses_autocast = loaded.dtype is not torch.float32
    with torch.autocast(loaded.device.type, dtype=loaded.dtype, enabled=uses_autocast):
        warm_start(loaded.model, loaded.new_modules, batches)


def _whole(
    trainer: SortedTrainer, loaded: LoadedModel, settings: TrainSettings, method: Method
) -> LoadedModel:
    """``loaded``, or a copy of what is not all in memory, in the process that saves.

    Under FSDP tensors are sharded; with a trunk cache an adapter that is saved again is gone.
    """
    if settings.trunk_cache is not None and trainer.is_world_process_zero():
        if not hasattr(loaded.model.trunk, "peft_config"):
            return loaded
        whole = load_for_training(settings, method)
        whole.model.exit_modules.load_state_dict(loaded.model.exit_modules.state_dict())
        return whole
    if not trainer.is_fsdp_enabled:
        return loaded
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes take part
    if not trainer.is_world_process_zero():
        return loaded
    whole = load_for_training(settings, method)
    whole.model.load_state_dict(state, strict=False)
    return whole


def _freeze_and_add_heads(loaded: LoadedModel) -> None:
    """The second phase of sft+ict: all frozen, and a copy of the head to train for every exit."""
    model = loaded.model
    model.requires_grad_(False)
    head_VD = model.head(model.exits[-1]).detach().float()
    norm_D = model.base.model.norm.weight.detach().float()
    for exit_layer in model.exits[:-1]:
        own = model.exit_modules.replace(exit_layer, "head", loaded.config, norm_D)
        own.start_from_head(head_VD)
        own.requires_grad_(False).to(head_VD.device)
        assert own.head is not None
        own.head.requires_grad_(True)


def _seed_everything(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _by_exit(metrics: Mapping[str, float]) -> dict[str, float]:
    prefix = "eval_loss_exit_"
    return {
        name.removeprefix(prefix): round(value, 5)
        for name, value in metrics.items()
        if name.startswith(prefix)
    }
