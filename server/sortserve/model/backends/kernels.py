"""The C++ kernels for CPUs, as the rest of the server sees them: whether there are any, and their
making ahead of time; with it that of the module through which Triton speaks to a GPU.
"""

from __future__ import annotations

from contextlib import suppress
from threading import Thread

from sortserve.core.errors import ConfigError
from sortserve.model.backends.cpu.build import (
    KERNELS_DIR_VARIABLE,
    BuildError,
    prebuild,
    prebuilt_dir,
)
from sortserve.model.backends.cpu.isa import ISA_VARIABLE, ISAS, Isa, runnable_isas
from sortserve.model.backends.cpu.library import load_native
from sortserve.model.backends.triton.driver_module import prebuild_driver_module

__all__ = [
    "ISAS",
    "ISA_VARIABLE",
    "KERNELS_DIR_VARIABLE",
    "BuildError",
    "Isa",
    "cpu_isa",
    "has_bf16_products",
    "prebuild",
    "prebuild_driver_module",
    "prebuilt_dir",
    "start_compiling",
]


def cpu_isa() -> str | None:
    """The instruction set of the kernels that are used on this CPU; None: there are no kernels.

    Raises:
        ConfigError: ``SORTSERVE_CPU_ISA`` asks for what does not exist or cannot be had here.
    """
    library = load_native()
    return None if library is None else library.isa


def has_bf16_products() -> bool:
    """Whether this processor multiplies bfloat16, which PyTorch would have to imitate elsewhere."""
    return any(isa.name in ("amx", "avx512_bf16") for isa in runnable_isas())


def start_compiling() -> None:
    """Let the kernels be made, if they must be, while the caller does something else.

    Whoever asks for them meanwhile waits, and is told what went wrong.
    """

    def compile_them() -> None:
        with suppress(ConfigError):
            load_native()

    Thread(target=compile_them, name="kernels", daemon=True).start()
