"""The small operations of a decoder layer in Triton.

Shape legend: T tokens, D hidden, F intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sortserve.model.backends.triton.kernels.rows import add_rms_norm_kernel, silu_and_mul_kernel
from sortserve.model.backends.triton.tiles import next_power_of_two

__all__ = ["TritonOps"]

_MAX_COLUMNS = 1024


class TritonOps:
    """See ``Ops``. One program does ``rows`` rows of the norms, a power of two."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """``x / rms(x) * weight`` over the last dimension."""
        return self._norm(x_TD.contiguous(), None, weight_D, eps)

    def add_rms_norm(self, h_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """``h += delta`` in place, then the norm of h."""
        return self._norm(h_TD, delta_TD.contiguous(), weight_D, eps)

    def _norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
        assert x_TD.is_contiguous()
        y_TD = torch.empty_like(x_TD)
        width = x_TD.shape[-1]
        num_rows = x_TD.numel() // width
        padded_width = next_power_of_two(width)
        if num_rows:
            add_rms_norm_kernel[(-(-num_rows // self._rows),)](
                x_TD,
                delta_TD,
                weight_D,
                y_TD,
                num_rows,
                eps,
                HAS_DELTA=delta_TD is not None,
                WIDTH=width,
                PADDED_WIDTH=padded_width,
                ROWS=self._rows,
                num_warps=min(16, max(1, padded_width // 512)),
            )
        return y_TD

    def silu_and_mul(self, gate_up_TF: Tensor) -> Tensor:
        """``silu(gate) * up`` of the two halves: [T, 2F] to [T, F]."""
        gate_up_TF = gate_up_TF.contiguous()
        num_rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
        y_TF = gate_up_TF.new_empty(num_rows, width)
        columns = min(_MAX_COLUMNS, next_power_of_two(width))
        if num_rows:
            silu_and_mul_kernel[(-(-num_rows // self._rows), -(-width // columns))](
                gate_up_TF, y_TF, num_rows, WIDTH=width, ROWS=self._rows, COLUMNS=columns
            )
        return y_TF
