"""Compiles the kernels of the trainer's loss for a GPU that need not be there.

    python -m support.compile_loss_kernels 90 bf16

prints the number of variants that were compiled. Triton must not be interpreting.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sortserve_trainer.model.loss_kernel import losses_kernel, lse_kernel
from sortserve_trainer.model.loss_rows import NUM_WARPS, TILE

TYPES = {
    **dict.fromkeys(("bias", "teacher_lse", "lse", "ce", "kl", "divisor"), "*fp32"),
    **dict.fromkeys(("ce_weight", "kl_weight"), "fp32"),
    **dict.fromkeys(("num_columns", "stride", "teacher_stride"), "i32"),
    "targets": "*i64",
}
"""Of arguments; what is not here is logits."""


def compile_for(kernel: Any, capability: int, dtype: str, **flags: bool) -> None:
    """One variant; an argument that it has no use for is None, as it is when it is called."""
    names = kernel.arg_names
    constants: dict[str, Any] = {"TILE": TILE, **flags}
    absent = {
        "HAS_BIAS": ["bias"],
        "DISTILS": ["teacher", "teacher_lse"],
        "WANTS_GRAD": ["divisor"],
    }
    for flag, given in flags.items():
        if not given:
            constants |= dict.fromkeys(absent[flag])
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}") for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS}
    )


if __name__ == "__main__":
    target, dtype = int(sys.argv[1]), sys.argv[2]
    count = 0
    for bias, distils, grad in itertools.product((False, True), repeat=3):
        compile_for(losses_kernel, target, dtype, HAS_BIAS=bias, DISTILS=distils, WANTS_GRAD=grad)
        count += 1
    for bias in (False, True):
        compile_for(lse_kernel, target, dtype, HAS_BIAS=bias)
        count += 1
    print(count)
