"""A tiny Llama as a GGUF file, written the way llama.cpp's converter lays it out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from support.tiny_models import tiny_tokenizer

__all__ = ["write_tiny_gguf"]

_NAMES = {
    r"model\.embed_tokens": "token_embd",
    r"model\.norm": "output_norm",
    r"lm_head": "output",
    r"model\.layers\.(\d+)\.input_layernorm": r"blk.\1.attn_norm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"blk.\1.ffn_norm",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj": r"blk.\1.attn_\2",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"blk.\1.attn_output",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj": r"blk.\1.ffn_\2",
}


def write_tiny_gguf(
    path: Path, model: Any, *, architecture: str = "llama", rope_scaling: str | None = None
) -> Path:
    """Write a Llama model of ``tiny_hf_model`` and the tiny tokenizer as fp32 GGUF.

    Args:
        path: the file.
        model: a transformers Llama model.
        architecture: what the file says it is; the layout stays Llama's.
        rope_scaling: a value for ``llama.rope.scaling.type``.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope_scaling is not None:
        writer.add_string(f"{architecture}.rope.scaling.type", rope_scaling)
    _add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        projection = name.split(".")[-2]
        if projection in heads:
            tensor = _interleave_halves(tensor, heads[projection])
        writer.add_tensor(_gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    types = [gguf.TokenType.CONTROL if i in special else 1 for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["t h", "th e", "Ġ the", "i n", "e r", "a n", "o u"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    for pattern, replacement in _NAMES.items():
        if re.fullmatch(pattern, stem):
            return f"{re.sub(pattern, replacement, stem)}.{suffix}"
    raise AssertionError(f"no GGUF name for {name}")


def _interleave_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """llama.cpp rotates neighbouring dimensions, Hugging Face the two halves of a head."""
    head_dim = tensor.shape[0] // num_heads
    halves = tensor.reshape(num_heads, 2, head_dim // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()
