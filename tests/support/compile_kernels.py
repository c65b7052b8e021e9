"""Compiles the Triton kernels for a GPU that need not be there, and says what they need of it.

    python -m support.compile_kernels 90 bf16 128

prints a JSON object: the bytes of shared memory of each kernel, for compute capability 9.0, pages
in bfloat16 and a head_dim of 128. Triton must not be interpreting.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sortserve.model.backends.triton.kernels.attention import (
    combine_kernel,
    decode_kernel,
    prefill_kernel,
)
from sortserve.model.backends.triton.kernels.heads import rotate_and_write_kernel
from sortserve.model.backends.triton.kernels.rows import add_rms_norm_kernel, silu_and_mul_kernel
from sortserve.model.backends.triton.tiles import SMALLEST_DOT, next_power_of_two, tiles_for

KERNELS = (
    add_rms_norm_kernel,
    silu_and_mul_kernel,
    rotate_and_write_kernel,
    decode_kernel,
    combine_kernel,
    prefill_kernel,
)
ITEMSIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
TYPES = {
    **dict.fromkeys(("eps", "scale"), "fp32"),
    **dict.fromkeys(("cos", "sin", "part_out", "part_sums"), "*fp32"),
    **dict.fromkeys(("block_tables", "context_lens", "query_starts"), "*i32"),
    **dict.fromkeys(("positions", "slots"), "*i64"),
    **dict.fromkeys(("plane_stride",), "i64"),
    **dict.fromkeys(("slots_stride", "slab", "num_rows", "num_tokens", "num_blocks"), "i32"),
    **dict.fromkeys(("table_rows", "table_stride"), "i32"),
}
"""Of arguments; what is not here is a tensor in the model's dtype."""


def shared_memory(kernel: Any, capability: int, dtype: str, head_dim: int) -> int:
    """Bytes that a program of the kernel takes, with the tiles that are used."""
    tiles = tiles_for(head_dim, ITEMSIZES[dtype], multiprocessors=100)
    sizes: dict[str, Any] = {
        "HAS_DELTA": True,
        "HAS_NORMS": True,
        "WIDTH": 3000,
        "PADDED_WIDTH": 4096,
        "ROWS": tiles.rows,
        "COLUMNS": 1024,
        "NUM_HEADS": 28,
        "NUM_KV_HEADS": 4,
        "HEAD_DIM": head_dim,
        "PADDED_HALF": next_power_of_two(head_dim // 2),
        "PADDED_HEAD_DIM": next_power_of_two(max(SMALLEST_DOT, head_dim)),
        "PADDED_GROUP": SMALLEST_DOT,
        "BLOCK_SIZE": 16,
        "HEADS": tiles.heads,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "SPLITS": 8,
    }
    names = kernel.arg_names
    constants = {name: sizes[name] for name in names if name in sizes}
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}") for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_stages": tiles.num_stages},
    )
    return int(compiled.metadata.shared)


if __name__ == "__main__":
    capability, dtype, head_dim = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    print(json.dumps({k.__name__: shared_memory(k, capability, dtype, head_dim) for k in KERNELS}))
