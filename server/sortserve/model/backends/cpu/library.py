"""The C++ kernels in ``kernels/``: compiled on first use, cached per user, called by ctypes.

The library has a plain C interface and no headers of torch, so that it compiles in seconds and
outlives torch upgrades. It takes part in the OpenMP thread pool that torch has loaded; calls
release the GIL. Where there is no compiler, or it fails, ``load_native`` says so once in the log
and returns None: the callers then use plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from sortserve.core.atomic_write import PRIVATE, write_atomically
from sortserve.core.user_cache import is_private, open_user_cache

__all__ = [
    "DTYPE_CODES",
    "BuildError",
    "NativeLibrary",
    "build_library",
    "load_native",
    "pointer",
]

logger = logging.getLogger(__name__)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The enum Dtype of ``kernels/kernels.h``."""

_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
_COMPILE_TIMEOUT_S = 300
_OPENMP_NAMES = ("libgomp", "libomp", "libiomp5")


class BuildError(Exception):
    """The kernels could not be compiled or loaded."""


class NativeLibrary:
    """The loaded kernels.

    Attributes:
        calls: how often each kernel was called, by its name without the prefix.
        has_bf16_kernels: whether this CPU has what the bf16 kernels need (AVX-512 BF16).
        attention_partition: cached tokens that one unit of attention work covers.
        fp32_panel: outputs of a panel of fp32 weights.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path.resolve()))
        except OSError as error:
            raise BuildError(f"cannot load {path}: {error}") from error
        self.calls: Counter[str] = Counter()
        self._openmp = _join_openmp(self._library)
        self.has_bf16_kernels = bool(self._library.sortserve_has_bf16_kernels())
        self.attention_partition = int(self._library.sortserve_attention_partition())
        self.fp32_panel = int(self._library.sortserve_fp32_panel())
        self._functions = {
            name: getattr(self._library, f"sortserve_{name}")
            for name in (
                *("layers", "linear", "linear_fp32", "attention"),
                *("add_rms_norm", "silu_and_mul"),
            )
        }
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


@functools.cache
def load_native() -> NativeLibrary | None:
    """The kernels for this machine, compiled now if need be; None, and a log line, if they fail."""
    try:
        return NativeLibrary(build_library())
    except (BuildError, OSError, AttributeError) as error:
        logger.warning("native CPU kernels are off, plain torch is used: %s", error)
        return None


def build_library(cache_dir: Path | None = None, compiler: str | None = None) -> Path:
    """Compile the kernels unless the cache has them, whole and as they were written.

    The digest of a library is in its name: what was cut, damaged, or put there under another name
    is removed and built again, never loaded.

    Args:
        cache_dir: default: ``user_cache_dir()``. Where it cannot be used, the library lies in a
            private folder that goes with the process.
        compiler: a command; default: ``$CXX``, else the first of g++, c++ and clang++ found.

    Raises:
        BuildError: no compiler, or it fails.
        OSError: there is no room for the library anywhere.
    """
    command = compiler or _find_compiler()
    source_dir = Path(__file__).parent / "kernels"
    key = _cache_key(source_dir, command)
    cache = open_user_cache(cache_dir)
    found = _find_library(cache, key) if cache is not None else None
    if found is not None:
        return found
    content = _compile(command, sorted(source_dir.glob("*.cpp")))
    name = _library_name(key, content)
    if cache is not None:
        try:
            write_atomically(cache / name, content, mode=PRIVATE)
        except OSError as error:
            logger.warning("native CPU kernels are compiled at every start: %s", error)
        else:
            logger.info("compiled native CPU kernels to %s", cache / name)
            return cache / name
    path = Path(_scratch().name) / name
    write_atomically(path, content, mode=PRIVATE)
    return path


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A private folder for what cannot be kept; it goes with the process."""
    return tempfile.TemporaryDirectory(prefix="sortserve-", ignore_cleanup_errors=True)


def _library_name(key: str, content: bytes) -> str:
    return f"kernels-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _find_library(cache: Path, key: str) -> Path | None:
    for path in sorted(cache.glob(f"kernels-{key}-*.so")):
        if is_private(path) and path.name == _library_name(key, path.read_bytes()):
            return path
        logger.warning("%s is damaged or not ours: the kernels are compiled again", path)
        with suppress(OSError):
            path.unlink()
    return None


def _compile(command: str, sources: list[Path]) -> bytes:
    """The compiled library, made in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="sortserve-") as folder:
        output = Path(folder) / "kernels.so"
        arguments = [command, *_FLAGS, *map(str, sources), "-o", str(output)]
        try:
            done = subprocess.run(
                arguments, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{command} did not run: {error}") from error
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            first_error = next((line for line in lines if "error" in line), lines[-1])
            raise BuildError(f"{command} failed: {first_error}")
        return output.read_bytes()


def _find_compiler() -> str:
    candidates = [os.environ.get("CXX", ""), *_COMPILERS]
    for candidate in filter(None, candidates):
        if shutil.which(candidate):
            return candidate
    raise BuildError(f"no C++ compiler found; install one of {', '.join(_COMPILERS)} or set CXX")


def _cache_key(source_dir: Path, command: str) -> str:
    """Whatever changes the machine code: sources, compiler, flags, CPU."""
    digest = hashlib.sha256()
    for path in sorted(source_dir.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + path.read_bytes())
    try:
        version = subprocess.run(
            [command, "--version"], capture_output=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command} did not run: {error}") from error
    for part in (command, *_FLAGS, torch.__version__, platform.machine(), _cpu_flags()):
        digest.update(part.encode() + b"\0")
    digest.update(version)
    return digest.hexdigest()[:20]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))


def _join_openmp(library: ctypes.CDLL) -> ctypes.CDLL | None:
    """Hand the kernels the OpenMP runtime that torch uses; without it they run on one thread."""
    path = _loaded_openmp()
    runtime = ctypes.CDLL(path) if path else None
    if runtime is None or not hasattr(runtime, "GOMP_parallel"):
        logger.warning("torch's OpenMP runtime was not found: native kernels use one thread")
        return None
    library.sortserve_set_parallel(ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p))
    return runtime


def _loaded_openmp() -> str | None:
    """The file of the OpenMP runtime in this process; torch's own first, should there be two."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    found = sorted(path for path in paths if Path(path).name.startswith(_OPENMP_NAMES))
    torch_dir = str(Path(torch.__file__).parent.parent)
    return min(found, key=lambda path: not path.startswith(torch_dir), default=None)
