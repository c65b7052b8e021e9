"""A server whose kernels were made ahead of time asks no C compiler for Triton's module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sortserve.model.backends.triton.driver_module import prebuild_driver_module
from support.interpreter import patience

pytest.importorskip("triton")
HEADERS = Path(sysconfig.get_paths(scheme="posix_prefix")["include"], "Python.h")
pytestmark = [
    patience,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(not HEADERS.exists(), reason="Python's headers are not installed"),
]


def driver_stand_in(module: Path, folder: Path) -> None:
    """A library that has every function of the driver that the module links to."""
    undefined = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", str(module)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    names = [name for name in undefined if name.startswith("cu")]
    assert names
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}() {{ return 1; }}\n" for name in names))
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source)]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)


def without_compiler(folder: Path) -> subprocess.CompletedProcess[str]:
    cache = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "support.triton_without_compiler", str(folder)],
        env={**os.environ, **cache, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_module_made_ahead_of_time_spares_the_compiler(tmp_path: Path) -> None:
    module = prebuild_driver_module(tmp_path)
    driver_stand_in(module, tmp_path)

    done = without_compiler(tmp_path)

    offered, refusal = done.stdout.splitlines()[:2]
    assert offered == "True", done.stderr
    assert "no-such-compiler" in refusal  # anything else is compiled as ever


def test_a_module_of_another_triton_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    module = prebuild_driver_module(tmp_path)
    driver_stand_in(module, tmp_path)
    module.write_bytes(module.read_bytes()[:-1])

    done = without_compiler(tmp_path)

    assert done.returncode != 0
    assert "no-such-compiler" in done.stderr
