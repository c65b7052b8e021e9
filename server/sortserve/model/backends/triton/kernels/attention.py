"""Attention that reads pages in place: rows of one token, split over their context, and chunks.

Scores are in units of log2(e), because exp2 is what the device has. Softmax is computed tile by
tile of keys, with the largest score so far (Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018; Dao, "FlashAttention-2", 2023); rows of one token are split over their context
and the parts combined (Dao et al., "Flash-Decoding", 2023).

Shape legend: M queries of a tile, N keys of a tile, H head_dim, padded to a power of two.
Pages, block tables, ...: see ``Batch`` and ``KVCache``. ``plane_stride`` is the number of elements
from keys to values.
"""

import triton
import triton.language as tl

__all__ = ["combine_kernel", "decode_kernel", "prefill_kernel"]


@triton.jit
def _attend_tile(
    q_MH,
    out_MH,
    largest_M,
    sum_M,
    pages,
    plane_stride,
    table,
    kv_head,
    start,
    end,
    limit_M,
    scale,
    MASKED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Add KEYS keys from ``start`` on to the sums so far.

    Where MASKED, keys from ``end`` on are not read, and query m sees those below ``limit_M[m]``.
    """
    keys_N = start + tl.arange(0, KEYS)
    columns_H = tl.arange(0, PADDED_HEAD_DIM)
    is_column_H = columns_H < HEAD_DIM
    is_key_N = keys_N < end
    if MASKED:
        pages_N = tl.load(table + keys_N // BLOCK_SIZE, mask=is_key_N, other=0)
    else:
        pages_N = tl.load(table + keys_N // BLOCK_SIZE)
    # A page that is none belongs to a row that nobody reads: any address of the pool will do.
    pages_N = tl.maximum(pages_N, 0).to(tl.int64)
    lines_N = (pages_N * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + keys_N % BLOCK_SIZE
    k_at = pages + lines_N[None, :] * HEAD_DIM + columns_H[:, None]
    v_at = pages + plane_stride + lines_N[:, None] * HEAD_DIM + columns_H[None, :]
    # What a page held before may not be finite, and 0 times NaN is NaN: it must not be read.
    if MASKED:
        k_HN = tl.load(k_at, mask=is_column_H[:, None] & is_key_N[None, :], other=0.0)
        v_NH = tl.load(v_at, mask=is_key_N[:, None] & is_column_H[None, :], other=0.0)
    elif HEAD_DIM == PADDED_HEAD_DIM:
        k_HN = tl.load(k_at)
        v_NH = tl.load(v_at)
    else:
        k_HN = tl.load(k_at, mask=is_column_H[:, None], other=0.0)
        v_NH = tl.load(v_at, mask=is_column_H[None, :], other=0.0)

    scores_MN = tl.dot(q_MH, k_HN, input_precision="ieee") * scale
    if MASKED:
        scores_MN = tl.where(keys_N[None, :] < limit_M[:, None], scores_MN, float("-inf"))
    new_largest_M = tl.maximum(largest_M, tl.max(scores_MN, axis=1))
    # A query that has seen no key yet has no largest score; any finite one will do.
    offset_M = tl.where(new_largest_M == float("-inf"), 0.0, new_largest_M)
    weights_MN = tl.exp2(scores_MN - offset_M[:, None])
    shrink_M = tl.exp2(largest_M - offset_M)
    sum_M = sum_M * shrink_M + tl.sum(weights_MN, axis=1)
    out_MH = out_MH * shrink_M[:, None]
    out_MH = tl.dot(weights_MN.to(v_NH.dtype), v_NH, out_MH, input_precision="ieee")
    return out_MH, new_largest_M, sum_M


@triton.jit(do_not_specialize=["slab", "table_rows", "table_stride"])
def decode_kernel(
    qkv,
    pages,
    plane_stride,
    block_tables,
    context_lens,
    query_starts,
    out,
    part_out,
    part_sums,
    slab,
    table_rows,
    table_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Attention of the rows of one token; other rows are left out.

    One program does the heads of one key/value head of one row, over one of SPLITS parts of its
    context. A single part is the answer; of several, each leaves its normalised output and the
    logarithm (of base 2) of its sum, for ``combine_kernel``; -inf where a part is empty.

    qkv: [T, (NUM_HEADS + 2 NUM_KV_HEADS) HEAD_DIM], queries rotated. out: [T, NUM_HEADS HEAD_DIM].
    part_out: fp32 [num_rows, NUM_HEADS, SPLITS, HEAD_DIM]; part_sums: the same without HEAD_DIM.
    block_tables: [slab, table_rows, table_stride].
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_starts + row).to(tl.int64)
    if tl.load(query_starts + row + 1) - token != 1:
        return
    context_len = tl.load(context_lens + row)
    split_len = tl.cdiv(tl.cdiv(context_len, SPLITS), KEYS) * KEYS
    start = split * split_len
    end = tl.minimum(start + split_len, context_len)
    table = block_tables + (slab.to(tl.int64) * table_rows + row) * table_stride

    members_M = tl.arange(0, PADDED_GROUP)
    heads_M = kv_head * GROUP + members_M
    is_head_M = members_M < GROUP
    columns_H = tl.arange(0, PADDED_HEAD_DIM)
    inside_MH = is_head_M[:, None] & (columns_H < HEAD_DIM)[None, :]
    WIDTH: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    in_head_MH = heads_M[:, None] * HEAD_DIM + columns_H[None, :]
    q_MH = tl.load(qkv + token * WIDTH + in_head_MH, mask=inside_MH, other=0.0)

    out_MH = tl.zeros([PADDED_GROUP, PADDED_HEAD_DIM], dtype=tl.float32)
    largest_M = tl.full([PADDED_GROUP], float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros([PADDED_GROUP], dtype=tl.float32)
    limit_M = tl.zeros([PADDED_GROUP], dtype=tl.int32) + end
    for first in range(start, end, KEYS):
        out_MH, largest_M, sum_M = _attend_tile(
            q_MH,
            out_MH,
            largest_M,
            sum_M,
            pages,
            plane_stride,
            table,
            kv_head,
            first,
            end,
            limit_M,
            scale,
            MASKED=True,
            NUM_KV_HEADS=NUM_KV_HEADS,
            HEAD_DIM=HEAD_DIM,
            PADDED_HEAD_DIM=PADDED_HEAD_DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            KEYS=KEYS,
        )

    # Without any key the output is zero, not 0 / 0.
    out_MH = out_MH / tl.where(sum_M > 0.0, sum_M, 1.0)[:, None]
    if SPLITS == 1:
        out_at = out + token * NUM_HEADS * HEAD_DIM + in_head_MH
        tl.store(out_at, out_MH.to(out.dtype.element_ty), mask=inside_MH)
    else:
        parts_M = (row.to(tl.int64) * NUM_HEADS + heads_M) * SPLITS + split
        logarithms_M = largest_M + tl.log2(tl.where(sum_M > 0.0, sum_M, 1.0))
        tl.store(part_sums + parts_M, logarithms_M, mask=is_head_M)
        if start < end:
            part_at = part_out + parts_M[:, None] * HEAD_DIM + columns_H[None, :]
            tl.store(part_at, out_MH, mask=inside_MH)


@triton.jit
def combine_kernel(
    part_out,
    part_sums,
    query_starts,
    out,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts that ``decode_kernel`` left, weighted by their sums. One program a row and head."""
    row, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(query_starts + row).to(tl.int64)
    if tl.load(query_starts + row + 1) - token != 1:
        return
    parts_S = (row.to(tl.int64) * NUM_HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    columns_H = tl.arange(0, PADDED_HEAD_DIM)
    is_column_H = columns_H < HEAD_DIM
    sums_S = tl.load(part_sums + parts_S)
    is_part_S = sums_S > float("-inf")
    largest = tl.max(sums_S, axis=0)
    largest = tl.where(largest > float("-inf"), largest, 0.0)
    weights_S = tl.where(is_part_S, tl.exp2(sums_S - largest), 0.0)
    total = tl.sum(weights_S, axis=0)
    out_SH = tl.load(
        part_out + parts_S[:, None] * HEAD_DIM + columns_H[None, :],
        mask=is_part_S[:, None] & is_column_H[None, :],
        other=0.0,
    )
    out_H = tl.sum(out_SH * weights_S[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    out_at = out + (token * NUM_HEADS + head) * HEAD_DIM + columns_H
    tl.store(out_at, out_H.to(out.dtype.element_ty), mask=is_column_H)


@triton.jit(do_not_specialize=["slab", "num_rows", "num_blocks", "table_rows", "table_stride"])
def prefill_kernel(
    qkv,
    pages,
    plane_stride,
    block_tables,
    context_lens,
    query_starts,
    out,
    slab,
    num_rows,
    num_blocks,
    table_rows,
    table_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Attention of the rows of several tokens, each seeing itself and all before it.

    One program does one head of QUERIES tokens of a row. Row r has the programs from
    ``query_starts[r] // QUERIES + r`` on, ``num_blocks`` in all: enough for its tokens, however the
    rows are cut, and every program finds its row from the starts alone. Arguments as for
    ``decode_kernel``.
    """
    head = tl.program_id(0)
    # Late tokens see the most keys: they go first.
    block = num_blocks - 1 - tl.program_id(1)
    row = 0
    above = num_rows
    while above - row > 1:
        middle = (row + above) // 2
        is_before = tl.load(query_starts + middle) // QUERIES + middle <= block
        row = tl.where(is_before, middle, row)
        above = tl.where(is_before, above, middle)
    row_start = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - row_start
    first_query = (block - (row_start // QUERIES + row)) * QUERIES
    if (num_queries <= 1) | (first_query >= num_queries):
        return
    context_len = tl.load(context_lens + row)
    table = block_tables + (slab.to(tl.int64) * table_rows + row) * table_stride
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)

    queries_M = first_query + tl.arange(0, QUERIES)
    columns_H = tl.arange(0, PADDED_HEAD_DIM)
    inside_MH = (queries_M < num_queries)[:, None] & (columns_H < HEAD_DIM)[None, :]
    tokens_M = (row_start + queries_M).to(tl.int64)
    WIDTH: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    in_head_H = head * HEAD_DIM + columns_H
    q_MH = tl.load(qkv + tokens_M[:, None] * WIDTH + in_head_H[None, :], mask=inside_MH, other=0.0)

    out_MH = tl.zeros([QUERIES, PADDED_HEAD_DIM], dtype=tl.float32)
    largest_M = tl.full([QUERIES], float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros([QUERIES], dtype=tl.float32)
    first_seen = context_len - num_queries + first_query + 1  # keys that the first query sees
    limit_M = first_seen + tl.arange(0, QUERIES)
    end = tl.minimum(context_len, first_seen + QUERIES - 1)
    num_unmasked = first_seen // KEYS * KEYS
    for first in range(0, num_unmasked, KEYS):
        out_MH, largest_M, sum_M = _attend_tile(
            q_MH,
            out_MH,
            largest_M,
            sum_M,
            pages,
            plane_stride,
            table,
            kv_head,
            first,
            end,
            limit_M,
            scale,
            MASKED=False,
            NUM_KV_HEADS=NUM_KV_HEADS,
            HEAD_DIM=HEAD_DIM,
            PADDED_HEAD_DIM=PADDED_HEAD_DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            KEYS=KEYS,
        )
    for first in range(num_unmasked, end, KEYS):
        out_MH, largest_M, sum_M = _attend_tile(
            q_MH,
            out_MH,
            largest_M,
            sum_M,
            pages,
            plane_stride,
            table,
            kv_head,
            first,
            end,
            limit_M,
            scale,
            MASKED=True,
            NUM_KV_HEADS=NUM_KV_HEADS,
            HEAD_DIM=HEAD_DIM,
            PADDED_HEAD_DIM=PADDED_HEAD_DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            KEYS=KEYS,
        )
    out_MH = out_MH / sum_M[:, None]
    out_at = out + tokens_M[:, None] * (NUM_HEADS * HEAD_DIM) + in_head_H[None, :]
    tl.store(out_at, out_MH.to(out.dtype.element_ty), mask=inside_MH)
