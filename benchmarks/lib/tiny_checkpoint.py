"""A checkpoint of random weights that is made in a second and starts in few: for faults and CI.

Six layers of 64, exits at 2, 4 and 6, and a tokenizer that knows bytes: any text passes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["write_adapter", "write_tiny_checkpoint"]

NUM_LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 6, 64, 96, 4, 2, 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 288
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}


def write_tiny_checkpoint(folder: Path) -> Path:
    """Write the checkpoint, the same every time, into ``folder``; returns the folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", CONFIG)
    _write_tokenizer(folder)
    exits = [2, 4, 6]
    score = {str(e): {"loss": 3.0 - e / NUM_LAYERS, "score": e / NUM_LAYERS} for e in exits}
    _write(
        folder / "sorted.json",
        {
            "format_version": 1,
            "num_layers": NUM_LAYERS,
            "exits": exits,
            "recipe": {"method": "random"},
            "quality": score,
        },
    )
    return folder


def write_adapter(folder: Path, base: Path) -> Path:
    """Write a LoRA adapter over the checkpoint at ``base``: its merged weights go to the cache."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in range(NUM_LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        for part, shape in (("A", (4, HIDDEN)), ("B", (HEADS * HEAD_DIM, 4))):
            noise = torch.randn(shape, generator=generator) * 0.1
            tensors[f"{name}.lora_{part}.weight"] = noise
    save_file(tensors, folder / "adapter_model.safetensors")
    _write(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
        },
    )
    _write(
        folder / "sorted.json",
        {
            "format_version": 1,
            "base": str(base),
            "num_layers": NUM_LAYERS,
            "exits": [2, 4, 6],
            "recipe": {"method": "random"},
        },
    )
    return folder


def _weights() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)

    def matrix(num_outputs: int, num_inputs: int, scale: float = 1.6) -> torch.Tensor:
        noise = torch.randn(num_outputs, num_inputs, generator=generator)
        scaled: torch.Tensor = noise * scale / num_inputs**0.5
        return scaled

    tensors = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN, scale=0.3 * HIDDEN**0.5)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN)
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    return tensors


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[2],
            "pad_token": SPECIAL[2],
            "additional_special_tokens": [SPECIAL[1]],
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
