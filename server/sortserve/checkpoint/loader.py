"""Reading a checkpoint's tensors and fusing them as the decoder wants them.

Names, shapes and dtypes are checked against the architecture before the first tensor is read, so
that a bad checkpoint is refused in milliseconds and by the name of what is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sortserve.checkpoint.bnb_reader import BnbReader
from sortserve.checkpoint.families import tensor_shapes
from sortserve.checkpoint.files import read_json
from sortserve.checkpoint.quantization import Quantization
from sortserve.checkpoint.shards import ShardReader
from sortserve.checkpoint.tensors import (
    FLOATS,
    SafetensorsReader,
    TensorReader,
    WeightReader,
    safetensors_files,
)
from sortserve.core.errors import CheckpointError
from sortserve.model.config import ModelConfig
from sortserve.model.local_shape import LocalShape
from sortserve.model.weight import PLAIN, Weight
from sortserve.model.weights import LayerWeights, ModelWeights

__all__ = ["check_tensors", "load_weights", "open_trunk"]

logger = logging.getLogger(__name__)

_IGNORED = (
    "lm_head.weight",
    "rotary_emb.inv_freq",
    "early_exit_gate.weight",  # Ouro's: budgets choose the depth
    "early_exit_gate.bias",
)
_EMBED, _HEAD, _PREFIX = "model.embed_tokens.weight", "lm_head.weight", "model."


class _Renamed:
    """Tensors under other names than they are stored under."""

    def __init__(self, reader: WeightReader, stored: Mapping[str, str]) -> None:
        self._reader = reader
        self._stored = stored
        self.origin = reader.origin
        self.shapes = {name: reader.shapes[stored[name]] for name in stored}

    def read(self, name: str) -> Tensor:
        """One tensor, by its full name."""
        return self._reader.read(self._stored[name])

    def read_weight(self, name: str) -> Weight:
        """One matrix, by its full name."""
        return self._reader.read_weight(self._stored[name])


@contextmanager
def open_trunk(folder: Path, config: ModelConfig) -> Iterator[tuple[WeightReader, ModelConfig]]:
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
    with ExitStack() as stack:
        reader = _with_full_names(_open(folder, stack), config)
        config = _settle_head(reader, config)
        check_tensors(reader, tensor_shapes(config))
        yield reader, config


def _open(folder: Path, stack: ExitStack) -> WeightReader:
    """The tensors of a folder under the names they are stored under, quantised or not."""
    quantization = Quantization.read(read_json(folder / "config.json"))
    if quantization is None:
        return stack.enter_context(SafetensorsReader(safetensors_files(folder), str(folder)))
    files, dtypes = safetensors_files(folder), (*FLOATS, "U8", "I8")
    stored = stack.enter_context(SafetensorsReader(files, str(folder), dtypes))
    return BnbReader(stored, quantization)


def _with_full_names(reader: WeightReader, config: ModelConfig) -> WeightReader:
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


def _settle_head(reader: WeightReader, config: ModelConfig) -> ModelConfig:
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
    reader: WeightReader,
    rope: tuple[Tensor, float],
    dtype: torch.dtype,
    device: torch.device,
    quantize: Callable[[Tensor], Weight] = Weight.plain,
    shape: LocalShape | None = None,
) -> ModelWeights:
    """Read, fuse, convert and place all weights; exit modules are added by the caller.

    Args:
        config: the architecture.
        reader: where the tensors come from; ``check_tensors`` has accepted them.
        rope: inverse frequencies [H / 2] and the factor on cos and sin.
        dtype: of all weights but the frequencies, which stay fp32.
        device: where the weights go, layer by layer.
        quantize: makes the weights of the plain matrices of the layers and of the head, each as
            soon as it is read, so that the model is never in memory twice.
        shape: the share to load; None: everything.
    """
    shape = shape or LocalShape.of(config)
    if not shape.is_whole:
        reader = ShardReader(reader, config, shape)

    def fuse(tensors: list[Tensor]) -> Tensor:
        # cat copies even a single tensor, so that no weight stays a view of the mapped file.
        return torch.cat(tensors).to(device=device, dtype=dtype)

    def read(*names: str) -> Tensor:
        return fuse([reader.read(name) for name in names])

    def matrix(*names: str) -> Weight:
        stored = [reader.read_weight(f"{name}.weight") for name in names]
        if all(weight.format is PLAIN for weight in stored):
            return quantize(fuse([weight.values for weight in stored]))
        return Weight.concat([_place(weight, dtype, device) for weight in stored])

    embed = read("model.embed_tokens.weight")
    tied = embed if shape.is_whole else embed[shape.vocabulary]
    inv_freq, attention_scaling = rope
    return ModelWeights(
        embed=embed,
        layers=[
            _load_layer(config, read, matrix, index) for index in range(config.num_stack_layers)
        ],
        final_norm=read("model.norm.weight"),
        lm_head=quantize(tied) if config.tie_word_embeddings else matrix("lm_head"),
        inv_freq=inv_freq.to(device),
        rope_attention_scaling=attention_scaling,
    )


def _place(weight: Weight, dtype: torch.dtype, device: torch.device) -> Weight:
    """A weight in memory of its own, no longer a view of the mapped file."""
    values_dtype = dtype if weight.format is PLAIN else weight.values.dtype
    values = weight.values.to(device=device, dtype=values_dtype, copy=True)
    scales = None if weight.scales is None else weight.scales.to(device, copy=True)
    return Weight(values, scales, weight.format)


def _load_layer(
    config: ModelConfig, read: Callable[..., Tensor], matrix: Callable[..., Weight], index: int
) -> LayerWeights:
    attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."

    def bias(wanted: bool, *names: str) -> Tensor | None:
        return read(*(f"{name}.bias" for name in names)) if wanted else None

    def output_norm(name: str) -> Tensor | None:
        return read(f"model.layers.{index}.{name}.weight") if config.output_norms else None

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
        attention_output_norm=output_norm("input_layernorm_2"),
        post_attention_norm=read(f"model.layers.{index}.post_attention_layernorm.weight"),
        gate_up=matrix(*gate_up),
        gate_up_bias=bias(config.mlp_bias, *gate_up),
        down=matrix(f"{mlp}down_proj"),
        down_bias=bias(config.mlp_bias, f"{mlp}down_proj"),
        mlp_output_norm=output_norm("post_attention_layernorm_2"),
    )
