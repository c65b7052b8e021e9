"""Weights as they are served, kept between starts: merged, converted and quantised.

Only those that take work to make are kept: of an adapter, or quantised. A file is named
``weights-KEY-DIGEST.safetensors``. KEY stands for all that it was made from, DIGEST for its
content, which is read to the last bit before it is believed: a bit that flipped would be a model
that errs without a sign.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sortserve.checkpoint import (
    adapter,
    bnb_reader,
    gguf,
    loader,
    plain_model,
    quantize,
    shards,
    tensors,
)
from sortserve.checkpoint.layout import CheckpointLayout
from sortserve.checkpoint.quantize import NO_QUANTIZER, QUANTIZERS
from sortserve.core.cache_bound import cache_size_bytes, hold, prune
from sortserve.core.file_digests import remembered_digests
from sortserve.core.user_cache import file_digest, is_private, open_user_cache
from sortserve.model.local_shape import LocalShape
from sortserve.model.weight import Weight
from sortserve.model.weights import LayerWeights, ModelWeights

__all__ = ["KeptWeights", "WeightCache", "weight_cache"]

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Part of the key: raise it when the file changes in a way that the code below does not show."""
_MAKERS = (adapter, bnb_reader, gguf, loader, plain_model, quantize, shards, tensors)
_LIBRARIES = ("peft", "transformers", "gguf", "torch", "bitsandbytes")
_HEADER = "sortserve"
_EMBED, _NORM, _HEAD = "embed", "final_norm", "lm_head"


@dataclass(frozen=True, kw_only=True)
class KeptWeights:
    """Weights that were found in the cache."""

    weights: ModelWeights
    """On the device, without exit modules and with no frequencies yet."""
    tie_word_embeddings: bool
    """Whether the head is the embedding: what ``open_trunk`` has found out."""


@dataclass(frozen=True, kw_only=True)
class WeightCache:
    """The place in the cache of one checkpoint's weights, in one dtype and quantisation."""

    folder: Path
    key: str
    restore: Callable[[Tensor, Tensor | None, tuple[int, int]], Weight] | None
    """See ``Quantizer.restore``; None: all matrices are plain."""

    def has_some(self) -> bool:
        """Whether there are weights that may turn out to be whole. Takes no time."""
        return bool(self._found())

    def load(self, device: torch.device) -> KeptWeights | None:
        """The weights; None, and a warning, if they are damaged or not ours.

        On a CPU the matrices stay views of the file, which is mapped into memory: servers side by
        side share it, and one whose backend packs matrices of its own frees it with the last of
        them. All else is copied.
        """
        for path in self._found():
            # Locked before it is looked at: nobody removes it in between.
            is_usable = is_private(path) and hold(path)
            if is_usable and path.name == self._name(file_digest(path, is_ours=True)):
                with suppress(SafetensorError, OSError, KeyError, ValueError):
                    return self._read(path, device)
            logger.warning("%s is damaged or not ours: the weights are made again.", path)
            with suppress(OSError):
                path.unlink()
        return None

    def keep(self, weights: ModelWeights, *, tie_word_embeddings: bool) -> None:
        """Write the weights for the next start; a disk without room is a warning."""
        flat, shapes = _flattened(weights)
        num_bytes = sum(tensor.nbytes for tensor in flat.values())
        if num_bytes > cache_size_bytes():
            logger.warning("the weights (%d MiB) do not fit the cache.", num_bytes >> 20)
            return
        header = {"shapes": shapes, "tie_word_embeddings": tie_word_embeddings}
        draft: Path | None = None
        try:
            descriptor, name = tempfile.mkstemp(prefix=".writing-", dir=self.folder)
            draft = Path(name)
            with os.fdopen(descriptor, "rb") as file:
                save_file(flat, draft, metadata={_HEADER: json.dumps(header)})
                draft.chmod(0o600)
                os.fsync(file.fileno())
            kept = self.folder / self._name(file_digest(draft))
            os.replace(draft, kept)
            hold(kept)
        except (OSError, SafetensorError) as error:
            logger.warning("the weights are made at every start: no cache (%s).", error)
            if draft is not None:
                draft.unlink(missing_ok=True)
            return
        prune(self.folder)

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob(f"weights-{self.key}-*.safetensors"))

    def _name(self, digest: str) -> str:
        return f"weights-{self.key}-{digest[:32]}.safetensors"

    def _read(self, path: Path, device: torch.device) -> KeptWeights:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            header = json.loads(file.metadata()[_HEADER])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tied = bool(header["tie_word_embeddings"])
        weights = _restored(stored, header["shapes"], self.restore, device)
        return KeptWeights(weights=weights, tie_word_embeddings=tied)


def weight_cache(
    layout: CheckpointLayout,
    dtype: torch.dtype,
    device: torch.device,
    quantizer: str,
    shape: LocalShape,
) -> WeightCache | None:
    """Where the weights of a checkpoint are kept; None if they are not.

    Args:
        layout: of the checkpoint.
        dtype: in which it is served.
        device: where its matrices are quantised: each kind rounds in its own way.
        quantizer: NO_QUANTIZER or one of QUANTIZERS.
        shape: the share that the weights are: each rank keeps its own.

    Raises:
        ConfigError: ``SORTSERVE_CACHE_SIZE`` is no size.
        CheckpointError: the files of the trunk cannot be told.
    """
    cache_size_bytes()
    chosen = QUANTIZERS.get(quantizer)
    restore = chosen.restore if chosen is not None else None
    is_costly = layout.is_adapter if quantizer == NO_QUANTIZER else restore is not None
    folder = open_user_cache() if is_costly else None
    if folder is None:
        return None
    files = _sources(layout)
    if not all(file.is_file() for file in files):
        return None  # refused soon, in better words
    place = "" if chosen is None else device.type  # merged on the CPU in any case
    share = [] if shape.is_whole else [str(shape)]
    makers = [*_MAKERS, *([] if chosen is None else [inspect.getmodule(chosen.make)])]
    key = hashlib.sha256()
    for part in (
        *(_FORMAT, str(dtype), quantizer, place, *share, *map(_version, _LIBRARIES)),
        *remembered_digests(files, folder),
        *map(_source, makers),
    ):
        key.update(f"{part}\0".encode())
    return WeightCache(folder=folder, key=key.hexdigest()[:32], restore=restore)


def _sources(layout: CheckpointLayout) -> list[Path]:
    """The files that the weights are made of."""
    files: list[Path] = []
    if layout.is_adapter:
        files += [layout.own / adapter.ADAPTER_CONFIG, layout.own / adapter.ADAPTER_WEIGHTS]
    if layout.gguf is not None:
        return [*files, layout.gguf]
    return [*files, layout.model / "config.json", *tensors.safetensors_files(layout.model)]


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _source(module: ModuleType | None) -> str:
    """The code that makes weights: whoever changes it gets new ones."""
    return "" if module is None else inspect.getsource(module)


def _flattened(weights: ModelWeights) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """All tensors by name, on the CPU, and the shapes of all matrices."""
    named: dict[str, Any] = {_EMBED: weights.embed, _NORM: weights.final_norm}
    head = weights.lm_head
    if head.values.untyped_storage().data_ptr() != weights.embed.untyped_storage().data_ptr():
        named[_HEAD] = head
    elif head.values is not weights.embed:  # a rank's part of it, which the file has twice
        named[_HEAD] = Weight.plain(head.values.clone())
    for index, layer in enumerate(weights.layers):
        named.update({f"{index}.{field.name}": getattr(layer, field.name) for field in _FIELDS})
    flat: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, value in named.items():
        if isinstance(value, Weight):
            shapes[name] = list(value.shape)
            flat[f"{name}.values"] = value.values.cpu().contiguous()
            if value.scales is not None:
                flat[f"{name}.scales"] = value.scales.cpu().contiguous()
        elif value is not None:
            flat[name] = value.cpu().contiguous()
    return flat, shapes


def _restored(
    stored: dict[str, Tensor],
    shapes: dict[str, list[int]],
    restore: Callable[[Tensor, Tensor | None, tuple[int, int]], Weight] | None,
    device: torch.device,
) -> ModelWeights:
    """``_flattened`` backwards."""

    def matrix(name: str) -> Weight:
        values, scales = stored[f"{name}.values"].to(device), stored.get(f"{name}.scales")
        if restore is None:
            return Weight.plain(values)
        num_outputs, num_inputs = shapes[name]
        scales = None if scales is None else scales.to(device, copy=True)
        return restore(values, scales, (num_outputs, num_inputs))

    def tensor(name: str) -> Tensor:
        return stored[name].to(device, copy=True)

    def layer(index: int) -> LayerWeights:
        found: dict[str, Any] = {}
        for field in _FIELDS:
            name = f"{index}.{field.name}"
            if name in shapes:
                found[field.name] = matrix(name)
            elif name in stored:
                found[field.name] = tensor(name)
        return LayerWeights(**found)

    embed = tensor(_EMBED)
    num_layers = len({name.partition(".")[0] for name in shapes if name != _HEAD})
    return ModelWeights(
        embed=embed,
        layers=[layer(index) for index in range(num_layers)],
        final_norm=tensor(_NORM),
        lm_head=matrix(_HEAD) if _HEAD in shapes else Weight.plain(embed),
        inv_freq=torch.empty(0),
    )


_FIELDS: Sequence[Any] = fields(LayerWeights)
