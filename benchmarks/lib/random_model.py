"""A model of random weights, shaped like SmolLM2-135M: nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sortserve.model.attention import RopeTables
from sortserve.model.config import ModelConfig
from sortserve.model.weight import Weight
from sortserve.model.weights import LayerWeights, ModelWeights

__all__ = ["CONFIG", "LINEARS", "generator", "make_rope", "matrix", "random", "random_weights"]

CONFIG = ModelConfig(
    family="llama",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
LINEARS = {
    "qkv": (960, 576),
    "o": (576, 576),
    "gate_up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
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
