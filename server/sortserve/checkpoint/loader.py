"""Reading a checkpoint's tensors and fusing them as the decoder wants them.

Names, shapes and dtypes are checked against the architecture before the first tensor is read, so
that a bad checkpoint is refused in milliseconds and by the name of what is wrong.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sortserve.checkpoint.families import tensor_shapes
from sortserve.checkpoint.files import check_regular, read_json
from sortserve.core.errors import CheckpointError
from sortserve.model.config import ModelConfig
from sortserve.model.weight import Weight
from sortserve.model.weights import LayerWeights, ModelWeights

__all__ = [
    "SafetensorsReader",
    "StateDictReader",
    "TensorReader",
    "check_tensors",
    "load_weights",
    "open_trunk",
    "safetensors_files",
]

logger = logging.getLogger(__name__)

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16", "F64")
_IGNORED = ("lm_head.weight", "rotary_emb.inv_freq")
_EMBED, _HEAD, _PREFIX = "model.embed_tokens.weight", "lm_head.weight", "model."


class TensorReader(Protocol):
    """Named tensors whose shapes are known before they are read."""

    @property
    def origin(self) -> str:
        """Where the tensors come from, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor there is."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in."""
        ...


class StateDictReader:
    """Tensors that are in memory already (a merged adapter)."""

    def __init__(self, state_dict: Mapping[str, Tensor], origin: str) -> None:
        self._state_dict = state_dict
        self.origin = origin
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, as it is."""
        return self._state_dict[name]


class SafetensorsReader:
    """The tensors of one or several safetensors files, mapped into memory, read one by one.

    A context manager; opening checks that every file is whole.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or holds a tensor that
            is not floating point.
    """

    def __init__(self, files: Iterable[Path], origin: str) -> None:
        self.origin = origin
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._holders: dict[str, Any] = {}
        self._stack = ExitStack()
        try:
            for file in files:
                self._open(file)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, file: Path) -> None:
        if not os.path.lexists(file):
            raise CheckpointError(f"{self.origin}: the weights file {file.name} is missing.")
        check_regular(file)
        try:
            holder = self._stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.origin}: {file.name} is truncated or not a safetensors file ({error})."
            ) from error
        for name in holder.keys():  # noqa: SIM118 (not a mapping)
            entry = holder.get_slice(name)
            if entry.get_dtype() not in _FLOATS:
                raise CheckpointError(
                    f"{self.origin}: tensor {name} in {file.name} is {entry.get_dtype()}; "
                    f"supported: {', '.join(_FLOATS)}."
                )
            self.shapes[name] = tuple(entry.get_shape())
            self._holders[name] = holder

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it is stored in."""
        tensor: Tensor = self._holders[name].get_tensor(name)
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


class _Renamed:
    """Tensors under other names than they are stored under."""

    def __init__(self, reader: TensorReader, stored: Mapping[str, str]) -> None:
        self._reader = reader
        self._stored = stored
        self.origin = reader.origin
        self.shapes = {name: reader.shapes[stored[name]] for name in stored}

    def read(self, name: str) -> Tensor:
        """One tensor, by its full name."""
        return self._reader.read(self._stored[name])


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: one, or those its index names.

    As in transformers, the one file goes before an index, which must be sound all the same.

    Raises:
        CheckpointError: there are none, or the index is corrupted.
    """
    has_index = os.path.lexists(folder / _INDEX)
    shards = _indexed_files(folder / _INDEX) if has_index else []
    if os.path.lexists(folder / _WEIGHTS):
        return [folder / _WEIGHTS]
    if has_index:
        return [folder / name for name in shards]
    hint = ""
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        hint = " Pickled weights (.bin, .pth) are not read: convert them to safetensors."
    raise CheckpointError(f"{folder}: no weights: neither {_WEIGHTS} nor {_INDEX} is there.{hint}")


def _indexed_files(index: Path) -> list[str]:
    """The shards an index names; transformers, too, looks for every tensor in all of them."""
    document = read_json(index)
    for name in ("metadata", "weight_map"):
        if not isinstance(document.get(name), dict):
            raise CheckpointError(
                f"{index} is corrupted: {name}={document.get(name)!r} is not an object."
            )
    weight_map = document["weight_map"]
    if not weight_map:
        raise CheckpointError(f"{index} is corrupted: weight_map names no tensor.")
    for tensor, name in weight_map.items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or ".." in parts or PurePosixPath(name).suffix != ".safetensors":
            raise CheckpointError(
                f"{index} is corrupted: weight_map.{tensor}={name!r} is no .safetensors file "
                "of the folder."
            )
        if PurePosixPath(name).is_absolute():
            raise CheckpointError(f"{index}: weight_map.{tensor}={name!r} leaves the folder.")
    return sorted(set(weight_map.values()))


@contextmanager
def open_trunk(folder: Path, config: ModelConfig) -> Iterator[tuple[TensorReader, ModelConfig]]:
    """The checked tensors of a folder under their full names, and the architecture they make.

    Two liberties that files take are understood as transformers understands them: the prefix
    ``model.`` may be missing, and where ``tie_word_embeddings`` is set the one matrix may be
    stored as the embedding, as the head, or as both. If those differ, the head is its own and the
    returned config is untied.

    Args:
        folder: of a plain Hugging Face checkpoint.
        config: the architecture its ``config.json`` describes.

    Raises:
        CheckpointError: a file is missing or bad, or a tensor missing, ambiguous or of another
            shape.
    """
    with SafetensorsReader(safetensors_files(folder), str(folder)) as stored:
        reader = _with_full_names(stored, config)
        config = _settle_head(reader, config)
        check_tensors(reader, tensor_shapes(config))
        yield reader, config


def _with_full_names(reader: TensorReader, config: ModelConfig) -> TensorReader:
    expected = {*tensor_shapes(config), _HEAD}
    stored: dict[str, str] = {}
    for name in reader.shapes:
        choices = (name, _PREFIX + name, name.removeprefix(_PREFIX))
        full = next((choice for choice in choices if choice in expected), name)
        if full in stored:
            raise CheckpointError(
                f"{reader.origin}: tensor {full} is there twice, as {stored[full]} and {name}."
            )
        stored[full] = name
    if config.tie_word_embeddings and _EMBED not in stored and _HEAD in stored:
        stored[_EMBED] = stored.pop(_HEAD)
    return _Renamed(reader, stored)


def _settle_head(reader: TensorReader, config: ModelConfig) -> ModelConfig:
    """``config``, untied if the files hold a head that is not the embedding."""
    if not (config.tie_word_embeddings and _HEAD in reader.shapes and _EMBED in reader.shapes):
        return config
    untied = replace(config, tie_word_embeddings=False)
    if reader.shapes[_HEAD] != reader.shapes[_EMBED]:
        return untied  # refused next, by name and shape
    head, embed = reader.read(_HEAD), reader.read(_EMBED)
    if head.dtype != embed.dtype:
        head, embed = head.float(), embed.float()
    return config if torch.equal(head, embed) else untied


def check_tensors(reader: TensorReader, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what there is with what the architecture needs, before anything is read.

    Raises:
        CheckpointError: a tensor is missing or has another shape; the first one is named.
    """
    missing = [name for name in expected if name not in reader.shapes]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{reader.origin}: tensor {missing[0]}{more} is missing.")
    for name, shape in expected.items():
        if reader.shapes[name] != shape:
            raise CheckpointError(
                f"{reader.origin}: tensor {name} has shape {list(reader.shapes[name])}, "
                f"but the configuration asks for {list(shape)}."
            )
    unused = [n for n in reader.shapes if n not in expected and not n.endswith(_IGNORED)]
    if unused:
        logger.warning(
            "%s: %d tensors are not part of the model and are ignored, for example %s.",
            reader.origin,
            len(unused),
            unused[0],
        )


