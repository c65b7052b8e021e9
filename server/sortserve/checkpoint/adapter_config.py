"""``adapter_config.json``: which adapters can be merged, decided before any weights are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from sortserve.checkpoint.files import read_json
from sortserve.checkpoint.patterns import Pattern, check_patterns
from sortserve.core.errors import CheckpointError
from sortserve.model.config_fields import check_integer, check_number

__all__ = [
    "ADAPTER_CONFIG",
    "check_adapter_config",
    "quieten_bitsandbytes",
    "read_adapter_config",
]

ADAPTER_CONFIG = "adapter_config.json"
MAX_RANK = 1 << 16
ALL_LINEAR = "all-linear"

_NAMES = ("target_modules", "exclude_modules", "layers_pattern")
_SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")
_HANDLED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
    *("modules_to_save", "layers_to_transform"),
    *_NAMES,
    *_SWITCHES,
)
_WITHOUT_EFFECT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"),
    *("runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
"""Of the training, or of kinds that another field switches on."""
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal")
"""Ways to initialise LoRA that leave the base's weights as they are."""


def read_adapter_config(folder: Path) -> Mapping[str, Any]:
    """The contents of ``adapter_config.json``.

    Raises:
        CheckpointError: it is malformed, names no base, or is not a LoRA that can be merged; the
            field is named.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(f"{path}: PEFT type {peft_type!r} is not supported; supported: LORA.")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{path} has no base_model_name_or_path.")
    try:
        _check_kind(config)
        _check_values(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from error
    return config


def check_adapter_config(folder: Path, module_names: list[str]) -> None:
    """Refuse an adapter that cannot be merged, or whose expressions take too long to match.

    Args:
        folder: holds ``adapter_config.json``.
        module_names: of the base's modules, all of them.

    Raises:
        CheckpointError: as ``read_adapter_config``, or for an expression.
    """
    config = read_adapter_config(folder)
    try:
        check_patterns(_patterns(config), module_names)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {error.message}") from error


def _check_kind(config: Mapping[str, Any]) -> None:
    """Refuse every field that asks for what is not merged here, known to peft or not."""
    others = {
        name: value
        for name, value in config.items()
        if value and name not in _HANDLED and name not in _WITHOUT_EFFECT
    }
    defaults = _peft_defaults() if others else {}  # few adapters have any: peft takes seconds
    for name, value in others.items():
        if value != defaults.get(name):
            raise CheckpointError(f"{name}={value!r} is not supported.")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise CheckpointError(
            f"init_lora_weights={init!r} is not supported: it changes the base's weights. Save "
            "the adapter converted to plain LoRA."
        )


def quieten_bitsandbytes() -> None:
    """Before peft is imported, which imports it if it is there: it tells of kernels it lacks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _peft_defaults() -> dict[str, Any]:
    quieten_bitsandbytes()
    from peft import LoraConfig

    return {
        field.name: field.default if field.default is not MISSING else None
        for field in fields(LoraConfig)
    }


def _check_values(config: Mapping[str, Any]) -> None:
    """Types and ranges of the fields that are understood."""
    check_integer(config.get("r", 8), "r", 1, MAX_RANK)
    check_number(config.get("lora_alpha", 8), "lora_alpha", -1e6, 1e6)
    for name, rank in _object(config, "rank_pattern").items():
        check_integer(rank, f"rank_pattern.{name}", 1, MAX_RANK)
    for name, alpha in _object(config, "alpha_pattern").items():
        check_number(alpha, f"alpha_pattern.{name}", -1e6, 1e6)
    for name in _SWITCHES:
        if not isinstance(config.get(name, False), bool | None):
            raise CheckpointError(f"{name}={config[name]!r} is not true or false.")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(f"bias={config['bias']!r} is not one of none, all, lora_only.")
    for name in _NAMES:
        value = config.get(name)
        if value is not None and not isinstance(value, str) and not _are_all(value, str):
            raise CheckpointError(f"{name}={value!r} is not a string or a list of strings.")
    if not _are_all(config.get("modules_to_save") or [], str):
        raise CheckpointError(
            f"modules_to_save={config['modules_to_save']!r} is not a list of strings."
        )
    layers = config.get("layers_to_transform")
    if layers is not None and not _are_all(layers if isinstance(layers, list) else [layers], int):
        raise CheckpointError(f"layers_to_transform={layers!r} is not a layer or a list of them.")


def _patterns(config: Mapping[str, Any]) -> list[Pattern]:
    """Every string that peft takes for an expression, in the form in which it matches it."""
    found: list[Pattern] = []
    for name in ("target_modules", "exclude_modules"):
        value = config.get(name)
        if isinstance(value, str) and value.lower() != ALL_LINEAR:
            found.append(Pattern(name, value, value))
            found.append(Pattern(name, value, rf"(?:{value})\Z"))  # what fullmatch does
    layers = config.get("layers_pattern") or []
    for value in [layers] if isinstance(layers, str) else layers:
        found.append(Pattern("layers_pattern", value, rf"(?:^|.*?\.){value}\.(?P<idx>\d+)\."))
    for name in ("rank_pattern", "alpha_pattern"):
        found += [Pattern(name, key, rf"(.*\.)?({key})$") for key in _object(config, name)]
    for value in config.get("modules_to_save") or []:
        found.append(Pattern("modules_to_save", value, rf"(^|.*\.){value}($|\..*)"))
    return found


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    if not isinstance(value, Mapping | None):
        raise CheckpointError(f"{name}={value!r} is not an object.")
    return value or {}


def _are_all(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )
