"""What comes between the QKV projection and attention: norms, RoPE and the write to the cache."""

import triton
import triton.language as tl

__all__ = ["rotate_and_write_kernel"]


@triton.jit(do_not_specialize=["num_tokens", "slab", "slots_stride"])
def rotate_and_write_kernel(
    qkv,
    pages,
    plane_stride,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    slots,
    slots_stride,
    slab,
    num_tokens,
    eps,
    HAS_NORMS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Norm and rotate queries in place, norm and rotate keys and write them and values to pages.

    A head's first half rotates with its second. One program does HEADS of all heads of all tokens.

    qkv: [num_tokens, (NUM_HEADS + 2 NUM_KV_HEADS) HEAD_DIM], contiguous.
    pages: [2, pages, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]; ``plane_stride`` elements from keys to
    values. q_norm, k_norm: [HEAD_DIM]. cos, sin: fp32 [positions, HEAD_DIM / 2].
    positions: [num_tokens]. slots: [slab, token], ``slots_stride`` apart; below 0: not written.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    index = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    tokens, heads = index // ALL_HEADS, index % ALL_HEADS
    columns = tl.arange(0, PADDED_HALF)
    is_token = tokens < num_tokens
    inside = is_token[:, None] & (columns[None, :] < HALF)
    is_query = heads < NUM_HEADS
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS

    at = index[:, None] * HEAD_DIM + columns[None, :]
    first = tl.load(qkv + at, mask=inside, other=0.0)
    second = tl.load(qkv + at + HALF, mask=inside, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / HEAD_DIM + eps)[:, None]
        norm_at = tl.where(is_query[:, None], q_norm + columns[None, :], k_norm + columns[None, :])
        x = x * scale * tl.load(norm_at, mask=inside, other=0.0).to(tl.float32)
        y = y * scale * tl.load(norm_at + HALF, mask=inside, other=0.0).to(tl.float32)
        # A norm rounds, as it does where it is an operation of its own.
        x = x.to(qkv.dtype.element_ty).to(tl.float32)
        y = y.to(qkv.dtype.element_ty).to(tl.float32)

    position = tl.load(positions + tokens, mask=is_token, other=0).to(tl.int64)
    angle_at = position[:, None] * HALF + columns[None, :]
    cosine = tl.load(cos + angle_at, mask=inside, other=0.0)
    sine = tl.load(sin + angle_at, mask=inside, other=0.0)
    rotated_x = (x * cosine - y * sine).to(qkv.dtype.element_ty)
    rotated_y = (y * cosine + x * sine).to(qkv.dtype.element_ty)
    first = tl.where(is_value[:, None], first, rotated_x)
    second = tl.where(is_value[:, None], second, rotated_y)

    tl.store(qkv + at, first, mask=inside & is_query[:, None])
    tl.store(qkv + at + HALF, second, mask=inside & is_query[:, None])

    slot = tl.load(slots + slab * slots_stride + tokens, mask=is_token, other=-1).to(tl.int64)
    kv_head = tl.where(is_value, heads - NUM_HEADS - NUM_KV_HEADS, heads - NUM_HEADS)
    line = (slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    plane = tl.where(is_value, plane_stride, 0).to(tl.int64)
    page_at = (plane + line * HEAD_DIM)[:, None] + columns[None, :]
    is_written = inside & (~is_query & (slot >= 0))[:, None]
    tl.store(pages + page_at, first, mask=is_written)
    tl.store(pages + page_at + HALF, second, mask=is_written)
