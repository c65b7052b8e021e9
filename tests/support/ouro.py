"""Ouro, a looped language model, in the plainest torch, and tiny random checkpoints of it.

Written from its definition (arXiv 2510.25741 and the code that comes with ByteDance/Ouro-1.4B):
no cache, no batch, one sequence. Where that code keeps keys and values, it keeps those of each time
through the layers apart, so that a token attends to what tokens before it were at the same time:
which is what happens here, where all tokens go through the layers together.

    model = make_tiny_ouro(folder)               # later: load_hf(folder)
    logits_TV = model.logits(ids, num_times=2)
    logits_TV = hf_logits(model, ids, num_layers=4)

Shape legend: T tokens, D hidden, V vocabulary, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu

from support.reference import apply_exit_module, rms_norm
from support.tiny_models import VOCAB_SIZE, tiny_tokenizer

__all__ = ["OuroReference", "load_ouro", "make_tiny_ouro"]

NUM_LAYERS = 3

_CONFIG: dict[str, Any] = {
    "architectures": ["OuroForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    },
    "model_type": "ouro",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": NUM_LAYERS,
    "layer_types": ["full_attention"] * NUM_LAYERS,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class OuroReference:
    """The model of a ``config.json`` and its tensors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def logits(self, ids: Sequence[int], num_times: int) -> Tensor:
        """[T, V] after ``num_times`` times through all layers."""
        final_norm = self.tensors["model.norm.weight"]
        h_TD = self.tensors["model.embed_tokens.weight"][torch.tensor(list(ids))]
        for _ in range(num_times):
            for index in range(self.config["num_hidden_layers"]):
                h_TD = self._layer(f"model.layers.{index}.", h_TD)
            h_TD = self._norm(h_TD, final_norm)
        return linear(h_TD, self.tensors["lm_head.weight"])

    def exit_logits(
        self, ids: Sequence[int], depth: int | None, exit_module: Mapping[str, Tensor] | None
    ) -> Tensor:
        """[T, V] where one leaves after ``depth`` layers (None: all), each counted once for each
        time; ``exit_module``: tensors of what stands before the head there, if there is any.
        """
        if depth is None:
            depth = self.config["num_hidden_layers"] * self.config["total_ut_steps"]
        h_TD, tensors = self._state(ids, depth), dict(exit_module or {})
        head = tensors.pop("lm_head.weight", self.tensors["lm_head.weight"])
        tensors = tensors or {"norm.weight": self.tensors["model.norm.weight"]}
        return linear(apply_exit_module(h_TD, tensors, self.config["rms_norm_eps"]), head)

    def _state(self, ids: Sequence[int], depth: int) -> Tensor:
        """[T, D] after ``depth`` layers, before any norm there."""
        num_layers = self.config["num_hidden_layers"]
        h_TD = self.tensors["model.embed_tokens.weight"][torch.tensor(list(ids))]
        for i in range(depth):
            if i and i % num_layers == 0:
                h_TD = self._norm(h_TD, self.tensors["model.norm.weight"])
            h_TD = self._layer(f"model.layers.{i % num_layers}.", h_TD)
        return h_TD

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config["rms_norm_eps"])

    def _layer(self, prefix: str, h_TD: Tensor) -> Tensor:
        def norm(x: Tensor, name: str) -> Tensor:
            return self._norm(x, self.tensors[f"{prefix}{name}.weight"])

        def project(x: Tensor, name: str) -> Tensor:
            return linear(x, self.tensors[f"{prefix}{name}.weight"])

        x_TD = norm(h_TD, "input_layernorm")
        attended_TX = self._attend(*(project(x_TD, f"self_attn.{n}_proj") for n in "qkv"))
        h_TD = h_TD + norm(project(attended_TX, "self_attn.o_proj"), "input_layernorm_2")
        x_TD = norm(h_TD, "post_attention_layernorm")
        gated_TF = silu(project(x_TD, "mlp.gate_proj")) * project(x_TD, "mlp.up_proj")
        return h_TD + norm(project(gated_TF, "mlp.down_proj"), "post_attention_layernorm_2")

    def _attend(self, q_TX: Tensor, k_TX: Tensor, v_TX: Tensor) -> Tensor:
        num_heads, head_dim = self.config["num_attention_heads"], self.config["head_dim"]
        num_tokens = len(q_TX)
        q, k, v = (x.view(num_tokens, -1, head_dim).transpose(0, 1) for x in (q_TX, k_TX, v_TX))
        q, k = self._rotate(q), self._rotate(k)
        k, v = (x.repeat_interleave(num_heads // len(x), dim=0) for x in (k, v))
        scores_NTT = q @ k.transpose(1, 2) / head_dim**0.5
        future_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        out_NTH: Tensor = scores_NTT.masked_fill(future_TT, float("-inf")).softmax(-1) @ v
        out_TX: Tensor = out_NTH.transpose(0, 1).reshape(num_tokens, -1)
        return out_TX

    def _rotate(self, x_NTH: Tensor) -> Tensor:
        _, num_tokens, head_dim = x_NTH.shape
        exponents = torch.arange(0, head_dim, 2) / head_dim
        frequencies = torch.tensor(self.config["rope_theta"]) ** -exponents
        angles_TH = torch.outer(torch.arange(num_tokens).float(), frequencies).repeat(1, 2)
        first, second = x_NTH.chunk(2, dim=-1)
        turned_NTH = torch.cat((-second, first), dim=-1)
        return x_NTH * angles_TH.cos() + turned_NTH * angles_TH.sin()


def load_ouro(folder: Path) -> OuroReference:
    """The model that ``make_tiny_ouro`` has written."""
    config = json.loads((folder / "config.json").read_text())
    return OuroReference(config, load_file(folder / "model.safetensors"))


def make_tiny_ouro(folder: Path, **fields: Any) -> OuroReference:
    """Write a random checkpoint to ``folder``; ``fields`` of ``config.json`` override its own."""
    config = {**_CONFIG, **fields}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    vocab = config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "input_layernorm_2": (hidden,),
            "post_attention_layernorm": (hidden,),
            "post_attention_layernorm_2": (hidden,),
        }
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    shapes["model.early_exit_gate.weight"] = (1, hidden)
    shapes["model.early_exit_gate.bias"] = (1,)
    shapes["lm_head.weight"] = (vocab, hidden)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name
        tensors[name] = 1.0 + 0.2 * noise if is_norm else noise * 1.6 / shape[-1] ** 0.5
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return OuroReference(config, tensors)
