"""The kernels of ``loss_rows``: one program for each row of logits, which it reads tile by tile.

The sum of exponentials is kept with the largest logit so far (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018).

Shape legend: B columns of a tile.
"""

import triton
import triton.language as tl

__all__ = ["losses_kernel", "lse_kernel"]


@triton.jit
def _tile(logits, bias, start, num_columns, HAS_BIAS: tl.constexpr, TILE: tl.constexpr):
    columns_B = start + tl.arange(0, TILE)
    is_column_B = columns_B < num_columns
    z_B = tl.load(logits + columns_B, mask=is_column_B, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z_B += tl.load(bias + columns_B, mask=is_column_B, other=0.0)
    return columns_B, is_column_B, z_B


@triton.jit
def lse_kernel(logits, bias, lse, num_columns, stride, HAS_BIAS: tl.constexpr, TILE: tl.constexpr):
    """lse[row] = log(sum(exp(logits[row] + bias)))."""
    row = tl.program_id(0).to(tl.int64)
    largest = -float("inf")
    total = 0.0
    for start in range(0, num_columns, TILE):
        _, is_column_B, z_B = _tile(logits + row * stride, bias, start, num_columns, HAS_BIAS, TILE)
        z_B = tl.where(is_column_B, z_B, -float("inf"))
        now = tl.maximum(largest, tl.max(z_B, axis=0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(z_B - now), axis=0)
        largest = now
    tl.store(lse + row, largest + tl.log(total))


@triton.jit
def losses_kernel(
    logits,
    teacher,
    teacher_lse,
    bias,
    targets,
    divisor,
    ce,
    kl,
    num_columns,
    stride,
    teacher_stride,
    ce_weight,
    kl_weight,
    HAS_BIAS: tl.constexpr,
    DISTILS: tl.constexpr,
    WANTS_GRAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes ce and kl of a row; where WANTS_GRAD its logits become the gradient of their sum."""
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * stride
    target = tl.load(targets + row)
    z_target = tl.load(own + target).to(tl.float32)
    if HAS_BIAS:
        z_target += tl.load(bias + target)
    taught = own
    t_lse = 0.0
    if DISTILS:
        taught = teacher + row * teacher_stride
        t_lse = tl.load(teacher_lse + row)
    largest = -float("inf")
    total = 0.0
    gap = 0.0  # of sum(p (t - z))
    mass = 0.0  # of p, 1 but for rounding
    for start in range(0, num_columns, TILE):
        _, is_column_B, z_B = _tile(own, bias, start, num_columns, HAS_BIAS, TILE)
        if DISTILS:
            _, _, t_B = _tile(taught, bias, start, num_columns, HAS_BIAS, TILE)
            p_B = tl.where(is_column_B, tl.exp(t_B - t_lse), 0.0)
            gap += tl.sum(p_B * (t_B - z_B), axis=0)
            mass += tl.sum(p_B, axis=0)
        z_B = tl.where(is_column_B, z_B, -float("inf"))
        now = tl.maximum(largest, tl.max(z_B, axis=0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(z_B - now), axis=0)
        largest = now
    lse = largest + tl.log(total)
    tl.store(ce + row, lse - z_target)
    if DISTILS:
        tl.store(kl + row, gap + mass * (lse - t_lse))
    if WANTS_GRAD:
        by = 1.0 / tl.load(divisor)
        for start in range(0, num_columns, TILE):
            columns_B, is_column_B, z_B = _tile(own, bias, start, num_columns, HAS_BIAS, TILE)
            grad_B = (ce_weight + kl_weight) * tl.exp(z_B - lse)
            if DISTILS:
                _, _, t_B = _tile(taught, bias, start, num_columns, HAS_BIAS, TILE)
                grad_B -= kl_weight * tl.exp(t_B - t_lse)
            grad_B = tl.where(columns_B == target, grad_B - ce_weight, grad_B) * by
            tl.store(own + columns_B, grad_B.to(logits.dtype.element_ty), mask=is_column_B)
