"""Tiny random checkpoints of every supported family, made in well under a second.

    path = make_tiny_checkpoint(tmp_path, "qwen3-untied", exits=(2, 4, 6), exit_kinds={2: "mlp"})
    model = load_hf(path)                        # transformers' own model, fp32, eval
    logits_TV = hf_logits(model, ids, num_layers=4)

All models have NUM_LAYERS layers and the tokenizer of ``tiny_tokenizer``; weights are drawn from
one seed per variant and large enough that the logits of two tokens, and of two exits, differ
clearly. ``VARIANTS`` lists the names.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.hf import load_hf_config
from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS
from support.reference import apply_exit_module

disable_progress_bar()
# On matrices this small, threads only wait for each other: seconds a test on a busy machine.
torch.set_num_threads(1)

__all__ = [
    "EOS_TOKEN",
    "EXIT_KINDS",
    "LAYER_KINDS",
    "NUM_LAYERS",
    "VARIANTS",
    "VOCAB_SIZE",
    "hf_logits",
    "hf_submodel",
    "load_hf",
    "make_tiny_checkpoint",
    "mixed_kinds",
    "random_exit_module",
    "read_exit_module",
    "tiny_hf_model",
    "tiny_tokenizer",
    "write_sorted_json",
]

NUM_LAYERS = 6
EXIT_KINDS = ("none", "norm", "affine", "mlp")
"""Those that the laws mix, one at each of four exits."""
LAYER_KINDS = ("head", "layer", "none", "layer")
"""Likewise, with layers, which have keys and values of their own, and an own head."""
EOS_TOKEN = "<|im_end|>"

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", EOS_TOKEN)
_MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("a", "n"), ("o", "u"))
VOCAB_SIZE = 288  # 3 special tokens, 256 bytes, the merges; the rest is padding, as in real models

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def _rope(rope_type: str, **parameters: float) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 4.0, **parameters}


_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-head-dim-24": ("llama", {"head_dim": 24}),
    "llama-head-dim-10": ("llama", {"head_dim": 10, "tie_word_embeddings": False}),
    "llama-rope-llama3": (
        "llama",
        {
            "rope_parameters": _rope(
                "llama3",
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        },
    ),
    "llama-rope-linear": ("llama", {"rope_parameters": _rope("linear")}),
    "llama-rope-yarn": (
        "llama",
        {"rope_parameters": _rope("yarn", original_max_position_embeddings=64)},
    ),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 128}),
    "qwen2-tied": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2-rope-yarn": (
        "qwen2",
        {"rope_parameters": _rope("yarn", original_max_position_embeddings=64)},
    ),
    "qwen3-tied": ("qwen3", {}),
    "qwen3-untied": ("qwen3", {"tie_word_embeddings": False, "head_dim": 24}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
}

VARIANTS: tuple[str, ...] = tuple(_VARIANTS)

_MODELS: dict[str, Any] = {}
"""Those made so far, by what they were made of."""
_FILES: dict[str, dict[str, bytes]] = {}
"""Files of the checkpoints made so far, by what they were made of."""
_CONFIGS: dict[bytes, ModelConfig] = {}
"""By the contents of ``config.json``."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text round-trips, a few merges make multi-byte tokens.

    Each call makes its own, so that a test may give it another template or more tokens.
    """
    return copy.deepcopy(_tiny_tokenizer())


@cache
def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [left + right for left, right in _MERGES]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(_MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_hf_model(variant: str = "llama-tied", **overrides: Any) -> Any:
    """A random transformers model of ``variant`` in fp32, in eval mode; the same every time.

    ``overrides`` are further fields of the transformers config (``num_hidden_layers=4``, ...).
    """
    key = repr((variant, sorted(overrides.items())))
    if key not in _MODELS:
        _MODELS[key] = _make_hf_model(variant, **overrides)
    return copy.deepcopy(_MODELS[key])  # a tenth of the time


def _make_hf_model(variant: str, **overrides: Any) -> Any:
    family, fields = _VARIANTS[variant]
    config = CONFIG_MAPPING[family](**copy.deepcopy({**_BASE, **fields, **overrides}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(variant.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias") or "embed" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.6 / parameter.shape[1] ** 0.5)
    return model


def make_tiny_checkpoint(
    folder: Path,
    variant: str = "llama-tied",
    exits: Sequence[int] | None = (2, 4, 6),
    exit_kinds: Mapping[int, str] | None = None,
    *,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a checkpoint of ``variant`` to ``folder`` and return the folder.

    Args:
        folder: created if missing.
        variant: one of VARIANTS.
        exits: ascending, the last is the number of layers; None writes no ``sorted.json``.
        exit_kinds: exit layer to the name of a kind; an exit that is missing has none.
        max_shard_size: below about 100KB the weights come in several shards.
        overrides: further fields of the transformers config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = repr((variant, max_shard_size, sorted(overrides.items())))
    if key not in _FILES:  # the same every time, and made hundreds of times in a run of the suite
        with tempfile.TemporaryDirectory() as made:
            tiny_hf_model(variant, **overrides).save_pretrained(made, max_shard_size=max_shard_size)
            tiny_tokenizer().save_pretrained(made)
            _FILES[key] = {path.name: path.read_bytes() for path in Path(made).iterdir()}
    for name, content in _FILES[key].items():
        (folder / name).write_bytes(content)
    if exits is not None:
        write_sorted_json(folder, exits, exit_kinds)
    return folder


def mixed_kinds(exits: Sequence[int], variant: str) -> dict[int, str]:
    """A kind for each of five exits but the last: with layers and a head where it is Qwen."""
    kinds = LAYER_KINDS if variant.startswith("qwen") else EXIT_KINDS
    return dict(zip(exits[:-1], kinds, strict=True))


def write_sorted_json(
    folder: Path,
    exits: Sequence[int],
    exit_kinds: Mapping[int, str] | None = None,
    **fields: Any,
) -> None:
    """Write ``sorted.json``, and random exit modules where ``exit_kinds`` asks for any.

    Scores rise linearly with depth and end at 1; ``fields`` override top-level fields.
    """
    exit_kinds = dict(exit_kinds or {})
    num_layers = exits[-1]
    document = {
        "format_version": 1,
        "num_layers": num_layers,
        "exits": list(exits),
        "recipe": {"method": "random"},
        "exit_modules": {str(exit_layer): kind for exit_layer, kind in exit_kinds.items()},
        "quality": {str(e): {"loss": 3.0 - e / num_layers, "score": e / num_layers} for e in exits},
        **fields,
    }
    (folder / "sorted.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    if not exit_kinds or not (folder / "config.json").is_file():
        return
    config = _config_of(folder)
    tensors = {
        f"exits.{exit_layer}.{name}": tensor
        for exit_layer, kind in exit_kinds.items()
        for name, tensor in random_exit_module(kind, config, seed=exit_layer).items()
    }
    if tensors:
        save_file(tensors, folder / "exit_modules.safetensors")


def _config_of(folder: Path) -> ModelConfig:
    content = (folder / "config.json").read_bytes()
    if content not in _CONFIGS:
        _CONFIGS[content] = read_model_config(load_hf_config(folder))
    return _CONFIGS[content]


def random_exit_module(kind: str, config: ModelConfig, *, seed: int) -> dict[str, Tensor]:
    """The tensors of one exit module, named as in ``exit_modules.safetensors``, no prefix."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {}
    for name, shape in EXIT_MODULE_KINDS[kind].shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1.0 + 0.2 * noise if len(shape) == 1 else noise / math.sqrt(shape[1])
    return tensors


