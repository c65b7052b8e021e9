"""One exit of a sorted checkpoint as a plain Hugging Face folder.

Sub-model E is the first E layers, the final norm and the head, so a folder of the same architecture
holds it, whatever stands before the head at that exit, if its kind has a place there:

    none           as it is
    norm, mlp,     its tensors go to the names in ``ExitModule.plain_names``: to the final norm, the
    layer,         head, or to a layer that is added, where what it has no tensors for adds nothing
    head ...
    affine ...     may have a place in some of these architectures (``has_plain_form``): else it is
                   refused
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sortserve import __version__
from sortserve.checkpoint.adapter import merge_adapter
from sortserve.checkpoint.exit_modules import EXIT_MODULES, load_exit_modules
from sortserve.checkpoint.families import FAMILIES, read_model_config, tensor_shapes
from sortserve.checkpoint.files import read_json, read_optional_json
from sortserve.checkpoint.generation_config import GENERATION_CONFIG, generation_settings
from sortserve.checkpoint.hf import load_hf_config, load_tokenizer
from sortserve.checkpoint.known_exits import known_exits
from sortserve.checkpoint.layout import CheckpointLayout
from sortserve.checkpoint.load import open_checkpoint
from sortserve.checkpoint.loader import open_trunk
from sortserve.checkpoint.tensors import SafetensorsReader, StateDictReader, TensorReader
from sortserve.core.errors import ConfigError
from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS, NO_MODULE
from sortserve_trainer.model.exit_modules import TRAINED_EXIT_MODULES, ExitModule
from sortserve_trainer.run.save import atomic_folder, check_output

__all__ = ["EXPORT_DTYPES", "export_submodel"]

logger = logging.getLogger(__name__)

EXPORT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MAX_SHARD_BYTES = 5 << 30
"""Larger models are written in several files, so that no more than this is in memory at once."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def export_submodel(
    source: str,
    exit_layer: int,
    output: Path,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write sub-model ``exit_layer`` of ``source`` to ``output``, all of it or nothing.

    Args:
        source: as ``sortserve serve`` takes it; an adapter is merged in fp32.
        exit_layer: one of the checkpoint's exits; without ``sorted.json`` any layer.
        output: a folder that does not exist, or is empty.
        dtype: of the weights on disk, one of EXPORT_DTYPES.
        revision: branch, tag or commit of a hub id.
        max_shard_bytes: most bytes of one weights file; a larger tensor has a file of its own.

    Returns:
        ``output``.

    Raises:
        CheckpointError: the source is bad or not supported.
        ConfigError: the exit does not exist or has a module that no plain model has a place for, or
            ``output`` is not empty or cannot be written.
    """
    check_output(output)
    with open_checkpoint(source, revision=revision) as layout:
        hf_config = load_hf_config(layout.model)
        config = read_model_config(hf_config)
        kind = _check_exit(exit_layer, config, layout, dtype)
        has_own = (layout.own / "tokenizer.json").is_file()
        tokenizer_folder = layout.own if has_own else layout.model
        eos_token_ids, _ = generation_settings(
            layout.model, hf_config, load_tokenizer(tokenizer_folder)
        )
        with atomic_folder(output) as draft:
            with _weights(layout, config, exit_layer, kind) as (reader, exported):
                _write_weights(reader, exported, EXPORT_DTYPES[dtype], draft, max_shard_bytes)
            document = _config_document(layout.model, exported, dtype)
            _write_json(draft / "config.json", document)
            _write_json(
                draft / "generation_config.json",
                _generation_document(layout.model, document, eos_token_ids),
            )
            for name in _TOKENIZER_FILES:
                _copy(tokenizer_folder / name, draft)
            for path in [*layout.model.glob("LICENSE*"), *layout.own.glob("LICENSE*")]:
                _copy(path, draft)
            card = _card(layout, exit_layer, kind, config)
            (draft / "README.md").write_text(card, encoding="utf-8")
    return output


def _check_exit(
    exit_layer: int, config: ModelConfig, layout: CheckpointLayout, dtype: str
) -> type[ExitModule] | None:
    """The kind of the exit's module; refuses what cannot be exported before weights are read."""
    info = layout.sorted_info
    if info is not None and exit_layer not in info.exits:
        raise ConfigError(
            f"--exit {exit_layer} is not an exit of {layout.name}: "
            f"choose one of {', '.join(map(str, info.exits))}.",
            param="exit",
        )
    if not 1 <= exit_layer <= config.num_layers:
        raise ConfigError(
            f"--exit {exit_layer} is not a layer of {layout.name}: "
            f"choose one from 1 to {config.num_layers}.",
            param="exit",
        )
    known = known_exits(layout, config)
    if exit_layer not in known.trained:
        logger.warning(
            "Exit %d is untrained: %s. Its output may be of no use.",
            exit_layer,
            known.reason,
        )
    name = info.module_kind(exit_layer) if info is not None else NO_MODULE
    if name == NO_MODULE:
        return None
    kind = TRAINED_EXIT_MODULES[name]
    if not kind.has_plain_form(config):
        raise ConfigError(
            f"--exit {exit_layer} of {layout.name} has {kind.export_obstacle} has no place in a "
            f"plain {config.family} model. Serve it with sortserve, or export the full depth: "
            f"--exit {config.num_layers}.",
            param="exit",
        )
    if kind.plain_max > torch.finfo(EXPORT_DTYPES[dtype]).max:
        raise ConfigError(
            f"--dtype {dtype} is too small for the {name} module of exit {exit_layer}: "
            "choose float32 or bfloat16.",
            param="dtype",
        )
    return kind


