"""``--quantize``: weights that are made smaller while they are read, each matrix on its own.

A quantiser makes a ``Weight`` of a plain matrix. It sees the matrices of the decoder layers, fused
as the decoder wants them, those of exits that are layers of their own included, and the heads. The
embedding (a row of it is read for each token, never all), norms, biases and exit modules of other
kinds stay in the model's dtype.

A new one takes a row in ``QUANTIZERS``.

Shape legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sortserve.core.errors import ConfigError
from sortserve.model.bnb import (
    quantize_eight_bit,
    quantize_four_bit,
    restore_eight_bit,
    restore_four_bit,
)
from sortserve.model.quantization import quantize_int8, restore_int8
from sortserve.model.weight import Weight

__all__ = ["NO_QUANTIZER", "QUANTIZERS", "Quantizer", "check_not_quantised", "find_quantizer"]

NO_QUANTIZER = "none"
"""What leaves weights as they are."""


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """One way to make weights smaller at load."""

    make: Callable[[Tensor], Weight]
    """From a matrix [O, I], on the device and in the dtype it would be served in. The matrix is
    dropped afterwards, so the result must not be a view of it. What becomes of an output must not
    depend on the outputs beside it: which matrices are fused is the decoder's affair."""
    restore: Callable[[Tensor, Tensor | None, tuple[int, int]], Weight] | None = None
    """What ``make`` gave, from its values, scales and shape [O, I]. With it the weights are kept
    between starts; without it they are made at every start."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Types of the devices that its products can be computed on."""
    library: str | None = None
    """A module that must be installed."""
    extra: str | None = None
    """The extra of sortserve that installs it."""


QUANTIZERS: dict[str, Quantizer] = {
    "int8": Quantizer(make=quantize_int8, restore=restore_int8),
    "nf4": Quantizer(
        make=quantize_four_bit,
        restore=restore_four_bit,
        library="bitsandbytes",
        extra="quant",
    ),
    "int8-bnb": Quantizer(
        make=quantize_eight_bit,
        restore=restore_eight_bit,
        library="bitsandbytes",
        extra="quant",
    ),
}
"""By what ``--quantize`` calls them."""


def find_quantizer(name: str, device: torch.device) -> Callable[[Tensor], Weight]:
    """What makes the weights that ``--quantize`` asks for; ``Weight.plain`` for NO_QUANTIZER.

    Args:
        name: NO_QUANTIZER or one of QUANTIZERS.
        device: where the weights go.

    Raises:
        ConfigError: there is none of that name, it does not work on the device, or a library is
            missing.
    """
    if name == NO_QUANTIZER:
        return Weight.plain
    quantizer = QUANTIZERS.get(name)
    if quantizer is None:
        raise _refusal(name, f" is not one of {', '.join((NO_QUANTIZER, *QUANTIZERS))}.")
    if device.type not in quantizer.devices:
        works = [other for other in QUANTIZERS if device.type in QUANTIZERS[other].devices]
        raise _refusal(
            name,
            f" does not work on {device.type}, only on {', '.join(quantizer.devices)}; "
            f"on {device.type} there are: {', '.join((NO_QUANTIZER, *works))}.",
        )
    if quantizer.library is not None and find_spec(quantizer.library) is None:
        raise _refusal(
            name,
            f" needs {quantizer.library}, which is not installed: "
            f"pip install 'sortserve[{quantizer.extra}]'",
        )
    return quantizer.make


def check_not_quantised(name: str, hf_config: Any, checkpoint: str) -> None:
    """Refuse to quantise twice.

    Args:
        name: of the quantiser.
        hf_config: transformers' config of the checkpoint.
        checkpoint: its name.

    Raises:
        ConfigError: the checkpoint's weights are quantised as they are stored.
    """
    if name != NO_QUANTIZER and getattr(hf_config, "quantization_config", None) is not None:
        raise _refusal(name, f": {checkpoint} is quantised already: use --quantize={NO_QUANTIZER}.")


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(f"--quantize={name!r}{why}", param="quantize")
