"""From what the user named to a ``SortedModel``: to be trained, or merged and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sortserve.checkpoint.adapter import ADAPTER_WEIGHTS, merge_adapter
from sortserve.checkpoint.exit_modules import EXIT_MODULES, load_exit_modules
from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.hf import load_hf_config, load_tokenizer, quiet
from sortserve.checkpoint.known_exits import known_exits
from sortserve.checkpoint.layout import CheckpointLayout
from sortserve.checkpoint.load import (
    open_checkpoint,
    resolve_device,
)
from sortserve.checkpoint.loader import open_trunk
from sortserve.checkpoint.plain_model import load_plain_model
from sortserve.checkpoint.quantize import NO_QUANTIZER, check_not_quantised, find_quantizer
from sortserve.checkpoint.sorted_json import SortedInfo, check_exits
from sortserve.checkpoint.tensors import SafetensorsReader
from sortserve.core.errors import CheckpointError, ConfigError
from sortserve.model.config import ModelConfig
from sortserve.model.weight import Weight
from sortserve_trainer.model.adapter import continue_adapter, new_adapter
from sortserve_trainer.model.base_digest import base_digest
from sortserve_trainer.model.dtypes import resolve_trainer_dtype
from sortserve_trainer.model.exit_modules import ExitModules
from sortserve_trainer.model.load_settings import ModelSettings
from sortserve_trainer.model.quantized import quantize_layers
from sortserve_trainer.model.sorted_model import SortedModel
from sortserve_trainer.run.methods import Method
from sortserve_trainer.run.module_kinds import AskedKinds

__all__ = [
    "LoadedModel",
    "choose_exits",
    "load_for_evaluation",
    "load_for_training",
    "module_kinds",
]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in memory, and where it came from."""

    model: SortedModel
    tokenizer: Any
    """transformers' ``PreTrainedTokenizerFast``."""
    config: ModelConfig
    base: str
    """What its trunk is known as, findable from any working directory."""
    base_digest: str = ""
    """Of what is trained further (``base_digest``); empty where nothing is."""
    sorted_info: SortedInfo | None
    dtype: torch.dtype
    """To compute in; weights that are trained are float32 whatever it is."""
    device: torch.device
    trains_weights: bool = False
    """Whether the trunk's own weights are trained: not frozen, not under an adapter."""
    new_modules: tuple[int, ...] = ()
    """Exits whose module was made now and has not been trained."""
    quantize: Callable[[torch.Tensor], Weight] = Weight.plain
    """What makes the weight of a head that is evaluated; the linear layers have theirs."""


def load_for_training(settings: ModelSettings, method: Method) -> LoadedModel:
    """The base with everything ready to train that the settings ask for.

    Raises:
        CheckpointError: the base is bad, not supported, or has no weights.
        ConfigError: the exits or the LoRA settings do not fit the base.
    """
    device = resolve_device(settings.device)
    with open_checkpoint(settings.base, revision=settings.revision) as layout:
        hf_config = load_hf_config(layout.model)
        check_not_quantised(settings.quantize, hf_config, layout.name)
        config = _check_weights(layout, read_model_config(hf_config))
        dtype = resolve_trainer_dtype(settings.dtype, device)
        exits = choose_exits(settings.exits, config.num_layers)
        trunk_dtype = torch.float32 if settings.trains_weights else dtype
        trunk = _load_trunk(layout, trunk_dtype, settings.quantize)
        if not settings.trains_weights:
            trunk.requires_grad_(False)
        trunk = _with_adapter(trunk, layout, settings, method)
        kinds = module_kinds(layout, exits, method, settings.asked_kinds)
        final_norm = _final_norm(trunk)
        modules = ExitModules(kinds, config, final_norm)
        trained = _load_modules(modules, layout)
        tokenizer = load_tokenizer(layout.model)
        digest = base_digest(layout)
    model = SortedModel(trunk, exits, modules)
    _check_trains(model, method)
    new = [e for e in modules.by_exit if e not in trained]
    for exit_layer in new:
        modules.by_exit[exit_layer].start_from_head(model.head(exits[-1]).detach())
    model = model.to(device)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=config,
        base=layout.base,
        base_digest=digest,
        sorted_info=layout.sorted_info,
        dtype=dtype,
        device=device,
        trains_weights=settings.trains_weights,
        new_modules=tuple(new),
    )


def load_for_evaluation(
    source: str,
    *,
    exits: Sequence[int] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = NO_QUANTIZER,
    revision: str | None = None,
) -> LoadedModel:
    """A checkpoint with its adapter merged, in eval mode, nothing to train.

    Args:
        source: as ``sortserve serve`` takes it.
        exits: in place of those of ``sorted.json``; the full depth is added.
        dtype: one of ``sortserve.checkpoint.load.DTYPES``.
        device: ``auto``, ``cpu`` or ``cuda``.
        quantize: what the linear layers compute with, one of ``QUANTIZERS``. The head, which is
            read as a matrix, is left to ``LoadedModel.quantize``.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: the checkpoint is bad or not supported.
        ConfigError: ``exits``, ``dtype``, ``device`` or ``quantize`` is not possible.
    """
    torch_device = resolve_device(device)
    make_weight = find_quantizer(quantize, torch_device)
    with open_checkpoint(source, revision=revision) as layout:
        hf_config = load_hf_config(layout.model)
        if not layout.is_adapter:
            check_not_quantised(quantize, hf_config, layout.name)
        config = _check_weights(layout, read_model_config(hf_config))
        torch_dtype = resolve_trainer_dtype(dtype, torch_device)
        info = layout.sorted_info
        chosen = choose_exits(exits or known_exits(layout, config).served, config.num_layers)
        trunk = _load_trunk(layout, torch.float32)
        if layout.is_adapter:
            trunk.load_state_dict(merge_adapter(layout.own, layout.model))
        kinds = {e: info.module_kind(e) for e in chosen[:-1] if info is not None}
        modules = ExitModules(kinds, config, _final_norm(trunk))
        _load_modules(modules, layout)
        tokenizer = load_tokenizer(layout.model)
    model = SortedModel(trunk, chosen, modules)
    rotary = trunk.model.rotary_emb
    inv_freq = rotary.inv_freq
    model = model.to(device=torch_device, dtype=torch_dtype).eval()
    rotary.inv_freq = inv_freq.to(torch_device)  # angles need float32, whatever the weights are in
    model.requires_grad_(False)
    if quantize != NO_QUANTIZER:
        quantize_layers(trunk.model.layers, make_weight)
        for module in modules.by_exit.values():
            module.quantize(make_weight)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=config,
        base=layout.base,
        sorted_info=layout.sorted_info,
        dtype=torch_dtype,
        device=torch_device,
        quantize=make_weight,
    )


