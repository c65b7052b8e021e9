"""Attention within each example of a packed row, in one call for all examples: for a GPU.

Two ways to the same result. ``flash``: torch's own FlashAttention over sequences of any length
(Dao, "FlashAttention-2", 2023), in bfloat16 and float16; no padding, heads of a group share keys.
``padded``: SDPA over examples padded on the right to the longest, in any dtype; what is padded
comes after what counts, so that the causal mask hides it. Nothing here makes the host wait for the
device: sizes come from the lengths, which the host knows.

Shape legend: T tokens of the row, E examples, S tokens of the longest, N query heads, K key/value
heads, H head_dim.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = [
    "PackedLengths",
    "attend_on_device",
    "flash",
    "flash_works",
    "in_one_call",
    "padded",
]

logger = logging.getLogger(__name__)

FLASH_DTYPES = (torch.bfloat16, torch.float16)
_MAX_FLASH_HEAD_DIM = 256


class PackedLengths(tuple[int, ...]):
    """Tokens of each example of a packed row, and where they lie, on the device.

    A tuple of the lengths, with ``offsets``: int32 [E + 1], where each example starts, and T.
    """

    offsets: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedLengths:
        """Itself, or made from the lengths with one copy to the device."""
        if isinstance(lengths, cls):
            return lengths
        packed = cls(lengths)
        packed.offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return packed

    @classmethod
    def at(cls, lengths: Sequence[int], position_ids: Tensor) -> PackedLengths:
        """Made where the positions are, without a copy.

        Args:
            lengths: of the examples; they sum to T.
            position_ids: int64 [1, T], from 0 in every example.
        """
        packed = cls(lengths)
        num_tokens = position_ids.shape[1]
        place_T = torch.arange(num_tokens, device=position_ids.device)
        starts_T = torch.where(position_ids[0] == 0, place_T, num_tokens).sort().values
        end = torch.full((1,), num_tokens, device=position_ids.device)
        packed.offsets = torch.cat([starts_T[: len(packed)], end]).to(torch.int32)
        return packed


def in_one_call(device: torch.device) -> bool:
    """Whether all examples attend in one call; a CPU is faster with one after the other."""
    return device.type != "cpu"


def attend_on_device(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, packed: PackedLengths, scale: float, dropout: float
) -> Tensor:
    """Causal attention of every example to itself.

    Returns:
        [T, N, H].
    """
    head_dim, device = q_TNH.shape[2], q_TNH.device.type
    if torch.is_autocast_enabled(device):  # of which torch's operations by this name know nothing
        dtype = torch.get_autocast_dtype(device)
        q_TNH, k_TKH, v_TKH = (x.to(dtype) for x in (q_TNH, k_TKH, v_TKH))
    uses_flash = (
        q_TNH.dtype in FLASH_DTYPES
        and head_dim % 8 == 0
        and head_dim <= _MAX_FLASH_HEAD_DIM
        and flash_works(q_TNH.device, q_TNH.dtype, head_dim)
    )
    attend = flash if uses_flash else padded
    return attend(q_TNH, k_TKH, v_TKH, packed, scale, dropout)


def flash(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, packed: PackedLengths, scale: float, dropout: float
) -> Tensor:
    """By the operation that torch's SDPA runs over nested tensors; it has its own backward."""
    longest = max(packed)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q_TNH,
        k_TKH,
        v_TKH,
        packed.offsets,
        packed.offsets,
        longest,
        longest,
        dropout,
        True,  # causal
        False,
        scale=scale,
    )[0]
    return out


def padded(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, packed: PackedLengths, scale: float, dropout: float
) -> Tensor:
    """By SDPA over [E, S]."""
    num_tokens, longest, count = q_TNH.shape[0], max(packed), len(packed)
    offsets_E = packed.offsets[:-1].long()
    place_T = torch.arange(num_tokens, device=q_TNH.device)
    # Beyond its end an example shows tokens of the next, which nobody looks at.
    taken_ES = (offsets_E[:, None] + place_T[:longest]).clamp(max=num_tokens - 1)
    example_T = torch.searchsorted(offsets_E, place_T, right=True) - 1
    kept_T = example_T * longest + place_T - offsets_E[example_T]

    groups = q_TNH.shape[1] // k_TKH.shape[1]

    def spread(x: Tensor, repeats: int = 1) -> Tensor:
        taken = x.index_select(0, taken_ES.flatten()).view(count, longest, *x.shape[1:])
        return taken.transpose(1, 2).repeat_interleave(repeats, dim=1)

    out_ENSH = scaled_dot_product_attention(
        spread(q_TNH),
        spread(k_TKH, groups),
        spread(v_TKH, groups),
        is_causal=True,
        scale=scale,
        dropout_p=dropout,
    )
    return out_ENSH.transpose(1, 2).flatten(0, 1).index_select(0, kept_T)


@functools.cache
def flash_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash does here what ``padded`` does, forward and backward: tried once.

    It is an operation of torch's that has no promise of staying as it is.
    """
    generator = torch.Generator().manual_seed(0)
    packed = PackedLengths.of((5, 70, 1, 33), device)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            inputs = [
                torch.randn(sum(packed), heads, head_dim, generator=generator).to(device, dtype)
                for heads in (4, 2, 2)
            ]
            found, wanted = (_with_gradients(attend, inputs, packed) for attend in (flash, padded))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        logger.warning(
            "FlashAttention over packed rows is not to be had: %s", str(error).partition("\n")[0]
        )
        return False
    worst = max(
        float((x - y).float().norm() / y.float().norm()) for x, y in zip(found, wanted, strict=True)
    )
    if not worst < 0.02:
        logger.warning("FlashAttention over packed rows is %.3g off: padding instead.", worst)
    return worst < 0.02


def _with_gradients(
    attend: object, inputs: Sequence[Tensor], packed: PackedLengths
) -> list[Tensor]:
    assert callable(attend)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out: Tensor = attend(*leaves, packed, inputs[0].shape[2] ** -0.5, 0.0)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
