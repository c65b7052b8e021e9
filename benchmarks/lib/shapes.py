"""Checkpoints of random weights in the shape of real models, for machines with nothing to load."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sortserve.model.config import ModelConfig

__all__ = ["SHAPES", "config_of", "exits_of", "make_random_llama"]

_LLAMA: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {  # Llama 3.2 1B's
        **_LLAMA,
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "smollm2-135m": {
        **_LLAMA,
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "tiny": {
        **_LLAMA,
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
"""Fields of transformers' ``LlamaConfig``, by name."""
_EXITS = {"1b": "8,16", "smollm2-135m": "18,24,30", "tiny": "2,4"}


def config_of(shape: str) -> ModelConfig:
    """The same as our model code has it."""
    fields = SHAPES[shape]
    return ModelConfig(
        family="llama",
        num_layers=fields["num_hidden_layers"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        vocab_size=fields["vocab_size"],
        rms_norm_eps=fields["rms_norm_eps"],
        max_position_embeddings=fields["max_position_embeddings"],
        tie_word_embeddings=fields["tie_word_embeddings"],
    )


def exits_of(shape: str) -> str:
    """The exits that a model of this shape is measured at, separated by commas."""
    return _EXITS[shape]


def make_random_llama(folder: Path, shape: str, device: str) -> None:
    """A checkpoint in bf16, with the tokenizer of the tests."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from support.tiny_models import tiny_tokenizer

    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Makes one; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lib.shapes", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    make_random_llama(arguments.folder, arguments.shape, arguments.device)
    print(json.dumps({"shape": arguments.shape}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
