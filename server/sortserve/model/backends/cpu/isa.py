"""Instruction sets that the C++ kernels are compiled for, and the choice among them.

One source, one library for each: an instance is a line of this table and, where its instructions
need code of their own, a part of ``kernels/vec.h`` and ``kernels/tile.h``.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from sortserve.core.errors import ConfigError

__all__ = ["ISAS", "ISA_VARIABLE", "Isa", "forced_isa", "runnable_isas"]

ISA_VARIABLE = "SORTSERVE_CPU_ISA"

_X86 = frozenset({"x86_64", "amd64"})


@dataclass(frozen=True)
class Isa:
    """An instruction set.

    Attributes:
        name: what ``SORTSERVE_CPU_ISA`` calls it.
        compiler_flags: of GCC and clang.
        cpu_flags: what ``/proc/cpuinfo`` must list for its code to run.
        machines: what ``platform.machine()`` may be, in lower case; None: anything.
    """

    name: str
    compiler_flags: tuple[str, ...] = ()
    cpu_flags: frozenset[str] = frozenset()
    machines: frozenset[str] | None = None

    def can_be_compiled(self) -> bool:
        """Whether compilers for this kind of machine know it."""
        return self.machines is None or platform.machine().lower() in self.machines

    def missing_flags(self) -> list[str]:
        """What this CPU lacks of ``cpu_flags``."""
        return sorted(self.cpu_flags - _cpu_flags())

    def can_run(self) -> bool:
        """Whether this CPU can run it."""
        return self.can_be_compiled() and not self.missing_flags()


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AMX = frozenset({"amx_tile", "amx_bf16", "amx_int8", "avx512vbmi"})
_AMX_CODE = ("-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512vbmi")
_AVX512_BF16 = _AVX2 | {
    *("abm", "bmi1", "bmi2", "movbe"),
    *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    *("avx512_bf16", "avx512_vnni"),
}
_AVX512_BF16_CODE = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")

ISAS = {
    isa.name: isa
    for isa in (
        Isa("amx", (*_AVX512_BF16_CODE, *_AMX_CODE), _AVX512_BF16 | _AMX, _X86),
        Isa("avx512_bf16", _AVX512_BF16_CODE, _AVX512_BF16, _X86),
        Isa("avx2", ("-mavx2", "-mfma", "-mf16c"), _AVX2, _X86),
        Isa("portable"),
    )
}
"""All there are, the fastest first. ``portable`` asks nothing beyond the compiler's baseline."""


def runnable_isas() -> list[Isa]:
    """Those that this CPU can run, the fastest first."""
    return [isa for isa in ISAS.values() if isa.can_run()]


def forced_isa() -> Isa | None:
    """The instruction set that ``SORTSERVE_CPU_ISA`` asks for; None if it asks for none.

    Raises:
        ConfigError: there is none of this name, or this CPU cannot run it.
    """
    name = os.environ.get(ISA_VARIABLE)
    if not name:
        return None
    isa = ISAS.get(name)
    if isa is not None and isa.can_run():
        return isa
    if isa is None:
        fault = "is no instruction set that there are kernels for"
    elif not isa.can_be_compiled():
        fault = f"cannot run on this CPU, which is of kind {platform.machine()}"
    else:
        fault = f"cannot run on this CPU, which lacks {', '.join(isa.missing_flags())}"
    names = ", ".join(isa.name for isa in runnable_isas())
    raise ConfigError(
        f"{ISA_VARIABLE}={name!r} {fault}. Here it may be {names}.", param=ISA_VARIABLE
    )


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """What the processor and the operating system offer; empty where nobody says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return frozenset(next(listed, ()))
