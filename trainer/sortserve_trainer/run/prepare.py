"""What can be done before there is a GPU: the data of a run as tokens, and what it will need."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sortserve.checkpoint.adapter_config import read_adapter_config
from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.hf import load_hf_config, load_tokenizer
from sortserve.checkpoint.layout import CheckpointLayout
from sortserve.checkpoint.load import open_checkpoint
from sortserve_trainer.commands.console import Console
from sortserve_trainer.model.load import choose_exits, module_kinds
from sortserve_trainer.run.estimate import estimate, estimate_text
from sortserve_trainer.run.folder import Run
from sortserve_trainer.run.run_data import RunData, load_run_data
from sortserve_trainer.run.save import disk_errors
from sortserve_trainer.run.settings import TrainSettings

__all__ = ["dry_run", "prepare"]


def dry_run(settings: TrainSettings) -> str:
    """``--dry-run``: what the run would need, as text.

    Raises:
        CheckpointError: the base has no configuration, or is not supported.
        ConfigError: the exits do not fit it.
    """
    with open_checkpoint(settings.base, revision=settings.revision) as layout:
        config = read_model_config(load_hf_config(layout.model))
        exits = choose_exits(settings.exits, config.num_layers)
        settings = _with_own(settings, layout, exits)
    return estimate_text(estimate(settings, config, exits), exits)


def _with_own(
    settings: TrainSettings, layout: CheckpointLayout, exits: Sequence[int]
) -> TrainSettings:
    """The settings with what a base has of its own, where they leave it to the base."""
    method = settings.resolved
    kinds = module_kinds(layout, exits, method, settings.asked_kinds)
    text = ",".join(f"{e}={kind}" for e, kind in kinds.items())
    found: dict[str, object] = {"exit_modules": text or None}
    if layout.is_adapter and settings.lora_rank is None and method.lora_rank:
        found["lora_rank"] = read_adapter_config(layout.own)["r"]
    return settings.model_copy(update=found)


def prepare(settings: TrainSettings) -> RunData:
    """``--prepare-only``: tokenise what is not tokenised yet; says what a run would train on.

    Raises:
        ConfigError: settings, data or output are wrong; one line says which and why.
        CheckpointError: the base is bad or not supported.
    """
    with Run.open(settings) as run:
        with open_checkpoint(settings.base, revision=settings.revision) as layout:
            config = read_model_config(load_hf_config(layout.model))
            tokenizer = load_tokenizer(layout.model)
        with disk_errors(str(run.prepared)):
            data = load_run_data(settings, tokenizer, config, run.prepared, prepares=True)
        run.check_data(data.described, data.evaluated)
        run.begin(data.described, data.evaluated)
    packs_per_step = settings.batch_size * settings.gradient_accumulation
    Console(file=sys.stderr).print(
        f"{run.prepared}: {data.mixture.num_tokens:,} tokens to train on in {len(data.mixture):,} "
        f"packs, {len(data.mixture) // packs_per_step:,} steps on one device.",
        soft_wrap=True,
        highlight=False,
    )
    return data
