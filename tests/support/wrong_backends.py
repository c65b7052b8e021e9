"""Backends that compute wrongly, each in one way: what a check at start-up must notice.

    monkeypatch.setitem(BACKENDS, "wrong", WRONG["page"])

Each is the reference with one mistake in it, under the name ``wrong``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from sortserve.model.attention import Attention, RopeTables, SlabAttention
from sortserve.model.backend import Target
from sortserve.model.backends.reference.backend import ReferenceBackend
from sortserve.model.backends.reference.ops import ReferenceOps
from sortserve.model.batch import Batch
from sortserve.model.weight import LinearOp, Weight

__all__ = ["WRONG", "EditedAttention"]


class WrongBackend(ReferenceBackend):
    name = "wrong"


class EditedAttention:
    """The reference's, over batches that somebody changes first."""

    def __init__(self, attention: Attention, edit: Callable[[Batch], Batch]) -> None:
        self._attention = attention
        self._edit = edit

    def prepare(self, batch: Batch, slabs: range, num_rows: int) -> Sequence[SlabAttention]:
        return self._attention.prepare(self._edit(batch), slabs, num_rows)

    def write(
        self,
        batch: Batch,
        slab: int,
        num_rows: int,
        kv_TX: Tensor,
        key_norm: Tensor | None,
        layer_pages: Tensor,
    ) -> None:
        self._attention.write(self._edit(batch), slab, num_rows, kv_TX, key_norm, layer_pages)


def _attention_edited_by(edit: Callable[[Batch], Batch]) -> Callable[[Target], WrongBackend]:
    class Wrong(WrongBackend):
        def attention(self, rope: RopeTables) -> Attention:
            return EditedAttention(super().attention(rope), edit)

    return Wrong


def _read_first_page_for_second(batch: Batch) -> Batch:
    tables = batch.block_tables_SRB.clone()
    if tables.shape[2] > 1:
        tables[:, :, 1] = torch.where(tables[:, :, 1] < 0, -1, tables[:, :, 0])
    return replace(batch, block_tables_SRB=tables)


def _write_one_slot_early_above_the_first_slab(batch: Batch) -> Batch:
    slots = batch.slots_ST.clone()
    slots[1:] = torch.where(slots[1:] > 0, slots[1:] - 1, slots[1:])
    return replace(batch, slots_ST=slots)


def _read_one_token_too_few(batch: Batch) -> Batch:
    lens = [max(1, n - 1) for n in batch.context_lens]
    return replace(batch, context_lens_R=torch.tensor(lens, dtype=torch.int32))


class _PlainNorms(ReferenceOps):
    """Norms that forget their weight."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x_TD, torch.ones_like(weight_D), eps)


class _Gelu(ReferenceOps):
    """Another gate than the model's."""

    def silu_and_mul(self, gate_up_TF: Tensor) -> Tensor:
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return gelu(gate_TF) * up_TF


def _with_ops(ops: ReferenceOps) -> Callable[[Target], WrongBackend]:
    def make(target: Target) -> WrongBackend:
        backend = WrongBackend(target)
        backend.ops = ops
        return backend

    return make


class _NanHead(WrongBackend):
    """Logits of which one is no number."""

    def head(self, weight: Weight) -> LinearOp:
        linear = super().head(weight)

        def head(x_TI: Tensor) -> Tensor:
            logits_RV = linear(x_TI)
            logits_RV[-1, 0] = torch.nan
            return logits_RV

        return head


class _Raising(WrongBackend):
    """What a kernel does that cannot be compiled here."""

    def stack(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no image for this device\nand a long trace of it")


WRONG: dict[str, Callable[[Target], WrongBackend]] = {
    "page": _attention_edited_by(_read_first_page_for_second),
    "slot": _attention_edited_by(_write_one_slot_early_above_the_first_slab),
    "length": _attention_edited_by(_read_one_token_too_few),
    "norm": _with_ops(_PlainNorms()),
    "gate": _with_ops(_Gelu()),
    "nan": _NanHead,
    "raises": _Raising,
}
"""By what is wrong."""
