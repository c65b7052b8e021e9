"""A run's settings as transformers' Trainer takes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sortserve.core.errors import ConfigError
from sortserve_trainer.model.load import LoadedModel
from sortserve_trainer.run.launcher import on_one_gpu
from sortserve_trainer.run.methods import Method
from sortserve_trainer.run.run_data import RunData
from sortserve_trainer.run.settings import TrainSettings

__all__ = ["tensorboard_logs_in", "training_arguments"]


def training_arguments(
    settings: TrainSettings,
    method: Method,
    loaded: LoadedModel,
    data: RunData,
    states: Path,
) -> Any:
    """What transformers' Trainer is told.

    Raises:
        ConfigError: there is less data than one step takes, or a tracker is not here.
    """
    from transformers import TrainingArguments

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    num_packs = len(data.mixture)
    packs_per_step = settings.batch_size * settings.gradient_accumulation * world_size
    max_steps = num_packs // packs_per_step
    if max_steps == 0:
        raise ConfigError(
            f"--data: there are {num_packs} packs of --pack-length {settings.pack_length}, less "
            f"than the {packs_per_step} of one step: give more data or smaller batches.",
            param="data",
        )
    trackers = [t for t in settings.report_to if t != "none"]
    arguments = TrainingArguments(
        output_dir=str(states),
        max_steps=max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=method.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=int(settings.warmup * max_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta2=0.99,
        optim="adamw_torch_fused",
        bf16=loaded.dtype is torch.bfloat16,
        use_cpu=loaded.device.type == "cpu",
        accelerator_config={"non_blocking": loaded.device.type == "cuda"},
        gradient_checkpointing=settings.gradient_checkpointing,
        ddp_find_unused_parameters=_leaves_out(method, loaded),
        eval_strategy="steps" if data.held_out else "no",
        eval_steps=settings.eval_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        report_to=_known_trackers(trackers),
        disable_tqdm=True,
        log_level="error",
        seed=settings.seed,
        data_seed=settings.seed,
    )
    return on_one_gpu(arguments)


def _leaves_out(method: Method, loaded: LoadedModel) -> bool:
    """Whether some step has no gradient for some exit module."""
    has_modules = bool(loaded.model.exit_modules.by_exit)
    return has_modules and (method.exits_per_step is not None or not method.trains_exits)


@contextmanager
def tensorboard_logs_in(folder: Path) -> Iterator[None]:
    """Where transformers' tracker writes that is made within, unless the user has said.

    The environment is the one way to tell it; a second run of this process must not find it set.
    """
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]


def _known_trackers(names: Sequence[str]) -> list[str]:
    """Refuse a tracker that is not installed, but let the default one go without a word.

    Raises:
        ConfigError: a tracker that was asked for cannot be used.
    """
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    if list(names) == ["tensorboard"] and "tensorboard" not in available:
        return []
    for name in names:
        if name not in available:
            raise ConfigError(
                f"--report-to {name!r} is not possible here; installed: "
                f"{', '.join(available) or 'none'}.",
                param="report-to",
            )
    return list(names) or ["none"]
