"""Where settings are read: the environment and the file, by the names that the user types."""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sortserve.core.errors import ConfigError
from sortserve.process.values import MAX_TEXT, shown
from sortserve.process.yaml_text import parse_yaml

__all__ = [
    "ENV_PREFIX",
    "FOREIGN_VARIABLES",
    "MAX_FILE_BYTES",
    "flag_name",
    "key_name",
    "read_environment",
    "read_file",
    "read_small_file",
    "variable_name",
]

ENV_PREFIX = "SORTSERVE_"
FOREIGN_VARIABLES = frozenset(
    {
        "SORTSERVE_URL",
        "SORTSERVE_CACHE_DIR",
        "SORTSERVE_CACHE_SIZE",
        "SORTSERVE_CPU_ISA",
        "SORTSERVE_KERNELS_DIR",
    }
)
"""Read elsewhere: by ``sortserve generate``, and where converted weights and kernels are kept."""
KUBERNETES_VARIABLE = re.compile(
    r"SORTSERVE(_\w+)?_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
KUBERNETES_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""What Kubernetes sets in every pod beside a Service called ``sortserve``, ``sortserve-prod`` ...:
names such as ``SORTSERVE_PROD_SERVICE_HOST``, and the values of ``SORTSERVE_PROD_PORT``."""
MAX_FILE_BYTES = 1 << 20
"""Largest file of settings, keys or certificates that is read."""


def flag_name(field: str, positional: str = "model") -> str:
    """A field as the user types it on the command line; ``positional`` is given without a name."""
    return field.upper() if field == positional else f"--{key_name(field)}"


def variable_name(field: str) -> str:
    """A field's environment variable."""
    return f"{ENV_PREFIX}{field.upper()}"


def key_name(field: str) -> str:
    """A field's key in the file."""
    return field.replace("_", "-")


def read_environment(environ: Mapping[str, str], fields: Collection[str]) -> dict[str, str]:
    """The settings among the environment variables, by field name; empty ones count as unset.

    Args:
        environ: all variables.
        fields: the names of all settings.

    Raises:
        ConfigError: a ``SORTSERVE_*`` variable is not a setting.
    """
    values = {}
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in FOREIGN_VARIABLES:
            continue
        if KUBERNETES_VARIABLE.fullmatch(variable) or KUBERNETES_ADDRESS.match(value):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in fields:
            known = [variable_name(field) for field in fields]
            raise ConfigError(
                f"environment variable {variable} is not a setting{_suggest(variable, known)}",
                param=variable,
            )
        if value:
            values[name] = value
    return values


def read_small_file(path: Path, field: str, *, errors: str = "strict") -> str:
    """The text of a regular file of at most MAX_FILE_BYTES; nothing else is so much as opened.

    Args:
        path: the file.
        field: the setting that names it.
        errors: what ``bytes.decode`` does with bytes that are not UTF-8.

    Raises:
        ConfigError: it cannot be read, is no regular file, is too large, or no UTF-8 text.
    """
    if not str(path).isprintable() or len(str(path)) > MAX_TEXT:
        raise ConfigError(f"--{key_name(field)} {shown(str(path))} names no file.", param=field)
    named = f"--{key_name(field)} {path}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ConfigError(f"{named} cannot be read: it is {kind}.", param=field)
        if status.st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{named} has more than {MAX_FILE_BYTES} bytes.", param=field)
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode(errors=errors)
    except UnicodeDecodeError:
        raise ConfigError(f"{named} cannot be read: it is not UTF-8 text.", param=field) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{named} cannot be read: {reason}.", param=field) from error


def read_file(path: Path, fields: Collection[str], command: str = "serve") -> dict[str, Any]:
    """The settings of a YAML file by field name; null counts as unset.

    Args:
        path: as in ``--config``.
        fields: the names of all settings.
        command: whose settings they are.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or has a key that is no setting
            or stands there twice.
    """
    text = read_small_file(path, "config")
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}.", param="config") from None
    if not isinstance(content, dict | None):
        raise ConfigError(
            f"--config {path} must hold `key: value` lines, not a {type(content).__name__}.",
            param="config",
        )
    values, seen = {}, set()
    for key, value in (content or {}).items():
        name = str(key).replace("-", "_")
        if name not in fields or name == "config":
            known = [key_name(field) for field in fields if field != "config"]
            raise ConfigError(
                f"unknown key {str(key)!r} in {path}{_suggest(key_name(name), known, command)}",
                param=str(key),
            )
        if name in seen:
            raise ConfigError(f"{path} has {key_name(name)} twice.", param=str(key))
        seen.add(name)
        if value is not None:
            values[name] = value
    return values


def _suggest(given: str, known: Sequence[str], command: str = "serve") -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": see `sortserve {command} --help`."