def choose_exits(exits: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """``exits`` with the full depth.

    Raises:
        ConfigError: they do not ascend, or are not layers of the model.
    """
    try:
        check_exits(tuple(exits), num_layers)
    except ValueError as error:
        raise ConfigError(f"--exits: {error}.", param="exits") from error
    return tuple(exits) if exits[-1] == num_layers else (*exits, num_layers)


def _check_weights(layout: CheckpointLayout, config: ModelConfig) -> ModelConfig:
    """Refuse missing, cut and misshapen weights by name, from the headers of the files alone.

    Returns ``config``, untied where the files hold a head of its own.
    """
    with open_trunk(layout.model, config) as (_, config):
        pass
    if layout.is_adapter:
        with SafetensorsReader([layout.own / ADAPTER_WEIGHTS], str(layout.own)):
            pass
    kinds = layout.sorted_info.exit_modules if layout.sorted_info else {}
    load_exit_modules(layout.own, kinds, (), config, torch.float32, torch.device("cpu"))
    return config


def _load_trunk(layout: CheckpointLayout, dtype: torch.dtype, quantize: str = "none") -> Any:
    try:
        with quiet():
            if quantize == "none":
                return load_plain_model(layout.model, dtype)
            from transformers import AutoModelForCausalLM, BitsAndBytesConfig

            return AutoModelForCausalLM.from_pretrained(
                layout.model,
                dtype=dtype,
                local_files_only=True,
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_compute_dtype=dtype
                ),
            )
    except OSError as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{layout.model}: the weights cannot be read: {reason}") from error


def _with_adapter(
    trunk: Any, layout: CheckpointLayout, settings: ModelSettings, method: Method
) -> Any:
    """``trunk`` with the LoRA adapter to train or to keep: a new one, or the base's own."""
    if layout.is_adapter:
        return continue_adapter(trunk, layout.own, settings)
    if not settings.trains_adapter:
        return trunk  # a machine without peft can train all weights
    return new_adapter(trunk, settings, method.lora_rank)


def _final_norm(trunk: Any) -> torch.Tensor:
    get_base = getattr(trunk, "get_base_model", None)
    weight: torch.Tensor = (get_base() if get_base is not None else trunk).model.norm.weight
    return weight.detach().float()


def module_kinds(
    layout: CheckpointLayout, exits: Sequence[int], method: Method, asked: AskedKinds
) -> Mapping[int, str]:
    """By exit below full depth, the kind that was asked for; else the method's, but where the base
    has a module already.

    Raises:
        ConfigError: a kind is asked for where there is no such exit.
    """
    asked.check_exits(exits[:-1])
    own = layout.sorted_info.exit_modules if layout.sorted_info is not None else {}
    return {e: asked.at(e, own.get(e, method.exit_modules)) for e in exits[:-1]}


def _check_trains(model: SortedModel, method: Method) -> None:
    """Refuse a run in which some step would have nothing to train.

    Raises:
        ConfigError: the flags leave no exit, or no exit with a module, that a step needs.
    """
    shallow = model.exits[:-1]
    if method.has_head_phase and not shallow:
        raise ConfigError(
            f"--method {method.name} trains a head for each exit below full depth, and --exits "
            "names none.",
            param="exits",
        )
    if any(parameter.requires_grad for parameter in model.trunk.parameters()):
        return
    plain = [e for e in shallow if e not in model.exit_modules.by_exit]
    if len(plain) == len(shallow):
        raise ConfigError(
            "--freeze-trunk leaves nothing to train: no exit below full depth has a module. Name "
            "such exits with --exits, and their kinds with --exit-modules.",
            param="freeze-trunk",
        )
    if method.exits_per_step is not None and method.exits_per_step <= len(plain):
        raise ConfigError(
            f"--exits-per-step {method.exits_per_step} with --freeze-trunk would draw exits "
            f"without a module alone ({', '.join(map(str, plain))}), and train nothing: give "
            f"{len(plain) + 1} or more.",
            param="exits-per-step",
        )


def _load_modules(modules: ExitModules, layout: CheckpointLayout) -> frozenset[int]:
    """Fill in what the checkpoint has of these kinds; returns the exits that were filled."""
    path: Path = layout.own / EXIT_MODULES
    info = layout.sorted_info
    if info is None or not path.is_file():
        return frozenset()
    kept = [e for e, module in modules.by_exit.items() if info.module_kind(e) == module.kind]
    modules.load(load_file(path), kept)
    return frozenset(kept)
