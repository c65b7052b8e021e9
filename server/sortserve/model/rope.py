"""Rotary frequencies, with the scalings the supported families use.

The scaled frequencies come from transformers' own functions, so that a checkpoint means here what
it means there; the plain ones are one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sortserve.errors import CheckpointError

__all__ = ["ROPE_TYPES", "check_rope", "rope_frequencies"]

ROPE_TYPES = ("default", "llama3", "linear", "yarn")
"""Scalings whose frequencies do not change with the length of the sequence."""


def check_rope(parameters: Mapping[str, Any], head_dim: int) -> None:
    """Refuse a rotary embedding the decoder cannot compute, by name.

    Args:
        parameters: ``rope_parameters`` of a transformers config.
        head_dim: width of one head; all of it is rotated.

    Raises:
        CheckpointError: another scaling, a partial or multimodal rotation, an odd ``head_dim``.
    """
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"RoPE scaling {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}."
        )
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


def rope_frequencies(hf_config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [H / 2] in fp32 on the CPU, and the factor on cos and sin.

    Args:
        hf_config: a transformers config that ``check_rope`` has accepted.
        head_dim: H.

    Raises:
        CheckpointError: a parameter that the scaling needs is missing or malformed.
    """
    parameters: Mapping[str, Any] = hf_config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    try:
        if rope_type == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            inv_freq, scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the RoPE scaling {rope_type!r} has a missing or bad parameter ({error!r}) "
            f"in rope_parameters={dict(parameters)}."
        ) from error
    assert inv_freq.shape == (head_dim // 2,)
    return inv_freq.float(), float(scaling)
