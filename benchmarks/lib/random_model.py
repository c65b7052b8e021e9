"""A model of random weights, shaped like SmolLM2-135M: nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lib.shapes import config_of
from sortserve.model.attention import RopeTables
from sortserve.model.weight import Weight
from sortserve.model.weights import LayerWeights, ModelWeights

__all__ = ["CONFIG", "LINEARS", "generator", "make_rope", "matrix", "random", "random_weights"]

CONFIG = config_of("smollm2-135m")
LINEARS = {
    "qkv": (CONFIG.q_size + 2 * CONFIG.kv_size, CONFIG.hidden_size),
    "o": (CONFIG.hidden_size, CONFIG.q_size),
    "gate_up": (2 * CONFIG.intermediate_size, CONFIG.hidden_size),
    "down": (CONFIG.hidden_size, CONFIG.intermediate_size),
    "head": (CONFIG.vocab_size, CONFIG.hidden_size),
}


def random_weights(
    dtype: torch.dtype, make_weight: Callable[[Tensor], Weight] = Weight.plain
) -> ModelWeights:
    config, ones = CONFIG, torch.ones(CONFIG.hidden_size, dtype=dtype)

    def weight(name: str) -> Weight:
        return make_weight(matrix(*LINEARS[name], dtype))

    layers = [
        LayerWeights(
            input_norm=ones,
            qkv=weight("qkv"),
            o=weight("o"),
            post_attention_norm=ones,
            gate_up=weight("gate_up"),
            down=weight("down"),
        )
        for _ in range(config.num_layers)
    ]
    embed = matrix(*LINEARS["head"], dtype)
    inv_freq = 10_000.0 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    return ModelWeights(
        embed=embed, layers=layers, final_norm=ones, lm_head=make_weight(embed), inv_freq=inv_freq
    )


def make_rope() -> RopeTables:
    inv_freq = 10_000.0 ** -(torch.arange(0, CONFIG.head_dim, 2) / CONFIG.head_dim)
    return RopeTables.build(inv_freq, 1.0, CONFIG.max_position_embeddings)


def matrix(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> Tensor:
    return (random(num_outputs, num_inputs) / math.sqrt(num_inputs)).to(dtype)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
