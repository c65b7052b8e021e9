"""``sortserve train --prepare-only``: the data of a run as tokens, before there is a GPU."""

from __future__ import annotations

import sys

from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.hf import load_hf_config, load_tokenizer
from sortserve.checkpoint.load import open_checkpoint
from sortserve_trainer.commands.console import Console
from sortserve_trainer.run.folder import Run
from sortserve_trainer.run.run_data import RunData, load_run_data
from sortserve_trainer.run.save import disk_errors
from sortserve_trainer.run.settings import TrainSettings

__all__ = ["prepare"]


def prepare(settings: TrainSettings) -> RunData:
    """Tokenise what is not tokenised yet; says what a run would train on.

    Raises:
        ConfigError: settings, data or output are wrong; one line says which and why.
        CheckpointError: the base is bad or not supported.
    """
    run = Run.open(settings)
    with open_checkpoint(settings.base, revision=settings.revision) as layout:
        config = read_model_config(load_hf_config(layout.model))
        tokenizer = load_tokenizer(layout.model)
    with disk_errors(str(run.prepared)):
        data = load_run_data(settings, tokenizer, config, run.prepared, prepares=True)
    packs_per_step = settings.batch_size * settings.gradient_accumulation
    Console(file=sys.stderr).print(
        f"{run.prepared}: {data.mixture.num_tokens:,} tokens to train on in {len(data.mixture):,} "
        f"packs, {len(data.mixture) // packs_per_step:,} steps on one device.",
        soft_wrap=True,
        highlight=False,
    )
    return data
