"""``sortserve keys``: make API keys for the file that ``serve --api-keys-file`` reads."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import dedent, indent

from sortserve.core.api_keys import NAME_PATTERN, key_digest, new_key
from sortserve.core.atomic_write import PRIVATE, write_atomically
from sortserve.core.errors import ConfigError
from sortserve.process.arguments import Parser, integer

__all__ = ["entry_text", "keys_command", "keys_parser"]

LIMITS = {
    "requests_per_minute": "requests that are let in each minute",
    "tokens_per_minute": "prompt and output tokens each minute",
    "max_concurrency": "requests under way at once",
    "max_exit_layer": "the deepest exit",
    "default_priority": "priority of requests that name none; lower goes first",
    "max_priority": "the earliest priority that counts",
}
"""Fields of an entry, and what they bound."""
HEAD = "keys:\n"
WAIT_S = 30.0
"""How long others may be adding keys in the same folder."""


def keys_parser() -> Parser:
    """The command line of ``sortserve keys``."""
    parser = Parser(
        prog="sortserve keys",
        description="Make an API key of 256 random bits. It is shown once: the file holds its "
        "SHA-256 alone.",
    )
    parser.add_argument("action", choices=("new",), help="what to do")
    parser.add_argument("name", metavar="NAME", help="whose key it is, for metrics and messages")
    parser.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help="add the entry to this file, or make the file; default: print it",
    )
    for name, help_ in LIMITS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=integer, metavar="N", help=f"{help_}; default: none"
        )
    return parser


def keys_command(arguments: Sequence[str]) -> int:
    """Make a key and print it; returns the exit code.

    The key alone goes to standard output where the entry goes to a file.

    Raises:
        ConfigError: a value is not allowed, or the file would no longer be one of keys.
        OSError: the file cannot be read or written.
    """
    options = keys_parser().parse_args(arguments)
    limits = {name: value for name in LIMITS if (value := getattr(options, name)) is not None}
    key = new_key()
    entry = entry_text(options.name, key_digest(key), limits)
    _check(HEAD + entry, "the new entry")
    if options.file is None:
        print(
            f"# {key}\n# The key, for the client; it is shown once. For the file:\n{entry.rstrip()}"
        )
        return 0
    _add(options.file, entry)
    print(key)
    print(f"{options.name} was added to {options.file}.", file=sys.stderr)
    return 0


def entry_text(name: str, digest: str, limits: Mapping[str, int]) -> str:
    """An entry of the list ``keys`` as YAML."""
    lines = [f"- name: {_quoted(name)}", f'  sha256: "{digest}"']
    lines += [f"  {field}: {value}" for field, value in limits.items()]
    return "\n".join(f"  {line}" for line in lines) + "\n"


def _quoted(name: str) -> str:
    """The name in quotes, as ``no`` and ``1e3`` are no texts in YAML."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"NAME: {name[:80]!r} is not allowed: it should be up to 64 letters, digits and any of "
            "._@/-, and begin with a letter or digit."
        )
    return f'"{name}"'


def _add(path: Path, entry: str) -> None:
    """Append an entry; the file is there whole, before or after, at every moment.

    It stays its owner's, so that a server can read what root has added.
    """
    from sortserve.process.folder_lock import folder_lock
    from sortserve.process.sources import read_small_file

    path = path.resolve()  # a link stays one
    with folder_lock(path.parent, wait_s=WAIT_S):  # of two at once, one would undo the other's
        old = path.stat() if path.exists() else None
        before = read_small_file(path, "file") if old else HEAD
        before = before.replace("\r\n", "\n")
        if before and not before.endswith("\n"):
            before += "\n"
        text = before.replace("keys: []\n", HEAD) + _indented_as(before, entry)
        _check(text, f"{path} with the new entry at its end")
        mode = old.st_mode & 0o777 if old else PRIVATE
        write_atomically(path, text.encode(), mode=mode)
        if old:
            with suppress(PermissionError):  # who may not give it away has it now
                os.chown(path, old.st_uid, old.st_gid)
        os.chmod(path, mode)


def _indented_as(before: str, entry: str) -> str:
    """The entry, as far from the margin as those that are there."""
    first = re.search(r"^( *)- ", before, re.MULTILINE)
    return entry if first is None else indent(dedent(entry), first[1])


def _check(text: str, where: str) -> None:
    """Refuse what a server would refuse."""
    from sortserve.process.api_keys import parse_keys

    parse_keys(text, where, base=1.1)
