"""The C++ kernels in tests: each instance that this machine can run, the others skipped by name."""

from __future__ import annotations

import pytest

from sortserve.model.backends.cpu.build import BuildError
from sortserve.model.backends.cpu.isa import ISA_VARIABLE, ISAS
from sortserve.model.backends.cpu.library import NativeLibrary, load_instance

__all__ = ["each_isa", "force_isa", "instance"]

each_isa = pytest.mark.parametrize("isa", list(ISAS))


def instance(isa: str) -> NativeLibrary:
    """The kernels of an instruction set; skips the test where this machine has none."""
    if not ISAS[isa].can_run():
        pytest.skip(f"{isa}: this CPU lacks {', '.join(ISAS[isa].missing_flags())}")
    try:
        return load_instance(ISAS[isa])
    except BuildError as error:
        pytest.skip(f"{isa}: {error}")


def force_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> NativeLibrary:
    """Let everything in this test use one instance; skips it where this machine has none."""
    library = instance(isa)
    monkeypatch.setenv(ISA_VARIABLE, isa)
    return library
