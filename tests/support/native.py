"""The C++ kernels in tests: each instance that this machine can run, the others skipped by name."""

from __future__ import annotations

import pytest

from sortserve.model.backends.cpu.build import BuildError
from sortserve.model.backends.cpu.isa import ISA_VARIABLE, ISAS, Isa
from sortserve.model.backends.cpu.library import NativeLibrary, load_instance

__all__ = ["INSTANCES", "each_isa", "force_isa", "instance"]

AMX_EMULATED = Isa(
    "amx_emulated",
    (*ISAS["avx2"].compiler_flags, "-DSORTSERVE_EMULATE_AMX"),
    ISAS["avx2"].cpu_flags,
    ISAS["avx2"].machines,
)
"""The tiles of AMX with plain loops for its instructions, for CPUs that have none."""

INSTANCES = {**ISAS, AMX_EMULATED.name: AMX_EMULATED}
each_isa = pytest.mark.parametrize("isa", list(INSTANCES))


def instance(isa: str) -> NativeLibrary:
    """The kernels of an instruction set; skips the test where this machine has none."""
    if not INSTANCES[isa].can_run():
        pytest.skip(f"{isa}: this CPU lacks {', '.join(INSTANCES[isa].missing_flags())}")
    if isa == AMX_EMULATED.name and ISAS["amx"].can_run():
        pytest.skip(f"{isa}: this CPU has the instructions themselves")
    try:
        return load_instance(INSTANCES[isa])
    except BuildError as error:
        pytest.skip(f"{isa}: {error}")


def force_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> NativeLibrary:
    """Let everything in this test use one instance; skips it where this machine has none."""
    library = instance(isa)
    monkeypatch.setitem(ISAS, isa, INSTANCES[isa])
    monkeypatch.setenv(ISA_VARIABLE, isa)
    return library
