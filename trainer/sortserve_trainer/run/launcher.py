"""What ``accelerate launch`` asks of a process, which it tells in the environment.

All of it is known before anything is loaded: which process this is, which GPU is its own, and
whether weights are shared out.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from sortserve.core.errors import ConfigError
from sortserve_trainer.run.settings import TrainSettings

__all__ = ["follow_launcher", "on_one_gpu"]

logger = logging.getLogger(__name__)

_HOW_TO_SHARD = "launch with --use_fsdp --fsdp_version 2 to share weights out (docs/training.md)."


def follow_launcher(settings: TrainSettings) -> None:
    """Be the process that was launched, or refuse to.

    Raises:
        ConfigError: weights are to be shared out in a way that is not supported, or with flags that
            need them whole.
    """
    if _asks_for("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(f"DeepSpeed is not supported: {_HOW_TO_SHARD}")
    if _asks_for("ACCELERATE_USE_FSDP"):
        _check_fsdp(settings)
        # Each process loads the base. accelerate would send out anew what the first has, and on
        # the way untie the head from the embedding, and fail at modules that are not sharded.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and settings.device != "cpu" and torch.cuda.is_available():
        # Else the bases of all processes are loaded onto the first GPU.
        torch.cuda.set_device(int(rank) % torch.cuda.device_count())


def on_one_gpu(arguments: Any) -> Any:
    """``TrainingArguments`` that leave the other GPUs of a process alone.

    A process that was not launched as one of several would have transformers cut each batch up
    among all GPUs that it sees, by its first dimension (``DataParallel``): packs do not bear that.
    """
    if arguments.n_gpu > 1:
        logger.warning(
            "One of %d GPUs is used: accelerate launch --num_processes %d -m sortserve train ... "
            "uses all.",
            arguments.n_gpu,
            arguments.n_gpu,
        )
        arguments._n_gpu = 1
    return arguments


def _check_fsdp(settings: TrainSettings) -> None:
    """Refuse what needs whole weights, and the first FSDP, which is accelerate's default."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(f"FSDP 1 is not supported: {_HOW_TO_SHARD}")
    asked = {
        "average": settings.average > 0,
        "load-best-model-at-end": settings.load_best_model_at_end,
        "early-stopping-patience": settings.early_stopping_patience is not None,
        "trunk-cache": settings.trunk_cache is not None,
        f"method {settings.method}": settings.resolved.has_head_phase,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    if names:
        raise ConfigError(
            f"--{' and --'.join(names)} cannot be used with FSDP, whose weights are in pieces: "
            f"leave {'it' if len(names) == 1 else 'them'} out, or launch without FSDP (DDP).",
            param=names[0].partition(" ")[0],
        )


def _asks_for(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
