"""Rotary frequencies, with the scalings the supported families use.

The scaled frequencies come from transformers' own functions, so that a checkpoint means here what
it means there; the plain ones are one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sortserve.core.errors import CheckpointError
from sortserve.model.config_fields import check_integer, check_number

__all__ = ["ROPE_TYPES", "check_raw_rope", "check_rope", "context_length", "rope_frequencies"]

ROPE_TYPES = ("default", "llama3", "linear", "yarn")
"""Scalings whose frequencies do not change with the length of the sequence."""

_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("original_max_position_embeddings",),
}
_RANGES = {
    "factor": (1.0, 65_536.0),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "attention_factor": (0.0, 1e6),
    "beta_fast": (0.0, 1e6),
    "beta_slow": (0.0, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
}
_MAX_POSITIONS = 1 << 24


def check_rope(parameters: Mapping[str, Any], head_dim: int) -> None:
    """Refuse a rotary embedding the decoder cannot compute, by name.

    Args:
        parameters: ``rope_parameters`` of a transformers config.
        head_dim: width of one head; all of it is rotated.

    Raises:
        CheckpointError: another scaling, a partial or multimodal rotation, an odd ``head_dim``, or
            a parameter that is missing or out of range; it is named.
    """
    if "rope_type" not in parameters:
        raise CheckpointError("rope_parameters by layer type are not supported.")
    rope_type = parameters["rope_type"]
    _check_type(rope_type)
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError(
            f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported: "
            "every dimension of a head must be rotated."
        )
    if parameters.get("mrope_section") is not None:
        raise CheckpointError("multimodal RoPE (mrope_section) is not supported.")
    if head_dim % 2:
        raise CheckpointError(
            f"head_dim={head_dim} is odd; RoPE rotates pairs, so head_dim must be even."
        )
    _check_parameters(parameters, rope_type)


def check_raw_rope(config: Mapping[str, Any]) -> None:
    """Check what ``config.json`` says of RoPE, in the newer spelling or the older.

    transformers computes with these values as it reads them, before it has looked at their types.

    Raises:
        CheckpointError: another scaling, or a parameter that is null or out of range.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    _check_type(rope_type)
    _check_parameters({"rope_theta": config.get("rope_theta", 1.0), **parameters}, rope_type)


def _check_type(rope_type: object) -> None:
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"RoPE scaling {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}."
        )


def _check_parameters(parameters: Mapping[str, Any], rope_type: str) -> None:
    """Ranges of what is there; what is missing may be transformers' to fill in, null is not."""
    check_number(parameters.get("rope_theta"), "rope_theta", 1e-6, 1e15)
    if rope_type == "default":
        return
    for name in _REQUIRED[rope_type]:
        if parameters.get(name, name) is None:
            raise CheckpointError(f"the RoPE scaling {rope_type!r} has no {name}.")
    for name, (smallest, largest) in _RANGES.items():
        if parameters.get(name) is not None:
            check_number(parameters[name], name, smallest, largest)
    original = parameters.get("original_max_position_embeddings")
    if original is not None:
        check_integer(original, "original_max_position_embeddings", 1, _MAX_POSITIONS)
    low, high = parameters.get("low_freq_factor", 0), parameters.get("high_freq_factor", math.inf)
    if rope_type == "llama3" and not low < high:
        raise CheckpointError(f"high_freq_factor={high} must be above low_freq_factor={low}.")


def context_length(hf_config: Any) -> int:
    """The longest sequence that the rotary embedding is made for, in tokens.

    ``max_position_embeddings`` is what the model was trained for before YaRN or linear scaling
    stretches it by ``factor``; of llama3 it is the stretched length. (vLLM reads it so too.)

    Args:
        hf_config: a transformers config that ``check_rope`` has accepted.

    Raises:
        CheckpointError: it is more than any model has.
    """
    parameters: Mapping[str, Any] = hf_config.rope_parameters
    length: int = hf_config.max_position_embeddings
    original = parameters.get("original_max_position_embeddings") or length
    factor = parameters.get("factor")
    if parameters["rope_type"] in ("linear", "yarn") and factor is not None:
        length = int(original * factor)
    if length > _MAX_POSITIONS:
        raise CheckpointError(
            f"rope_parameters: factor={factor} times {original} tokens is a context of {length}; "
            f"at most {_MAX_POSITIONS} are supported."
        )
    return length


def rope_frequencies(hf_config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [H / 2] in fp32 on the CPU, and the factor on cos and sin.

    Args:
        hf_config: a transformers config that ``check_rope`` has accepted.
        head_dim: H.

    Raises:
        CheckpointError: a parameter that the scaling needs is missing or malformed.
    """
    parameters: Mapping[str, Any] = hf_config.rope_parameters
    rope_type = parameters["rope_type"]
    try:
        if rope_type == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            inv_freq, scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the RoPE scaling {rope_type!r} has a missing or bad parameter ({error!r}) "
            f"in rope_parameters={dict(parameters)}."
        ) from error
    assert inv_freq.shape == (head_dim // 2,)
    if not (inv_freq.isfinite().all() and math.isfinite(scaling)):
        raise CheckpointError(
            f"the RoPE scaling {rope_type!r} gives frequencies that are no numbers "
            f"with rope_parameters={dict(parameters)}."
        )
    return inv_freq.float(), float(scaling)
