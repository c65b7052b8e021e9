"""The C++ kernels in ``kernels/``, called by ctypes.

The library has a plain C interface and no headers of torch, so that it compiles in seconds and
outlives torch upgrades. It has threads of its own beside torch's OpenMP pool
(``kernels/parallel.h``), which sleep when there is nothing to do; calls release the GIL. There is
one for each instruction set (``isa.py``), prebuilt or compiled on first use (``build.py``); several
can be loaded side by side. Where there is none and none can be compiled, ``load_native`` says so
once in the log and returns None: the callers then use plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from sortserve.core.errors import ConfigError
from sortserve.model.backends.cpu.build import BuildError, find_library
from sortserve.model.backends.cpu.isa import ISA_VARIABLE, Isa, forced_isa, runnable_isas

__all__ = ["DTYPE_CODES", "NativeLibrary", "load_instance", "load_native", "pointer"]

logger = logging.getLogger(__name__)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The enum Dtype of ``kernels/kernels.h``."""

_loading = threading.Lock()


class NativeLibrary:
    """The loaded kernels.

    Args:
        path: the compiled library.
        isa: the instruction set that it was compiled for.

    Attributes:
        isa: its name.
        calls: how often each kernel was called, by its name without the prefix.
        attention_partition: cached tokens that one unit of attention work covers.

    Raises:
        BuildError: it is no library of these kernels, or they may not run here.
    """

    def __init__(self, path: Path, isa: Isa) -> None:
        self.isa = isa.name
        self.calls: Counter[str] = Counter()
        try:
            self._library = ctypes.CDLL(str(path.resolve()))
            if not self._library.sortserve_enable():
                raise BuildError(f"the operating system grants no {isa.name} to this process")
            self.attention_partition = int(self._library.sortserve_attention_partition())
            self._functions = {
                name: getattr(self._library, f"sortserve_{name}")
                for name in (
                    *("layers", "linear", "linear_fp32", "linear_int8", "pack_int8", "packed_rows"),
                    "attention",
                    *("add_rms_norm", "silu_and_mul"),
                    *("draw_tokens", "log_sum_exp", "block_maxima", "apply_bitmasks"),
                )
            }
        except (OSError, AttributeError) as error:
            raise BuildError(f"cannot load {path}: {error}") from error
        for function in self._functions.values():
            function.restype = None

    def call(self, name: str, *arguments: ctypes.Structure) -> None:
        """Call a kernel with pointers to its argument structures."""
        self.calls[name] += 1
        self._functions[name](*map(ctypes.byref, arguments))


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous CPU tensor, or a null pointer."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()


def load_native() -> NativeLibrary | None:
    """The kernels that ``SORTSERVE_CPU_ISA`` asks for, else the fastest for this CPU.

    Without that variable an instruction set whose library cannot be had is passed over, with a
    line in the log; None if there is none at all.

    Raises:
        ConfigError: what the variable asks for does not exist, cannot run here or cannot be had.
    """
    isa = forced_isa()
    try:
        with _loading:  # who asks while another thread compiles waits for that
            return _load_fastest() if isa is None else load_instance(isa)
    except (BuildError, OSError) as error:
        assert isa is not None
        raise ConfigError(
            f"{ISA_VARIABLE}={isa.name!r}: there are no kernels for it: {error}", param=ISA_VARIABLE
        ) from error


@functools.cache
def load_instance(isa: Isa) -> NativeLibrary:
    """The kernels for one instruction set, compiled now if need be.

    Args:
        isa: one that ``can_run`` here: the processor ends the process otherwise.

    Raises:
        BuildError: there are none, and none can be compiled.
        OSError: there is no room for them anywhere.
    """
    assert isa.can_run()
    return NativeLibrary(find_library(isa), isa)


@functools.cache
def _load_fastest() -> NativeLibrary | None:
    faults: dict[str, str] = {}
    for isa in runnable_isas():
        try:
            library = load_instance(isa)
        except (BuildError, OSError) as error:
            faults[isa.name] = str(error)
            continue
        for name, fault in faults.items():
            logger.warning("CPU kernels for %s are not used: %s", name, fault)
        return library
    text = "; ".join(dict.fromkeys(faults.values()))
    logger.warning("native CPU kernels are off, plain torch is used: %s", text)
    return None
