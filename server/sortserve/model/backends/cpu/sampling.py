"""What the sampler asks of long rows, in C++.

A token is given only where the plain way in torch would draw the same one beyond doubt: see
``kernels/sampling.cpp``.

Shape legend: R rows of the batch, N those that are meant, V vocabulary, K blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.sampling_params import SamplingParams
from sortserve.model.backends.cpu.library import NativeLibrary, pointer

__all__ = ["NativeSampling"]


class NativeSampling:
    """See ``RowSampling``."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library

    def block_maxima(self, logits_RV: Tensor, num_blocks: int) -> Tensor:
        """See ``RowSampling``."""
        maxima_RK = logits_RV.new_empty(len(logits_RV), num_blocks)
        self._call_blocks("block_maxima", logits_RV, maxima_RK, num_rows=len(logits_RV))
        return maxima_RK

    def apply_bitmasks(
        self, logits_RV: Tensor, maxima_RK: Tensor, masks: Mapping[int, NDArray[np.int32]]
    ) -> None:
        """See ``RowSampling``."""
        num_words = -(-logits_RV.shape[1] // 32)
        assert all(w.dtype == np.int32 and w.shape == (num_words,) for w in masks.values())
        assert all(w.flags.c_contiguous for w in masks.values())
        rows_N = torch.tensor(list(masks), dtype=torch.int64)
        masks_N = torch.tensor([w.ctypes.data for w in masks.values()], dtype=torch.int64)
        self._call_blocks(
            *("apply_bitmasks", logits_RV, maxima_RK),
            num_rows=len(masks),
            rows=pointer(rows_N),
            masks=pointer(masks_N),
        )

    def draw_tokens(
        self,
        logits_RV: Tensor,
        maxima_RK: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        filters: Sequence[SamplingParams],
        noise: Sequence[float],
    ) -> list[int | None]:
        """See ``RowSampling``."""
        settings_3N = torch.tensor(
            [temperatures, [1.0 - p.top_p for p in filters], [p.min_p for p in filters]],
            dtype=torch.float32,
        )
        top_k_N = torch.tensor([max(p.top_k, 0) for p in filters])
        noise_N = torch.tensor(noise, dtype=torch.float64)
        token_N = torch.empty_like(top_k_N)
        temperature_N, spare_N, min_p_N = settings_3N
        self._call(
            "draw_tokens",
            logits_RV,
            maxima_RK,
            rows,
            temperature=pointer(temperature_N),
            spare=pointer(spare_N),
            min_p=pointer(min_p_N),
            top_k=pointer(top_k_N),
            noise=pointer(noise_N),
            token=pointer(token_N),
        )
        return [token if token >= 0 else None for token in token_N.tolist()]

    def log_sums(self, logits_RV: Tensor, maxima_RK: Tensor, rows: Sequence[int]) -> Tensor:
        """See ``RowSampling``."""
        log_sum_N = torch.empty(len(rows), dtype=torch.float64)
        self._call("log_sum_exp", logits_RV, maxima_RK, rows, log_sum=pointer(log_sum_N))
        return log_sum_N.float()

    def _call_blocks(
        self, name: str, logits_RV: Tensor, maxima_RK: Tensor, **others: int | None
    ) -> None:
        assert logits_RV.dtype == maxima_RK.dtype == torch.float32
        call = _BlocksCall(
            logits=pointer(logits_RV),
            maxima=pointer(maxima_RK),
            vocab_size=logits_RV.shape[1],
            num_maxima=maxima_RK.shape[1],
            num_threads=torch.get_num_threads(),
            **others,
        )
        self._library.call(name, call)

    def _call(
        self,
        name: str,
        logits_RV: Tensor,
        maxima_RK: Tensor,
        rows: Sequence[int],
        **addresses: int | None,
    ) -> None:
        assert logits_RV.dtype == maxima_RK.dtype == torch.float32
        rows_N = torch.tensor(rows, dtype=torch.int64)
        call = _SamplingCall(
            logits=pointer(logits_RV),
            rows=pointer(rows_N),
            maxima=pointer(maxima_RK),
            num_rows=len(rows),
            vocab_size=logits_RV.shape[1],
            num_maxima=maxima_RK.shape[1],
            num_threads=torch.get_num_threads(),
            **addresses,
        )
        self._library.call(name, call)


class _SamplingCall(ctypes.Structure):
    """SamplingCall of ``kernels/sampling.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "rows", "maxima")),
        *((name, ctypes.c_int64) for name in ("num_rows", "vocab_size")),
        *((name, ctypes.c_int64) for name in ("num_maxima", "num_threads")),
        *((name, ctypes.c_void_p) for name in ("temperature", "spare", "min_p")),
        *((name, ctypes.c_void_p) for name in ("top_k", "noise", "token", "log_sum")),
    )


class _BlocksCall(ctypes.Structure):
    """BlocksCall of ``kernels/sampling.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "maxima", "rows", "masks")),
        *((name, ctypes.c_int64) for name in ("num_rows", "vocab_size")),
        *((name, ctypes.c_int64) for name in ("num_maxima", "num_threads")),
    )
