"""The settings as a command line and as a page of documentation, read off the model's fields."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from sortserve.process.config import ServeSettings
from sortserve.process.sources import ENV_PREFIX, flag_name, key_name, variable_name

__all__ = ["add_flags", "configuration_markdown"]

GROUPS = {
    "model": "Model",
    "device": "Device",
    "replicas": "Replicas",
    "host": "Network",
    "api_key": "Security",
    "policy": "Scheduling",
    "kv_cache_memory": "KV cache",
    "max_num_queued_reqs": "Limits",
    "max_failed_steps": "Failures",
    "log_level": "Logs",
    "config": "File",
}
"""Title of the group that begins at a field."""


def _groups(
    settings: type[BaseModel], groups: Mapping[str, str]
) -> Iterator[tuple[str, list[tuple[str, FieldInfo]]]]:
    """In the order of ``groups``: fields that are inherited come first in the model."""
    fields: dict[str, list[tuple[str, FieldInfo]]] = {title: [] for title in groups.values()}
    title = ""
    for name, field in settings.model_fields.items():
        title = groups.get(name, title)
        fields[title].append((name, field))
    yield from fields.items()


def add_flags(
    parser: argparse.ArgumentParser,
    settings: type[BaseModel] = ServeSettings,
    groups: Mapping[str, str] = GROUPS,
    positional: str = "model",
) -> None:
    """Add one flag per field, and one field as the positional argument.

    Only flags that were given appear in the parsed namespace, as plain strings: their check is the
    model's, so that a value is refused in the same words from wherever it came.

    Args:
        parser: gets the flags.
        settings: whose fields they are.
        groups: title of the group that begins at a field.
        positional: the field that is given without a name.
    """
    for title, fields in _groups(settings, groups):
        group = parser.add_argument_group(title)
        for name, field in fields:
            notes = _notes(name, field, has_variable=issubclass(settings, BaseSettings))
            help_ = f"{_describe(field)} {notes}".strip().replace("%", "%%")
            if name == positional:
                group.add_argument(
                    name,
                    nargs="*" if _is_list(field) else "?",
                    default=argparse.SUPPRESS,
                    metavar=flag_name(name, positional),
                    help=help_,
                )
            elif _is_switch(field):
                group.add_argument(
                    flag_name(name, positional),
                    action=argparse.BooleanOptionalAction,
                    default=argparse.SUPPRESS,
                    help=help_,
                )
            else:
                group.add_argument(
                    flag_name(name, positional),
                    action="append" if _is_list(field) else "store",
                    default=argparse.SUPPRESS,
                    metavar=_metavar(name, field),
                    help=help_,
                )


def configuration_markdown() -> str:
    """``docs/configuration.md``."""
    lines = [DOCUMENT_HEAD]
    for title, fields in _groups(ServeSettings, GROUPS):
        lines += ["", f"## {title}", "", "| setting | values | default |", "|---|---|---|"]
        for name, field in fields:
            names = f"`{flag_name(name)}`<br>`{variable_name(name)}`"
            if _is_switch(field):
                names = f"`{flag_name(name)}`, `--no-{key_name(name)}`<br>`{variable_name(name)}`"
            lines.append(f"| {names} | {_describe(field)}{_choices(field)} | {_default(field)} |")
    return "\n".join(lines) + "\n"


def _describe(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required() or value is None or value == () or value == "":
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, ByteSize):
        return value.human_readable().replace(".0", "")
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _notes(name: str, field: FieldInfo, *, has_variable: bool) -> str:
    default = _default(field)
    notes = [f"default: {default}"] if default else []
    notes += [f"env: {variable_name(name)}"] if has_variable else []
    return f"[{'; '.join(notes)}]" if notes else ""


def _choices(field: FieldInfo) -> str:
    if get_origin(field.annotation) is not Literal:
        return ""
    return f" One of {', '.join(f'`{choice}`' for choice in get_args(field.annotation))}."


def _is_switch(field: FieldInfo) -> bool:
    return field.annotation is bool or field.annotation == bool | None


def _is_list(field: FieldInfo) -> bool:
    annotation = field.annotation
    parts = (annotation,) if get_origin(annotation) is tuple else get_args(annotation)
    return any(get_origin(_strip(part)) is tuple for part in parts)


def _strip(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _metavar(name: str, field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "{" + ",".join(get_args(field.annotation)) + "}"
    return name.rsplit("_", maxsplit=1)[-1].upper()


DOCUMENT_HEAD = f"""# Configuration

Every setting of `sortserve serve`, its flag and its environment variable. A flag wins over the
variable, the variable over the `--config` file, the file over the default.

* The file is YAML. Its keys are flag names without the dashes in front: `max-num-seqs: 64`.
* Lists are separated by commas (`--exits 9,18,30`); a flag may also be repeated.
* Sizes take a unit: `512MiB`, `2GiB`. Times are in seconds.
* Unknown flags, keys and `{ENV_PREFIX}*` variables are refused. Exceptions: `SORTSERVE_URL`, which
  is the client's; `SORTSERVE_CACHE_DIR`, the folder of converted weights and compiled
  kernels (default: `sortserve` in the user's cache folder); `SORTSERVE_CACHE_SIZE`, the most that
  this folder takes (default: `20GiB`); `SORTSERVE_CPU_ISA`, the instruction
  set of the CPU kernels (`amx`, `avx512_bf16`, `avx2` or `portable`; default: the fastest that the
  processor has); `SORTSERVE_KERNELS_DIR`, the folder of kernels that `sortserve kernels --output`
  compiled ahead of time; and what Kubernetes sets for Services called `sortserve` or
  `sortserve-NAME` (`SORTSERVE_NAME_SERVICE_HOST`, `SORTSERVE_NAME_PORT_8000_TCP_ADDR` and the like,
  and any value that begins with `tcp://`).
* `sortserve serve --print-config` shows what was resolved. Keys are never shown.

This page is generated: `make docs`."""

if __name__ == "__main__":
    print(configuration_markdown(), end="")
