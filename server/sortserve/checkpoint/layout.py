"""Which folder of a checkpoint holds what: its own, and that of the base its weights are in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from sortserve.checkpoint.adapter import ADAPTER_CONFIG, adapter_base
from sortserve.checkpoint.files import check_folder
from sortserve.checkpoint.gguf import convert_gguf
from sortserve.checkpoint.presets import Preset, find_preset
from sortserve.checkpoint.sorted_json import SORTED_JSON, SortedInfo
from sortserve.checkpoint.sources import Source, resolve_source
from sortserve.core.errors import CheckpointError

__all__ = ["CheckpointLayout", "lay_out"]


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """Which folder holds what."""

    name: str
    own: Path
    """The folder the user named: ``sorted.json``, exit modules, adapter."""
    model: Path
    """The folder with ``config.json`` and the trunk's weights; ``own``, or that of the base."""
    base: str
    """What the trunk's weights are known as, in words that find them again from anywhere: a hub
    id, ``package:PKG/FILE``, or an absolute path."""
    is_adapter: bool = False
    gguf: Path | None = None
    """The GGUF file that ``model`` was converted from."""
    has_whole_weights: bool = True
    """False: converted weights that nobody has read yet; ``lay_out`` does, or makes them anew."""
    sorted_info: SortedInfo | None = None
    preset: Preset | None = None
    """What is known of a public model that has no ``sorted.json``."""

    @property
    def is_gguf(self) -> bool:
        """Whether the trunk's weights come from a GGUF file."""
        return self.gguf is not None


def lay_out(
    found: Source,
    gguf_dtype: Callable[[], torch.dtype],
    stack: ExitStack,
    *,
    with_weights: bool = True,
) -> CheckpointLayout:
    """Find the trunk of what was named: itself, or its base.

    Args:
        found: what was named.
        gguf_dtype: what a GGUF file is converted to; only asked if need be.
        stack: on which temporary folders are kept.
        with_weights: False: of a converted GGUF file all but the weights is going to be used.

    Raises:
        CheckpointError: it is no checkpoint, or its base is missing or no plain one.
    """
    if found.is_gguf:
        trunk = convert_gguf(found.path, gguf_dtype(), stack, with_weights=with_weights)
        return CheckpointLayout(
            name=found.name,
            own=trunk.folder,
            model=trunk.folder,
            base=found.reference,
            gguf=found.path,
            has_whole_weights=trunk.has_whole_weights,
        )
    folder = found.path
    check_folder(folder)
    sorted_info = SortedInfo.read(folder)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if (folder / "config.json").is_file() and not is_adapter:
        return CheckpointLayout(
            name=found.name,
            own=folder,
            model=folder,
            base=found.reference,
            sorted_info=sorted_info,
            preset=find_preset(found.reference) if sorted_info is None else None,
        )
    base = sorted_info.base if sorted_info else None
    if is_adapter:
        named_by_adapter = adapter_base(folder)
        base = base or named_by_adapter
    if base is None:
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no config.json, no {ADAPTER_CONFIG} and no "
            f"{SORTED_JSON} that names a base."
        )
    try:
        base_source = resolve_source(base, relative_to=folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: its base is missing: {error.message}") from error
    model, has_whole_weights = base_source.path, True
    if base_source.is_gguf:
        # An adapter is merged in fp32, so its base is kept in fp32.
        base_dtype = torch.float32 if is_adapter else gguf_dtype()
        trunk = convert_gguf(base_source.path, base_dtype, stack, with_weights=with_weights)
        model, has_whole_weights = trunk.folder, trunk.has_whole_weights
    check_folder(model)
    if not (model / "config.json").is_file() or (model / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: its base {base!r} is not a plain checkpoint: a base must hold config.json "
            f"and no {ADAPTER_CONFIG}."
        )
    return CheckpointLayout(
        name=found.name,
        own=folder,
        model=model,
        base=base_source.reference,
        is_adapter=is_adapter,
        gguf=base_source.path if base_source.is_gguf else None,
        has_whole_weights=has_whole_weights,
        sorted_info=sorted_info,
    )