def load_weights(
    config: ModelConfig,
    reader: TensorReader,
    rope: tuple[Tensor, float],
    dtype: torch.dtype,
    device: torch.device,
    quantize: Callable[[Tensor], Weight] = Weight.plain,
) -> ModelWeights:
    """Read, fuse, convert and place all weights; exit modules are added by the caller.

    Args:
        config: the architecture.
        reader: where the tensors come from; ``check_tensors`` has accepted them.
        rope: inverse frequencies [H / 2] and the factor on cos and sin.
        dtype: of all weights but the frequencies, which stay fp32.
        device: where the weights go, layer by layer.
        quantize: makes the matrices of the layers and of the head, each as soon as it is read, so
            that the model is never in memory twice.
    """

    def read(*names: str) -> Tensor:
        # cat copies even a single tensor, so that no weight stays a view of the mapped file.
        fused = torch.cat([reader.read(name) for name in names])
        return fused.to(device=device, dtype=dtype)

    def matrix(*names: str) -> Weight:
        return quantize(read(*(f"{name}.weight" for name in names)))

    embed = read("model.embed_tokens.weight")
    inv_freq, attention_scaling = rope
    return ModelWeights(
        embed=embed,
        layers=[_load_layer(config, read, matrix, index) for index in range(config.num_layers)],
        final_norm=read("model.norm.weight"),
        lm_head=quantize(embed) if config.tie_word_embeddings else matrix("lm_head"),
        inv_freq=inv_freq.to(device),
        rope_attention_scaling=attention_scaling,
    )


def _load_layer(
    config: ModelConfig, read: Callable[..., Tensor], matrix: Callable[..., Weight], index: int
) -> LayerWeights:
    attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."

    def bias(wanted: bool, *names: str) -> Tensor | None:
        return read(*(f"{name}.bias" for name in names)) if wanted else None

    qkv = [attention + name for name in ("q_proj", "k_proj", "v_proj")]
    gate_up = [mlp + name for name in ("gate_proj", "up_proj")]
    return LayerWeights(
        input_norm=read(f"model.layers.{index}.input_layernorm.weight"),
        qkv=matrix(*qkv),
        qkv_bias=bias(config.qkv_bias, *qkv),
        q_norm=read(f"{attention}q_norm.weight") if config.qk_norm else None,
        k_norm=read(f"{attention}k_norm.weight") if config.qk_norm else None,
        o=matrix(f"{attention}o_proj"),
        o_bias=bias(config.o_bias, f"{attention}o_proj"),
        post_attention_norm=read(f"model.layers.{index}.post_attention_layernorm.weight"),
        gate_up=matrix(*gate_up),
        gate_up_bias=bias(config.mlp_bias, *gate_up),
        down=matrix(f"{mlp}down_proj"),
        down_bias=bias(config.mlp_bias, f"{mlp}down_proj"),
    )
