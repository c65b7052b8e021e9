"""An exit module of kind ``layer`` in transformers: one more layer of a plain model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["hf_layer_logits", "hf_layer_model"]

_PLACES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def hf_layer_model(model: Any, exit_layer: int, module: Mapping[str, Tensor]) -> Any:
    """transformers' model of the first ``exit_layer`` layers of ``model``, the module, the head.

    Args:
        model: the whole transformers model.
        exit_layer: where the module stands.
        module: its tensors by their names in ``exit_modules.safetensors``, without the prefix.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = exit_layer + 1
    config._attn_implementation = "sdpa"
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: exit_layer + 1]
    sub = type(model)(config).eval()
    sub.model.embed_tokens, sub.lm_head = model.model.embed_tokens, model.lm_head
    own = sub.model.layers[exit_layer]
    sub.model.layers = nn.ModuleList([*list(model.model.layers)[:exit_layer], own])
    layer = dict(module)
    sub.model.norm.load_state_dict({"weight": layer.pop("norm.weight")})
    own.load_state_dict({_place(name): tensor for name, tensor in layer.items()})
    return sub


@torch.no_grad()
def hf_layer_logits(
    model: Any, ids: Sequence[int], exit_layer: int, module: Mapping[str, Tensor]
) -> Tensor:
    """Its logits [T, V]; the arguments are those of ``hf_layer_model``."""
    sub = hf_layer_model(model, exit_layer, module)
    logits: Tensor = sub(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def _place(name: str) -> str:
    stem, _, part = name.rpartition(".")
    return f"{_PLACES.get(stem, f'self_attn.{stem}')}.{part}"
