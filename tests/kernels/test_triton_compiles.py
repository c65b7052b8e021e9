"""The kernels compile for GPUs that are not there: a compiler refuses what an interpreter takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.interpreter import interpreted, patience

pytestmark = [interpreted, patience]

SMALLEST_SHARED_MEMORY = 99 * 1024
"""Bytes that a program may have on every device since Ampere (compute capability 8.6, 8.9)."""


@pytest.mark.parametrize(("capability", "dtype", "head_dim"), [(90, "bf16", 128), (80, "fp32", 80)])
def test_every_kernel_compiles_and_fits_the_smallest_shared_memory(
    capability: int, dtype: str, head_dim: int, tmp_path: Path
) -> None:
    arguments = (str(capability), dtype, str(head_dim))

    done = compiled_by("compile_kernels", tmp_path, *arguments)

    assert done.returncode == 0, done.stderr[-4000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    assert len(shared) == 6
    assert max(shared.values()) <= SMALLEST_SHARED_MEMORY


@pytest.mark.parametrize(("capability", "dtype"), [(90, "bf16"), (80, "fp16")])
def test_every_variant_of_the_loss_compiles(capability: int, dtype: str, tmp_path: Path) -> None:
    done = compiled_by("compile_loss_kernels", tmp_path, str(capability), dtype)

    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) == 10


def compiled_by(module: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    tests = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([tests, environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", f"support.{module}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
