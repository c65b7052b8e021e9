"""The fields of ``config.json`` that decide what is computed, looked at before transformers is.

transformers checks types, but neither sizes nor the ranges of numbers: a thousand million layers
make a list of that length, a negative epsilon makes NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sortserve.core.errors import CheckpointError

__all__ = ["check_fields", "check_integer", "check_number"]

_SIZES = {
    "num_hidden_layers": 1_024,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 24,
    "original_max_position_embeddings": 1 << 24,
    "sliding_window": 1 << 31,
    "total_ut_steps": 64,
}
"""The largest values that are taken for meant; the smallest is 1."""
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window")
_LABELS = ("num_labels", "id2label", "label2id")
"""Of classifiers; transformers makes a table as long as they say."""
MAX_LABELS = 4_096
_CHANGES = {
    "per_layer_config": (None,),
    "transformers_weights": (None, "model.safetensors"),
    "is_causal": (None, True),
}
"""Fields with which transformers computes something else, and the values with which it does not."""


def check_fields(config: Mapping[str, Any]) -> None:
    """Check the contents of ``config.json``; a field that is missing has transformers' default.

    Raises:
        CheckpointError: a field has a type or value that cannot be served; it is named.
    """
    for name, largest in _SIZES.items():
        if name in config and not (name in _NULLABLE and config[name] is None):
            check_integer(config[name], name, 1, largest)
    if "rms_norm_eps" in config:
        check_number(config["rms_norm_eps"], "rms_norm_eps", 0.0, 1.0)
    for name, allowed in _CHANGES.items():
        value = config.get(name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise CheckpointError(f"{name}={value!r} is not supported.")
    for name in _LABELS:
        if name in config and not _is_short(config[name]):
            raise CheckpointError(f"{name} may name at most {MAX_LABELS} labels.")
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name), Mapping | None):
            raise CheckpointError(f"{name}={config[name]!r} is not an object.")


def check_integer(value: object, name: str, smallest: int, largest: int) -> int:
    """``value`` if it is an integer from ``smallest`` to ``largest``.

    Raises:
        CheckpointError: it is not; ``name`` is the field to blame.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value <= largest:
        raise CheckpointError(f"{name}={value!r} is not an integer from {smallest} to {largest}.")
    return value


def check_number(value: object, name: str, smallest: float, largest: float) -> float:
    """``value`` if it is a number from ``smallest`` to ``largest``.

    Raises:
        CheckpointError: it is not; ``name`` is the field to blame.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not smallest <= value <= largest:  # type: ignore[operator]
        raise CheckpointError(f"{name}={value!r} is not a number from {smallest:g} to {largest:g}.")
    return float(value)  # type: ignore[arg-type]


def _is_short(value: object) -> bool:
    if value is None:
        return True
    if isinstance(value, Mapping):
        return len(value) <= MAX_LABELS
    return isinstance(value, int) and value <= MAX_LABELS
