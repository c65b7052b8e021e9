"""The C module through which Triton speaks to a GPU's driver, compiled ahead of time.

Triton compiles its kernels itself, but asks a C compiler for one module (``driver.c``) when it
first meets a device. A module that was made in the building of an image, without a GPU or its
driver, spares the image that compiler. Triton has a hook for it (``triton.knobs.build.impl``).

Triton before 3.7 compiles C for every kernel, too, and needs a compiler all the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sortserve.core.atomic_write import write_atomically
from sortserve.model.backends.cpu.build import BuildError, run_compiler

__all__ = ["prebuild_driver_module", "use_prebuilt_driver_module"]

_COMPILERS = ("gcc", "clang", "cc")
_DRIVER = "libcuda.so.1"


def prebuild_driver_module(folder: Path) -> Path:
    """Compile the module of the installed Triton into a folder; older ones there are removed.

    Args:
        folder: made if need be.

    Raises:
        BuildError: no Triton, no C compiler, or it fails.
        OSError: the folder cannot be written.
    """
    source = _source()
    if source is None:
        raise BuildError("Triton is not installed: pip install 'sortserve[triton]'")
    content = _compile(source)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(source.read_bytes(), content)
    write_atomically(path, content)
    for other in folder.glob("triton-*.so"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def use_prebuilt_driver_module(folder: Path) -> None:
    """Let Triton take its module from a folder, if the right one is there. Loads Triton."""
    source = _source()
    if source is None or _find(folder, source.read_bytes()) is None:
        return
    from triton import knobs
    from triton.runtime import build

    def impl(name: str, src: str, srcdir: str, *arguments: Any) -> str:
        found = _find(folder, Path(src).read_bytes())
        if found is not None:
            return str(found)
        hook, knobs.build.impl = knobs.build.impl, None  # anything else is compiled as ever
        try:
            compile_it: Callable[..., str] = build._build
            return compile_it(name, src, srcdir, *arguments, [])
        finally:
            knobs.build.impl = hook

    knobs.build.impl = impl


def _source() -> Path | None:
    """``driver.c`` of the installed Triton, which is not loaded."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "driver.c"
    return path if path.is_file() else None


def _find(folder: Path, source: bytes) -> Path | None:
    """What was made of a source for this Python, whole."""
    for path in sorted(folder.glob("triton-*.so")):
        if path.name == _name(source, path.read_bytes()):
            return path
    return None


def _name(source: bytes, content: bytes) -> str:
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    key = hashlib.sha256(source + suffix.encode()).hexdigest()[:20]
    return f"triton-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _compile(source: Path) -> bytes:
    """With an empty library in the driver's place: the real one is found by name at run time."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise BuildError(f"no C compiler found; install one of {', '.join(_COMPILERS)} or set CC")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's
    include = [source.parent / "include", Path(sysconfig.get_paths(scheme=scheme)["include"])]
    shared = [compiler, "-O3", "-shared", "-fPIC", "-w"]
    with tempfile.TemporaryDirectory(prefix="sortserve-") as folder:
        empty, driver, output = (Path(folder) / n for n in ("empty.c", _DRIVER, "module.so"))
        empty.touch()
        includes = [f"-I{path}" for path in include]
        link = ["-L", folder, f"-l:{_DRIVER}"]
        run_compiler([*shared, str(empty), f"-Wl,-soname,{_DRIVER}", "-o", str(driver)])
        # The empty library defines nothing that is used, and must be needed all the same.
        run_compiler(
            [*shared, str(source), *includes, "-Wl,--no-as-needed", *link, "-o", str(output)]
        )
        return output.read_bytes()
