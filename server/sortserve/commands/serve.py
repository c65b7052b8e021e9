"""``sortserve serve``: its command line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sortserve.core.errors import ConfigError
from sortserve.process.arguments import Parser

if TYPE_CHECKING:
    from sortserve.process.config import ServeSettings
    from sortserve.process.served import Served

__all__ = ["serve_command", "serve_parser"]


def serve_parser() -> Parser:
    """Every setting as a flag, and what to do with them."""
    from sortserve.process.flags import add_flags

    parser = Parser(prog="sortserve serve", description="Serve a model over HTTP.")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and end"
    )
    parser.add_argument(
        "--yes",
        action="store_true",
        help="install the model's package without asking, if it is missing",
    )
    add_flags(parser)
    return parser


def serve_command(arguments: Sequence[str]) -> int:
    """Run a server; returns the exit code.

    Raises:
        ConfigError: a flag, variable or file is wrong, or the model's package is not to be had.
        CheckpointError: the model cannot be served.
    """
    from sortserve.process.config import load_settings, settings_yaml

    flags = vars(serve_parser().parse_args(arguments))
    print_config, yes = flags.pop("print_config"), flags.pop("yes")
    settings = load_settings(flags)
    if print_config:
        print(settings_yaml(settings), end="")
        return 0
    from sortserve.process.model_package import ensure_model_package

    ensure_model_package(settings.model, yes=yes)
    from sortserve.process.serve import serve

    if settings.replicas is None and settings.max_replicas is None:
        return serve(settings)
    require_ray()
    return serve(settings, _build_replicas)


def require_ray() -> None:
    """Raises ``ConfigError`` where Ray Serve is not installed."""
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise ConfigError(
            "--replicas needs Ray Serve, which is not installed: pip install 'sortserve[ray]'.",
            param="replicas",
        )


def _build_replicas(settings: ServeSettings) -> Served:
    from sortserve.ray.start import start_replicas  # with torch and Ray: the socket is open by now

    return start_replicas(settings)
