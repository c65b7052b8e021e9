"""RMSNorm with an addition before it, and SiLU of one half times the other: row by row."""

import triton
import triton.language as tl

__all__ = ["add_rms_norm_kernel", "silu_and_mul_kernel"]


@triton.jit(do_not_specialize=["num_rows"])
def add_rms_norm_kernel(
    x,
    delta,
    weight,
    y,
    num_rows,
    eps,
    HAS_DELTA: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``x += delta``, rounded, then ``y = x / rms(x) * weight``, computed in fp32.

    x, delta, y: [num_rows, WIDTH], contiguous. weight: [WIDTH]. One program does ROWS rows.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED_WIDTH)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < WIDTH)
    at = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    x_RD = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x_RD += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        rounded_RD = x_RD.to(x.dtype.element_ty)
        tl.store(x + at, rounded_RD, mask=inside)
        x_RD = rounded_RD.to(tl.float32)
    weight_D = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    scale_R = tl.rsqrt(tl.sum(x_RD * x_RD, axis=1) / WIDTH + eps)
    y_RD = x_RD * scale_R[:, None] * weight_D[None, :]
    tl.store(y + at, y_RD.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def silu_and_mul_kernel(
    gate_up,
    y,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``y = silu(gate) * up`` in fp32, rounded once.

    gate_up: [num_rows, 2 WIDTH], all gates, then all ups. y: [num_rows, WIDTH]. Both contiguous.
    One program does ROWS rows of COLUMNS columns.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < WIDTH)
    row_at = rows[:, None].to(tl.int64) * WIDTH
    gate_at = gate_up + 2 * row_at + columns[None, :]
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    shrunk = tl.exp(-tl.abs(gate))  # never overflows
    product = gate * tl.where(gate < 0.0, shrunk, 1.0) / (1.0 + shrunk) * up
    tl.store(y + row_at + columns[None, :], product.to(y.dtype.element_ty), mask=inside)