@contextmanager
def _weights(
    layout: CheckpointLayout, config: ModelConfig, exit_layer: int, kind: type[ExitModule] | None
) -> Iterator[tuple[TensorReader, ModelConfig]]:
    """The tensors of the sub-model under their names in a plain checkpoint, and its config."""
    with open_trunk(layout.model, config) as (source, config):
        if layout.is_adapter:
            source = StateDictReader(merge_adapter(layout.own, layout.model), str(layout.own))
        if kind is None:
            yield source, replace(config, num_layers=exit_layer)
            return
        module = kind.plain_tensors(_read_module(layout, config, exit_layer), exit_layer, config)
        config = replace(
            config,
            mlp_bias=config.mlp_bias or kind.plain_needs_mlp_bias,
            tie_word_embeddings=config.tie_word_embeddings and not kind.plain_has_head,
        )
        folded = _Folded(source, config, exit_layer, module)
        yield folded, replace(config, num_layers=exit_layer + folded.has_added_layer)


def _read_module(
    layout: CheckpointLayout, config: ModelConfig, exit_layer: int
) -> Mapping[str, Tensor]:
    """Its tensors, by their names there without the prefix."""
    assert layout.sorted_info is not None
    kinds = layout.sorted_info.exit_modules
    # Nothing is loaded of no exits, but the whole file is checked.
    load_exit_modules(layout.own, kinds, [], config, torch.float32, torch.device("cpu"))
    names = EXIT_MODULE_KINDS[kinds[exit_layer]].shapes(config)
    with SafetensorsReader([layout.own / EXIT_MODULES], str(layout.own)) as reader:
        return {name: reader.read(f"exits.{exit_layer}.{name}").clone() for name in names}


class _Folded:
    """A trunk's tensors with an exit module among them.

    Args:
        trunk: the tensors of the full depth.
        config: of the full depth.
        exit_layer: where the module stands, and the index of the layer that is added for it.
        module: its tensors, under their names in a plain checkpoint.

    Attributes:
        has_added_layer: whether any of them is in that layer.
    """

    def __init__(
        self,
        trunk: TensorReader,
        config: ModelConfig,
        exit_layer: int,
        module: Mapping[str, Tensor],
    ) -> None:
        self._trunk = trunk
        self.origin = trunk.origin
        self.shapes = tensor_shapes(config)
        added = f"model.layers.{exit_layer}."
        self.has_added_layer = any(name.startswith(added) for name in module)
        # What the layer has no use for is zero, its norms are one; biases that the trunk has not
        # are zero, too.
        unused = {
            name: (torch.ones if "norm" in name else torch.zeros)(shape)
            for name, shape in self.shapes.items()
            if name not in module
            and (
                (self.has_added_layer and name.startswith(added))
                or (name.endswith(".bias") and name not in trunk.shapes)
            )
        }
        self._own = {**unused, **module}

    def read(self, name: str) -> Tensor:
        """The module's tensor of this name, else the trunk's."""
        return self._own[name] if name in self._own else self._trunk.read(name)


def _write_weights(
    reader: TensorReader,
    config: ModelConfig,
    dtype: torch.dtype,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    shapes = tensor_shapes(config)
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    place: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {name: reader.read(name).to(dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in their order, in groups of at most ``max_shard_bytes`` but for single tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _config_document(model: Path, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """``config.json`` of the trunk, cut to the layers of the sub-model."""
    document = read_json(model / "config.json")
    for name in ("torch_dtype", "_name_or_path", "quantization_config"):
        document.pop(name, None)
    full, layers = document["num_hidden_layers"], config.num_layers
    document |= {
        "architectures": [FAMILIES[config.family].architecture],
        "num_hidden_layers": layers,
        "tie_word_embeddings": config.tie_word_embeddings,
        **({"mlp_bias": True} if config.mlp_bias else {}),
        "dtype": dtype,
        "use_cache": True,
    }
    types = document.get("layer_types")
    if types is not None:
        document["layer_types"] = types[:layers]
    if document.get("max_window_layers") is not None:
        windowed_from = document["max_window_layers"]
        document["max_window_layers"] = layers if windowed_from >= full else windowed_from
    return document


def _generation_document(
    model: Path, config: Mapping[str, Any], eos_token_ids: frozenset[int]
) -> dict[str, Any]:
    """``generation_config.json`` whose end-of-sequence ids are those the server stops at."""
    document = read_optional_json(model / GENERATION_CONFIG)
    for name in ("bos_token_id", "pad_token_id"):
        if document.get(name) is None and config.get(name) is not None:
            document[name] = config[name]
    ids = sorted(eos_token_ids)
    if ids:
        document["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    return document


def _card(
    layout: CheckpointLayout, exit_layer: int, kind: type[ExitModule] | None, config: ModelConfig
) -> str:
    base = f", trained over `{layout.base}`" if layout.own != layout.model else ""
    folded = f"{kind.export_note}\n" if kind is not None else ""
    scores = layout.sorted_info.quality.get(exit_layer, {}) if layout.sorted_info else {}
    names = [name for name in ("score", "loss", "agreement") if name in scores]
    quality = ", ".join(f"{name} {scores[name]:.3f}" for name in names)
    return (
        f"# {layout.name}, exit {exit_layer} of {config.num_layers}\n\n"
        f"The first {exit_layer} of {config.num_layers} layers of `{layout.name}`{base}, "
        f"as a plain {config.family} model. Written by `sortserve export` {__version__}.\n"
        f"{folded}"
        + (f"\nQuality as measured by `sortserve eval`: {quality}.\n" if quality else "")
        + "\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```\n'
        "\nThe licence is that of the model it comes from.\n"
    )


def _copy(path: Path, folder: Path) -> None:
    if path.is_file():
        shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
