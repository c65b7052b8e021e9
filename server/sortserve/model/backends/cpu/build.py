"""From the C++ sources in ``kernels/`` to a library: prebuilt, in the cache, or compiled now.

A library is a file ``kernels-ISA-KEY-DIGEST.so``. KEY stands for all that it was made from, DIGEST
for its content: what was cut, damaged, or put there under another name is never loaded.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from sortserve.core.atomic_write import PRIVATE, write_atomically
from sortserve.core.cache_bound import hold, prune
from sortserve.core.user_cache import is_private, open_user_cache
from sortserve.model.backends.cpu.isa import Isa
from sortserve.telemetry.status_line import phase, phase_over

__all__ = [
    "KERNELS_DIR_VARIABLE",
    "BuildError",
    "build_library",
    "find_library",
    "prebuild",
    "prebuilt_dir",
    "run_compiler",
]

logger = logging.getLogger(__name__)

KERNELS_DIR_VARIABLE = "SORTSERVE_KERNELS_DIR"

_SOURCES = Path(__file__).parent / "kernels"
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w")
_COMPILE_TIMEOUT_S = 300


class BuildError(Exception):
    """The kernels could not be compiled or loaded."""


def find_library(isa: Isa) -> Path:
    """The library of an instruction set: prebuilt if there is one, else as ``build_library`` says.

    Raises:
        BuildError: there is none, and no compiler either, or it fails.
        OSError: there is no room for it anywhere.
    """
    return _find_prebuilt(prebuilt_dir(), isa) or build_library(isa)


# ---- prebuilt


def prebuilt_dir() -> Path:
    """``SORTSERVE_KERNELS_DIR``, else a folder inside this package."""
    named = os.environ.get(KERNELS_DIR_VARIABLE)
    return Path(named).expanduser() if named else Path(__file__).parent / "prebuilt"


def prebuild(isa: Isa, folder: Path, compiler: str | None = None) -> Path:
    """Compile an instance into a folder, where servers find it without a compiler.

    Older libraries of this instruction set in the folder are removed.

    Args:
        isa: one that ``can_be_compiled``; this CPU need not be able to run it.
        folder: made if need be.
        compiler: see ``build_library``.

    Raises:
        BuildError: no compiler, or it fails.
        OSError: the folder cannot be written.
    """
    content = _compile(compiler or _find_compiler(), isa)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _library_name(isa, _source_key(isa), content)
    write_atomically(path, content)
    for other in _libraries(folder, isa):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def _find_prebuilt(folder: Path, isa: Isa) -> Path | None:
    # Whoever can write here can write to the package or to our environment: the digest is against
    # damage and old sources alone.
    key = _source_key(isa)
    found = list(_libraries(folder, isa))
    for path in found:
        if path.name == _library_name(isa, key, path.read_bytes()):
            return path
    if found:
        logger.warning(
            "the prebuilt %s kernels in %s are damaged or of another version of the sources, and "
            "are not used: run `sortserve kernels` again",
            *(isa.name, folder),
        )
    return None


# ---- cached or compiled


def build_library(isa: Isa, cache_dir: Path | None = None, compiler: str | None = None) -> Path:
    """Compile the kernels unless the cache has them, whole and as they were written.

    Args:
        isa: for which CPUs.
        cache_dir: default: ``user_cache_dir()``. Where it cannot be used, the library lies in a
            private folder that goes with the process.
        compiler: a command; default: ``$CXX``, else the first of g++, c++ and clang++ found.

    Raises:
        BuildError: no compiler, or it fails.
        OSError: there is no room for the library anywhere.
    """
    command = compiler or _find_compiler()
    key = _cache_key(isa, command)
    cache = open_user_cache(cache_dir)
    found = _find_cached(cache, isa, key) if cache is not None else None
    if found is not None:
        return found
    compiling = f"compiling the CPU kernels for {isa.name}, once, some 20 s"
    logger.info("%s", compiling, extra=phase(compiling))
    content = _compile(command, isa)
    name = _library_name(isa, key, content)
    if cache is not None:
        try:
            write_atomically(cache / name, content, mode=PRIVATE)
        except OSError as error:
            logger.warning(
                "native CPU kernels are compiled at every start: %s",
                error,
                extra=phase_over(compiling),
            )
        else:
            logger.info(
                "compiled native CPU kernels to %s", cache / name, extra=phase_over(compiling)
            )
            hold(cache / name)
            prune(cache)
            return cache / name
    path = Path(_scratch().name) / name
    write_atomically(path, content, mode=PRIVATE)
    return path


def _find_cached(cache: Path, isa: Isa, key: str) -> Path | None:
    for path in _libraries(cache, isa, key):
        if is_private(path) and path.name == _library_name(isa, key, path.read_bytes()):
            hold(path)
            return path
        logger.warning("%s is damaged or not ours: the kernels are compiled again", path)
        with suppress(OSError):
            path.unlink()
    return None


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A private folder for what cannot be kept; it goes with the process."""
    return tempfile.TemporaryDirectory(prefix="sortserve-", ignore_cleanup_errors=True)


# ---- names


def _libraries(folder: Path, isa: Isa, key: str = "*") -> Iterator[Path]:
    return iter(sorted(folder.glob(f"kernels-{isa.name}-{key}-*.so")))


def _library_name(isa: Isa, key: str, content: bytes) -> str:
    return f"kernels-{isa.name}-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _source_key(isa: Isa) -> str:
    """Whatever the sources and flags say about the machine code."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + path.read_bytes())
    for part in (*_FLAGS, *isa.compiler_flags, platform.machine()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _cache_key(isa: Isa, command: str) -> str:
    """The same, and the compiler."""
    try:
        version = subprocess.run(
            [command, "--version"], capture_output=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command} did not run: {error}") from error
    parts = (_source_key(isa).encode(), command.encode(), version)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


# ---- the compiler


def _compile(command: str, isa: Isa) -> bytes:
    """The compiled library, made in a temporary folder."""
    sources = map(str, sorted(_SOURCES.glob("*.cpp")))
    with tempfile.TemporaryDirectory(prefix="sortserve-") as folder:
        output = Path(folder) / "kernels.so"
        arguments = [command, *_FLAGS, *isa.compiler_flags, *sources, "-o", str(output)]
        run_compiler(arguments)
        return output.read_bytes()


def run_compiler(arguments: Sequence[str]) -> None:
    """Run a compiler, the first of ``arguments``, to its end.

    Raises:
        BuildError: it does not run, takes too long, or fails.
    """
    command = arguments[0]
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


def _find_compiler() -> str:
    candidates = [os.environ.get("CXX", ""), *_COMPILERS]
    for candidate in filter(None, candidates):
        if shutil.which(candidate):
            return candidate
    raise BuildError(f"no C++ compiler found; install one of {', '.join(_COMPILERS)} or set CXX")
