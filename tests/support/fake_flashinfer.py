"""A package ``flashinfer`` in plain torch: the two wrappers, by their documented interface.

Arguments are named, ordered and checked as https://docs.flashinfer.ai documents them (0.7), those
that we leave out too; what they would compute on a device is computed the slow way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__version__ = "0.7.2"
PLANS: list[str] = []
"""What was planned, in order: ``decode`` or ``prefill``."""


class _Wrapper:
    """What both have in common: a plan, and attention by it."""

    kind: str

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer[:64].any()  # the rest is as large as it is zero
        assert kv_layout in ("NHD", "HND")
        self._kv_layout = kv_layout
        self._plan: dict[str, Any] | None = None

    def _keep_plan(
        self,
        qo_indptr: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        for tensor in (qo_indptr, indptr, indices, last_page_len):
            assert tensor.dtype == torch.int32
            assert tensor.dim() == 1
        batch_size = len(last_page_len)
        assert len(qo_indptr) == len(indptr) == batch_size + 1
        assert indptr[0] == 0
        assert (indptr.diff() > 0).all()
        assert len(indices) == indptr[-1]
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        assert num_qo_heads % num_kv_heads == 0
        assert options["q_data_type"] == options["kv_data_type"]
        PLANS.append(self.kind)
        self._plan = {
            "qo_indptr": qo_indptr.tolist(),
            "indptr": indptr.tolist(),
            "indices": indices.clone(),
            "last_page_len": last_page_len.tolist(),
            "sizes": (num_qo_heads, num_kv_heads, head_dim, page_size),
            "scale": options["sm_scale"] or 1 / math.sqrt(head_dim),
            "causal": options["causal"],
            "dtype": options["q_data_type"],
        }

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        """Of every row: its last queries over all its keys."""
        assert not options
        assert self._plan is not None
        plan = self._plan
        num_qo_heads, num_kv_heads, head_dim, page_size = plan["sizes"]
        assert q.shape == (plan["qo_indptr"][-1], num_qo_heads, head_dim)
        assert q.is_contiguous()
        assert q.dtype == plan["dtype"]
        assert self._kv_layout == "HND"
        for cache in paged_kv_cache:
            assert cache.shape[1:] == (num_kv_heads, page_size, head_dim)
            assert cache.dtype == plan["dtype"]
        out = torch.full_like(q, float("nan"))
        for row, last_len in enumerate(plan["last_page_len"]):
            start, end = plan["qo_indptr"][row : row + 2]
            pages = plan["indices"][plan["indptr"][row] : plan["indptr"][row + 1]].long()
            num_keys = (len(pages) - 1) * page_size + last_len
            keys, values = (
                # [pages, heads, tokens, head_dim] -> [query heads, tokens, head_dim]
                cache[pages]
                .transpose(0, 1)
                .flatten(1, 2)[:, :num_keys]
                .repeat_interleave(num_qo_heads // num_kv_heads, dim=0)
                for cache in paged_kv_cache
            )
            scores = torch.einsum("tnh,nch->ntc", q[start:end], keys) * plan["scale"]
            if plan["causal"]:
                seen = torch.ones(end - start, num_keys, dtype=torch.bool)
                seen = seen.tril(num_keys - (end - start))
                scores = scores.masked_fill(~seen, float("-inf"))
            out[start:end] = torch.einsum("ntc,nch->tnh", scores.softmax(-1), values)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """Rows of one token."""

    kind = "decode"

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """One query a row."""
        self._keep_plan(
            torch.arange(len(indptr), dtype=torch.int32),
            indptr,
            indices,
            last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type or q_data_type,
            sm_scale=sm_scale,
            causal=False,
        )


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Rows of any number of tokens."""

    kind = "prefill"

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Queries of a row are its last tokens."""
        self._keep_plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            page_size,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type or q_data_type,
            sm_scale=sm_scale,
            causal=causal,
        )
