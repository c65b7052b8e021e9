"""benchmarks.memory counts the bytes that a model must hold."""

from __future__ import annotations

import torch
from benchmarks.lib.random_model import CONFIG, LINEARS, random_weights
from benchmarks.memory import weights_bytes

from sortserve.model.quantization import quantize_int8


def num_matrix_elements() -> int:
    per_layer = sum(o * i for name, (o, i) in LINEARS.items() if name != "head")
    return CONFIG.num_layers * per_layer


def test_a_tied_head_is_counted_once_and_matrices_with_their_scales() -> None:
    embed = CONFIG.vocab_size * CONFIG.hidden_size
    small = CONFIG.hidden_size * 2 + CONFIG.head_dim // 2 * 4  # one norm for all, frequencies

    plain = weights_bytes(random_weights(torch.bfloat16))
    quantised = weights_bytes(random_weights(torch.bfloat16, quantize_int8))

    assert plain == 2 * (num_matrix_elements() + embed) + small
    with_scales = (num_matrix_elements() + embed) * (1 + 2 / 32)
    assert quantised == with_scales + 2 * embed + small
