"""``quantization_config`` of a ``config.json``: what is understood of it, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from sortserve.core.errors import CheckpointError

__all__ = ["Quantization"]

_METHOD = "bitsandbytes"
_KINDS = ("nf4", "fp4")
_MAX_THRESHOLD = 65504
"""The largest number in float16, which inputs are compared in."""
_ELSEWHERE = "serve the unquantised checkpoint or a GGUF file"


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes has quantised the matrices of a checkpoint.

    Which matrices it was is not read from here (``llm_int8_skip_modules``) but from the tensors
    there are. What is computed in is the server's affair (``--dtype``), not that of
    ``bnb_4bit_compute_dtype``.
    """

    is_four_bit: bool
    """Else it is LLM.int8()."""
    threshold: float
    """``llm_int8_threshold``: an input of this magnitude is an outlier."""

    @staticmethod
    def read(raw_config: Mapping[str, Any]) -> Quantization | None:
        """That of a ``config.json``; None where the weights are plain.

        Raises:
            CheckpointError: it is malformed or not supported, or bitsandbytes is not installed;
                the field is named.
        """
        fields = raw_config.get("quantization_config")
        if fields is None:
            return None
        if not isinstance(fields, Mapping):
            raise CheckpointError(f"quantization_config={fields!r} is not an object.")
        _check_method(fields)
        four, eight = (_flag(fields, name) for name in ("load_in_4bit", "load_in_8bit"))
        if four == eight:
            raise CheckpointError(
                f"quantization_config.load_in_4bit={four} and load_in_8bit={eight}: "
                "one of them must be true."
            )
        if four:
            _check_one_of(fields, "bnb_4bit_quant_type", _KINDS)
            _check_one_of(fields, "bnb_4bit_quant_storage", ("uint8",))
        if _flag(fields, "llm_int8_has_fp16_weight"):
            raise CheckpointError(
                "quantization_config.llm_int8_has_fp16_weight=true is not supported; "
                "supported: false."
            )
        threshold = fields.get("llm_int8_threshold", 6.0)
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not is_number or not 0 <= threshold <= _MAX_THRESHOLD:
            raise CheckpointError(
                f"quantization_config.llm_int8_threshold={threshold!r} is not a number from 0 to "
                f"{_MAX_THRESHOLD}."
            )
        if find_spec(_METHOD) is None:
            raise CheckpointError(
                f"the weights are quantised by {_METHOD}, which is not installed: "
                "pip install 'sortserve[quant]'"
            )
        return Quantization(is_four_bit=four, threshold=float(threshold))


def _check_method(fields: Mapping[str, Any]) -> None:
    method = fields.get("quant_method")
    if method is None and ("load_in_4bit" in fields or "load_in_8bit" in fields):
        return  # older versions of transformers leave it out
    if method != _METHOD:
        raise CheckpointError(
            f"quantised weights (quantization_config.quant_method={method!r}) are not supported; "
            f"supported: {_METHOD}. Else {_ELSEWHERE}."
        )


def _check_one_of(fields: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> None:
    value = fields.get(name, allowed[0])
    if value not in allowed:
        raise CheckpointError(
            f"quantization_config.{name}={value!r} is not supported; "
            f"supported: {', '.join(allowed)}."
        )


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"quantization_config.{name}={value!r} is not true or false.")
    return value