def read_exit_module(folder: Path, exit_layer: int) -> dict[str, Tensor]:
    """The tensors of one exit as ``random_exit_module`` made them; empty where there are none."""
    path = folder / "exit_modules.safetensors"
    prefix = f"exits.{exit_layer}."
    tensors = load_file(path) if path.is_file() else {}
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def load_hf(folder: Path) -> Any:
    """transformers' own model of a checkpoint folder, fp32, eval; of an Ouro ours."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "ouro":
        from support.ouro import load_ouro

        return load_ouro(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_submodel(model: Any, num_layers: int, *, final_norm: bool = True) -> Any:
    """transformers' model of the first ``num_layers`` layers, sharing the weights of ``model``.

    It is a whole transformers model (``num_hidden_layers = E``): ``generate`` works on it. It is
    made once for each depth, since that takes longer than a tiny model's answer.

    Args:
        model: the whole one.
        num_layers: how many.
        final_norm: whether there is one; else the last hidden state is the trunk's.
    """
    made = vars(model).setdefault("submodels_of_tests", {})
    sub = made.get((num_layers, final_norm))
    if sub is None:
        sub = made[num_layers, final_norm] = _make_submodel(model, num_layers)
    sub.model.embed_tokens = model.model.embed_tokens
    sub.model.layers = nn.ModuleList(list(model.model.layers)[:num_layers])
    sub.model.norm = model.model.norm if final_norm else nn.Identity()
    sub.model.rotary_emb = model.model.rotary_emb
    sub.lm_head = model.lm_head
    return sub.eval()


def hf_layered_submodel(model: Any, num_layers: int, tensors: Mapping[str, Tensor]) -> Any:
    """transformers' model of the first layers, one more with these weights, and the norm there."""
    sub = hf_submodel(model, num_layers + 1)
    # A plain one, whatever an adapter has made of those of the model.
    layer = type(model.model.layers[0])(sub.config, num_layers)
    norm = copy.deepcopy(model.model.norm)
    state = dict(tensors)
    norm.load_state_dict({"weight": state.pop("norm.weight")})
    layer.load_state_dict({_in_a_layer(name): tensor for name, tensor in state.items()})
    sub.model.layers = nn.ModuleList([*list(model.model.layers)[:num_layers], layer])
    sub.model.norm = norm
    return sub.eval()


