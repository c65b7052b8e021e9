"""``sortserve kernels``: compile the CPU kernels ahead of time, as in the making of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sortserve.core.errors import ConfigError
from sortserve.model.backends.kernels import (
    ISAS,
    KERNELS_DIR_VARIABLE,
    BuildError,
    Isa,
    prebuild,
    prebuild_driver_module,
    prebuilt_dir,
)
from sortserve.process.arguments import Parser

__all__ = ["compile_kernels", "kernels_command", "kernels_parser"]

ALL = "all"


def kernels_parser() -> Parser:
    """The command line of ``sortserve kernels``."""
    parser = Parser(
        prog="sortserve kernels",
        description="Compile the CPU kernels ahead of time: a server that finds them needs no "
        "compiler.",
    )
    parser.add_argument(
        "--isa",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"{', '.join(ISAS)}, or {ALL} (default): every one that there is for this kind of "
        "machine",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: where the server looks (env: SORTSERVE_KERNELS_DIR, else in the package)",
    )
    parser.add_argument(
        "--triton",
        action="store_true",
        help="also the C module through which Triton speaks to a GPU's driver; no GPU is needed",
    )
    return parser


def kernels_command(arguments: Sequence[str]) -> int:
    """Run ``sortserve kernels``; returns the exit code.

    Raises:
        ConfigError: see ``compile_kernels``.
    """
    options = kernels_parser().parse_args(arguments)
    return compile_kernels(options.isa or [ALL], options.output, triton=options.triton)


def compile_kernels(names: Sequence[str], output: Path | None, *, triton: bool = False) -> int:
    """Compile instances, and say where they lie; returns the exit code.

    Args:
        names: of instruction sets; or ``all``: those that compilers for this machine know.
        output: default: where the server looks for them.
        triton: also the module that Triton asks a C compiler for.

    Raises:
        ConfigError: a name is unknown or of another kind of machine, there is no compiler, or the
            folder cannot be written.
    """
    isas = _isas(names)
    folder = prebuilt_dir() if output is None else output.resolve()
    for isa in isas:
        _make(isa.name, f"--isa {isa.name}", folder, partial(prebuild, isa))
    if triton:
        _make("triton", "--triton", folder, prebuild_driver_module)
    if folder != prebuilt_dir():
        print(f"The server finds them with {KERNELS_DIR_VARIABLE}={folder}")
    return 0


def _make(name: str, flag: str, folder: Path, make: Callable[[Path], Path]) -> None:
    try:
        path = make(folder)
    except BuildError as error:
        raise ConfigError(f"{flag}: {error}", param=flag.split()[0].lstrip("-")) from error
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error.strerror or error}. --output names another "
            "folder.",
            param="output",
        ) from error
    print(f"{name}: {path}")


def _isas(names: Sequence[str]) -> list[Isa]:
    known = {name: isa for name, isa in ISAS.items() if isa.can_be_compiled()}
    unknown = next((name for name in names if name not in {ALL, *known}), None)
    if unknown is not None:
        fault = "is of another kind of machine" if unknown in ISAS else "is no instruction set"
        raise ConfigError(
            f"--isa {unknown} {fault}; here it may be {', '.join([ALL, *known])}.", param="isa"
        )
    return list(known.values() if ALL in names else {name: known[name] for name in names}.values())
