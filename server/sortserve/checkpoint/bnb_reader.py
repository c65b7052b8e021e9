"""The tensors of a checkpoint that bitsandbytes has quantised, under the names of plain ones.

A quantised matrix ``X.weight`` is stored as several tensors:

* in 4 bits ``X.weight`` itself (packed), ``X.weight.absmax``, ``.quant_map`` and
  ``.quant_state.bitsandbytes__nf4`` (or ``__fp4``), JSON in bytes; where the scales are quantised
  themselves, ``.nested_absmax`` and ``.nested_quant_map``, too;
* in 8 bits ``X.weight``, ``X.SCB`` and ``X.weight_format``.

All of them are checked before any matrix is read, but for the few bytes of the JSON and the tables
of values, which are read with their matrix.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sortserve.checkpoint.quantization import Quantization
from sortserve.checkpoint.tensors import FLOATS, SafetensorsReader
from sortserve.core.errors import CheckpointError
from sortserve.model.bnb import EightBitFormat, FourBitFormat, four_bit_values, restore_scales
from sortserve.model.weight import Weight

__all__ = ["BnbReader"]

_FOUR_BIT = re.compile(
    r"(.*\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__(?:nf4|fp4))"
)
_EIGHT_BIT = re.compile(r"(.*\.)(SCB|weight_format)")
_STATE = "quant_state.bitsandbytes__"
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK_SIZE = 256
_ROW_MAJOR = 0
_MAX_STATE_BYTES = 4096


class BnbReader:
    """A WeightReader of matrices as they are stored.

    Args:
        stored: the files' tensors.
        quantization: what ``config.json`` says of them.

    Raises:
        CheckpointError: parts of a quantised matrix are missing, or are not what their names say.
    """

    def __init__(self, stored: SafetensorsReader, quantization: Quantization) -> None:
        self.origin = stored.origin
        self._stored = stored
        self._threshold = quantization.threshold
        self._parts = self._find_parts(_FOUR_BIT if quantization.is_four_bit else _EIGHT_BIT)
        self._states: dict[str, dict[str, Any]] = {}
        hidden = {part for parts in self._parts.values() for part in parts.values()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in stored.shapes.items():
            if name in hidden:
                continue
            if name not in self._parts:
                self._check_dtype(name, *FLOATS)
                self.shapes[name] = shape
            elif quantization.is_four_bit:
                self.shapes[name] = self._check_four_bit(name)
            else:
                self.shapes[name] = self._check_eight_bit(name)

    def _find_parts(self, pattern: re.Pattern[str]) -> dict[str, dict[str, str]]:
        """By the name of a quantised matrix, the stored names of what belongs to it."""
        parts: dict[str, dict[str, str]] = {}
        for name in self._stored.shapes:
            if match := pattern.fullmatch(name):
                owner = match[1] if match[1].endswith("weight") else f"{match[1]}weight"
                parts.setdefault(owner, {})[match[2]] = name
        for owner, own in parts.items():
            if owner not in self._stored.shapes:
                part = next(iter(own.values()))
                raise self._error(f"tensor {owner} is missing, but {part} is there")
        return parts

    # ---- checks ----

    def _check_four_bit(self, name: str) -> tuple[int, int]:
        """The shape of the matrix."""
        parts = self._parts[name]
        kind = next((part.removeprefix(_STATE) for part in parts if part.startswith(_STATE)), None)
        if kind is None:
            raise self._error(f"tensor {name}.{_STATE}nf4 (or fp4) is missing")
        state = self._read_state(parts[_STATE + kind], kind)
        num_outputs, num_inputs = state["shape"]
        num_elements = num_outputs * num_inputs
        num_blocks = math.ceil(num_elements / state["blocksize"])
        is_nested = "nested_blocksize" in state
        scales_dtype = "U8" if is_nested else "F32"
        wanted = {"quant_map": ("F32", (16,)), "absmax": (scales_dtype, (num_blocks,))}
        if is_nested:
            wanted["nested_absmax"] = ("F32", (math.ceil(num_blocks / _NESTED_BLOCK_SIZE),))
            wanted["nested_quant_map"] = ("F32", (256,))
        self._check_tensor(name, "U8", (math.ceil(num_elements / 2), 1))
        for part, (dtype, shape) in wanted.items():
            if part not in parts:
                raise self._error(f"tensor {name}.{part} is missing")
            self._check_tensor(parts[part], dtype, shape)
        self._states[name] = state
        return num_outputs, num_inputs

    def _read_state(self, name: str, kind: str) -> dict[str, Any]:
        self._check_dtype(name, "U8")
        if math.prod(self._stored.shapes[name]) > _MAX_STATE_BYTES:
            raise self._error(f"tensor {name} has more than {_MAX_STATE_BYTES} bytes")
        try:
            state = json.loads(bytes(self._stored.read(name).tolist()))
        except (ValueError, TypeError, RecursionError) as error:
            raise self._error(f"tensor {name} is not JSON in bytes ({error})") from error
        if not isinstance(state, dict):
            raise self._error(f"tensor {name} is not a JSON object")
        allowed = {
            "quant_type": state.get("quant_type") == kind,
            "blocksize": _is_one_of(state.get("blocksize"), _BLOCK_SIZES),
            "shape": _is_shape(state.get("shape")),
        }
        if "nested_blocksize" in state:
            allowed["nested_blocksize"] = _is_one_of(
                state["nested_blocksize"], (_NESTED_BLOCK_SIZE,)
            )
            allowed["nested_offset"] = _is_number(state.get("nested_offset"))
        for field, is_allowed in allowed.items():
            if not is_allowed:
                raise self._error(f"tensor {name}: {field}={state.get(field)!r} is not supported")
        return state

    def _check_eight_bit(self, name: str) -> tuple[int, int]:
        """The shape of the matrix."""
        parts, shape = self._parts[name], self._stored.shapes[name]
        if not _is_shape(list(shape)):
            raise self._error(f"tensor {name} has shape {list(shape)}, which is no matrix's")
        num_outputs, num_inputs = shape
        if "SCB" not in parts:
            raise self._error(f"tensor {name.removesuffix('weight')}SCB is missing")
        self._check_tensor(name, "I8", shape)
        self._check_tensor(parts["SCB"], "F32", (num_outputs,))
        if "weight_format" in parts:
            self._check_tensor(parts["weight_format"], "U8", ())
            order = int(self._stored.read(parts["weight_format"]))
            if order != _ROW_MAJOR:
                raise self._error(
                    f"tensor {parts['weight_format']} is {order}; supported: {_ROW_MAJOR} (by rows)"
                )
        return num_outputs, num_inputs

    def _check_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self._check_dtype(name, dtype)
        if self._stored.shapes[name] != shape:
            raise self._error(
                f"tensor {name} has shape {list(self._stored.shapes[name])}, where {list(shape)} "
                "is wanted"
            )

    def _check_dtype(self, name: str, *allowed: str) -> None:
        if self._stored.dtypes[name] not in allowed:
            found, wanted = self._stored.dtypes[name], ", ".join(allowed)
            raise self._error(f"tensor {name} is {found}, where {wanted} is wanted")

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}: {what}.")

    # ---- reading ----

    def read(self, name: str) -> Tensor:
        """One tensor; a quantised matrix as the one it stands for, in fp32."""
        if name in self._parts:
            return self.read_weight(name).dequantize(torch.float32)
        return self._stored.read(name)

    def read_weight(self, name: str) -> Weight:
        """One matrix, as it is stored."""
        if name not in self._parts:
            return Weight.plain(self._stored.read(name))
        parts = {part: self._stored.read(own) for part, own in self._parts[name].items()}
        values = self._stored.read(name)
        if name not in self._states:
            return Weight(values, parts["SCB"], EightBitFormat(self._threshold))
        state = self._states[name]
        num_outputs, num_inputs = state["shape"]
        self._check_values(name, parts["quant_map"], state["quant_type"])
        return Weight(
            values,
            self._scales(parts, state),
            FourBitFormat(state["quant_type"], num_outputs, num_inputs, state["blocksize"]),
        )

    def _scales(self, parts: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
        if "nested_absmax" not in parts:
            return parts["absmax"]
        return restore_scales(
            parts["absmax"],
            parts["nested_absmax"],
            parts["nested_quant_map"],
            _NESTED_BLOCK_SIZE,
            float(state["nested_offset"]),
        )

    def _check_values(self, name: str, stored: Tensor, kind: str) -> None:
        """The kernels have the 16 values built in."""
        if not torch.allclose(stored, four_bit_values(kind), rtol=0, atol=1e-6):
            raise self._error(f"tensor {name}.quant_map does not hold the values of {kind}")


def _is_one_of(value: object, allowed: tuple[int, ...]) -> bool:
    return isinstance(value, int) and value in allowed


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
