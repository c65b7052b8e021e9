"""Makes Triton load its C module on a machine that has neither a compiler for it nor a driver.

    python -m support.triton_without_compiler FOLDER

FOLDER has the module, made ahead of time, and ``libcuda.so.1`` in the driver's place. Prints what
the module offers, and what Triton says of another module, which it would have to compile.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import triton
from triton.runtime import build

from sortserve.model.backends.triton.driver_module import use_prebuilt_driver_module


def main(folder: Path) -> None:
    os.environ["CC"] = str(folder / "no-such-compiler")
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    use_prebuilt_driver_module(folder)
    source = Path(triton.__file__).parent / "backends" / "nvidia" / "driver.c"
    arguments = {"library_dirs": [str(folder)], "libraries": ["libcuda.so.1"]}
    module = build.compile_module_from_src(source.read_text(), "cuda_utils", **arguments)
    print(hasattr(module, "load_binary"))
    try:
        build.compile_module_from_src("int x;", "another")
    except (OSError, RuntimeError) as error:
        print(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
