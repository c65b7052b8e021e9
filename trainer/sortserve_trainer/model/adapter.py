"""The LoRA adapter over a trunk: a new one, the base's own, or the base's own with a smaller rank.

Shape legend: I in, O out, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sortserve.checkpoint.adapter import ADAPTER_WEIGHTS
from sortserve.checkpoint.hf import quiet
from sortserve.core.errors import ConfigError
from sortserve_trainer.model.load_settings import ModelSettings
from sortserve_trainer.model.lora import merge_in_forward

__all__ = ["continue_adapter", "new_adapter", "shrink_pair"]

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, in every supported family."""

A, B = ".lora_A.weight", ".lora_B.weight"


def new_adapter(trunk: Any, settings: ModelSettings, rank: int) -> Any:
    """The peft model of ``trunk`` with an adapter that adds nothing yet.

    Raises:
        ConfigError: the rank or the layers named do not fit the trunk.
    """
    from peft import LoraConfig, get_peft_model

    widest = max(trunk.config.hidden_size, trunk.config.intermediate_size)
    if rank > widest:
        raise ConfigError(
            f"--lora-rank {rank} is more than the widest layer has rows ({widest}): "
            "choose a smaller one, or 0 to train all weights.",
            param="lora-rank",
        )
    targets = list(settings.lora_targets or BLOCK_LINEARS)
    _check_targets(targets, trunk, settings)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=settings.lora_alpha or rank,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
    )
    torch.manual_seed(settings.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _prepare(get_peft_model(trunk, config))
    except ValueError as error:
        raise ConfigError(f"--lora-targets: {error}", param="lora-targets") from error


def _check_targets(targets: Sequence[str], trunk: Any, settings: ModelSettings) -> None:
    """Refuse layers that there are not, of which peft tells only where it finds none of all, and
    those whose adapter could not be served.
    """
    names = [f".{name}" for name, _ in trunk.named_modules()]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"--lora-targets: {settings.base} has no layer {target!r}; a block has "
                f"{', '.join(BLOCK_LINEARS)}.",
                param="lora-targets",
            )
        if target in ("lm_head", "embed_tokens") and trunk.config.tie_word_embeddings:
            raise ConfigError(
                f"--lora-targets: head and embedding of {settings.base} are one tensor, into which "
                f"an adapter of {target} cannot be merged: leave it out.",
                param="lora-targets",
            )


def continue_adapter(trunk: Any, folder: Path, settings: ModelSettings) -> Any:
    """The peft model of ``trunk`` with the adapter in ``folder``, or a trunk with it merged.

    A smaller ``lora_rank`` than the adapter's asks for the nearest adapter of that rank.

    Raises:
        ConfigError: ``lora_rank`` is another one that the adapter cannot have, or another flag is
            not what the adapter was made with.
    """
    from peft import PeftConfig, PeftModel

    if settings.trains_weights:
        with quiet():
            merged: Any = PeftModel.from_pretrained(trunk, str(folder)).merge_and_unload()
        return merged.requires_grad_(True)  # peft froze them; they are saved as weights
    with quiet():
        config: Any = PeftConfig.from_pretrained(str(folder))
    if settings.trains_adapter:
        _check_flags(config, folder, settings)
    rank = settings.lora_rank
    if rank is not None and rank != config.r:
        _check_rank(rank, config, folder, settings)
        return _prepare(_shrunk(trunk, config, load_file(folder / ADAPTER_WEIGHTS), rank))
    with quiet():
        model = PeftModel.from_pretrained(trunk, str(folder), is_trainable=settings.trains_adapter)
    return _prepare(model)


def _check_flags(config: Any, folder: Path, settings: ModelSettings) -> None:
    """Refuse what would be left out of account: an adapter goes on as it was made."""
    targets = config.target_modules
    own = {
        "lora-alpha": (settings.lora_alpha, config.lora_alpha),
        "lora-targets": (
            set(settings.lora_targets),
            {targets} if isinstance(targets, str) else set(targets or ()),
        ),
        "lora-dropout": (settings.lora_dropout, config.lora_dropout),
    }
    for flag, (asked, made) in own.items():
        if asked and asked != made:
            told = ",".join(sorted(made)) if isinstance(made, set) else f"{made:g}"
            raise ConfigError(
                f"--{flag} does not fit {folder}, whose adapter was made with {told} and goes on "
                "so: leave the flag out.",
                param=flag,
            )


def _check_rank(rank: int, config: Any, folder: Path, settings: ModelSettings) -> None:
    if rank > config.r:
        reason = "and goes on: leave the flag out, or name a smaller one"
    elif not settings.trains_adapter:
        reason = "and stays what it is with --freeze-trunk: leave the flag out"
    elif config.rank_pattern or config.alpha_pattern or config.use_dora or config.bias != "none":
        reason = "and is not plain LoRA of one rank, so it cannot be made smaller"
    else:
        return
    raise ConfigError(
        f"--lora-rank {rank} does not fit {folder}, whose adapter has rank {config.r} {reason}.",
        param="lora-rank",
    )


def _shrunk(trunk: Any, config: Any, state: dict[str, Tensor], rank: int) -> Any:
    """The peft model of ``trunk`` with the nearest adapter of that rank, to be trained."""
    from peft import get_peft_model, set_peft_model_state_dict

    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    config.r, config.lora_alpha = rank, scale * rank
    config.use_rslora, config.inference_mode = False, False
    small = dict(state)
    for name in [name.removesuffix(A) for name in state if name.endswith(A)]:
        small[name + A], small[name + B] = shrink_pair(state[name + A], state[name + B], rank)
    with quiet():
        model = get_peft_model(trunk, config)
        set_peft_model_state_dict(model, small)
    return model


def shrink_pair(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The A and B of ``rank`` whose product is nearest to ``b @ a`` (Eckart and Young, 1936).

    The square root of each singular value goes into either, so that Adam's equal steps on both
    are of one size.

    Args:
        a: [R, I].
        b: [O, R].
        rank: at most R.

    Returns:
        [rank, I] and [O, rank], in float32.
    """
    # The product has rank R at most, so its SVD is that of a small matrix between two orthogonal.
    left, b_part = torch.linalg.qr(b.double())
    right, a_part = torch.linalg.qr(a.double().T)
    u, values, vt = torch.linalg.svd(b_part @ a_part.T, full_matrices=False)
    kept = min(rank, len(values))  # fewer, where the weight itself has no such rank
    root = values[:kept].sqrt()
    new_a, new_b = torch.zeros(rank, a.shape[1]), torch.zeros(b.shape[0], rank)
    new_a[:kept] = root[:, None] * (vt[:kept] @ right.T)
    new_b[:, :kept] = left @ u[:, :kept] * root
    return new_a, new_b


def _prepare(model: Any) -> Any:
    """Plain layers compute merged; in the others autocast chooses the dtype, where peft would
    widen every activation to float32 first.
    """
    merge_in_forward(model)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return model