def _in_a_layer(name: str) -> str:
    """What transformers calls a tensor of the module ``layer``, within a decoder layer."""
    name = name.replace("attn_norm.", "input_layernorm.")
    name = name.replace("mlp_norm.", "post_attention_layernorm.")
    if name.startswith(("q_", "k_", "v_", "o_")):
        return f"self_attn.{name}"
    return f"mlp.{name}" if "proj" in name else name


def _make_submodel(model: Any, num_layers: int) -> Any:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:num_layers]
    with torch.device("meta"):
        return type(model)(config)


@torch.no_grad()
def hf_logits(
    model: Any,
    ids: Sequence[int],
    num_layers: int | None = None,
    exit_module: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """transformers' logits [T, V] with the first ``num_layers`` layers (all by default).

    ``exit_module``: tensors of ``read_exit_module``; with any, the trunk's hidden state passes it
    (in plain torch) in place of the shared final norm. A module that is a layer is transformers'
    own, the last of a model of one layer more.
    """
    if hasattr(model, "exit_logits"):
        looped_TV: Tensor = model.exit_logits(ids, num_layers, exit_module)
        return looped_TV
    depth = model.config.num_hidden_layers if num_layers is None else num_layers
    if exit_module and "q_proj.weight" in exit_module:
        layered = hf_layered_submodel(model, depth, exit_module)
        own_TV: Tensor = layered(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return own_TV
    sub = hf_submodel(model, depth, final_norm=not exit_module)
    ids_1T = torch.tensor([list(ids)])
    h_TD = sub.model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
    if exit_module:
        h_TD = apply_exit_module(h_TD, exit_module, model.model.norm.variance_epsilon)
    if exit_module and "lm_head.weight" in exit_module:
        return torch.nn.functional.linear(h_TD, exit_module["lm_head.weight"])
    logits_TV: Tensor = sub.lm_head(h_TD)
    return logits_TV
