"""The supported families: from a transformers config to ``ModelConfig`` and tensor names.

Every check that can refuse a checkpoint is here and reads the configuration alone, so that a
refusal costs no weights.

Shape legend: D hidden, V vocabulary, H head_dim, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sortserve.checkpoint.ouro_config import num_loops
from sortserve.checkpoint.quantization import Quantization
from sortserve.core.errors import CheckpointError
from sortserve.model.config import ModelConfig
from sortserve.model.rope import check_rope, context_length, rope_frequencies

__all__ = [
    "FAMILIES",
    "Family",
    "check_family",
    "check_in_transformers",
    "count_layer_parameters",
    "read_model_config",
    "tensor_shapes",
]


@dataclass(frozen=True)
class Family:
    """What sets a family apart from the others."""

    architecture: str
    """The class: transformers', or that of the code that comes with the model."""
    switches: Callable[[Any], dict[str, Any]]
    """From a transformers config, the fields of ``ModelConfig`` that are not as in all others."""
    is_in_transformers: bool = True
    """Whether transformers has the class: what is not served but trained, evaluated, exported or
    merged needs it."""


def _llama(hf_config: Any) -> dict[str, bool]:
    attention_bias, mlp_bias = _flag(hf_config, "attention_bias"), _flag(hf_config, "mlp_bias")
    return {"qkv_bias": attention_bias, "o_bias": attention_bias, "mlp_bias": mlp_bias}


def _qwen3(hf_config: Any) -> dict[str, bool]:
    attention_bias = _flag(hf_config, "attention_bias")
    return {"qkv_bias": attention_bias, "o_bias": attention_bias, "qk_norm": True}


def _ouro(hf_config: Any) -> dict[str, Any]:
    return {"num_loops": num_loops(hf_config), "output_norms": True}


def _flag(hf_config: Any, name: str) -> bool:
    return bool(getattr(hf_config, name, False))


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", lambda hf_config: {}),
    "qwen2": Family("Qwen2ForCausalLM", lambda hf_config: {"qkv_bias": True}),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3),
    "ouro": Family("OuroForCausalLM", _ouro, is_in_transformers=False),
}
"""By ``model_type``."""

_ALIASES = {"ministral": "mistral"}
"""What transformers calls a Mistral whose config has ``layer_types``."""


def check_family(raw_config: Mapping[str, Any]) -> None:
    """Refuse a ``config.json`` of another family, or quantised in another way, by name.

    Raises:
        CheckpointError: ``model_type`` is missing or unknown, or ``quantization_config`` is not
            supported.
    """
    family = raw_config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"model family {family!r} is not supported; supported: {', '.join(FAMILIES)}."
        )
    Quantization.read(raw_config)


def check_in_transformers(config: ModelConfig) -> None:
    """Refuse what takes transformers' own model of a family that transformers has not.

    Raises:
        CheckpointError: it is of such a family.
    """
    if not FAMILIES[config.family].is_in_transformers:
        raise CheckpointError(
            f"models of family {config.family!r} are served, and that is all: transformers has no "
            "class for them, so they are not trained, evaluated or exported here, nor are adapters "
            "merged into them."
        )


def read_model_config(hf_config: Any) -> ModelConfig:
    """The architecture of a transformers config whose family ``check_family`` has accepted.

    Raises:
        CheckpointError: a feature the decoder does not have, named.
    """
    hidden_size, num_heads = hf_config.hidden_size, hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hidden_size // num_heads
    check_rope(hf_config.rope_parameters, head_dim)
    family = _ALIASES.get(hf_config.model_type, hf_config.model_type)
    switches = FAMILIES[family].switches(hf_config)
    config = ModelConfig(
        family=family,
        num_layers=hf_config.num_hidden_layers * switches.get("num_loops", 1),
        hidden_size=hidden_size,
        intermediate_size=hf_config.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=hf_config.vocab_size,
        rms_norm_eps=hf_config.rms_norm_eps,
        max_position_embeddings=context_length(hf_config),
        tie_word_embeddings=bool(hf_config.tie_word_embeddings),
        sliding_window=_sliding_window(hf_config),
        **switches,
    )
    if hf_config.hidden_act != "silu":
        raise CheckpointError(
            f"hidden_act={hf_config.hidden_act!r} is not supported; supported: silu."
        )
    _check_sizes(config)
    rope_frequencies(hf_config, head_dim)  # refuses what gives no numbers
    return config


def _sliding_window(hf_config: Any) -> int | None:
    """The window, if any layer has one: the served context is capped to it.

    Up to that length a sliding layer attends to all a full one does, so any mix of the two is
    exact.
    """
    window: int | None = getattr(hf_config, "sliding_window", None)
    layer_types = getattr(hf_config, "layer_types", None)
    unknown = sorted(set(layer_types or ()) - {"full_attention", "sliding_attention"})
    if unknown:
        raise CheckpointError(
            f"attention type {unknown[0]!r} is not supported; "
            "supported: full_attention, sliding_attention."
        )
    if layer_types is None:
        return window
    if "sliding_attention" not in layer_types:
        return None
    if window is None:
        raise CheckpointError(
            "layer_types names sliding_attention, but there is no sliding_window."
        )
    return window


def _check_sizes(config: ModelConfig) -> None:
    if config.head_dim < 1:
        raise CheckpointError(
            f"hidden_size={config.hidden_size} is less than num_attention_heads={config.num_heads}."
        )
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads={config.num_heads} is not a multiple of "
            f"num_key_value_heads={config.num_kv_heads}."
        )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this architecture must hold, by its Hugging Face name."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config.num_stack_layers):
        prefix = f"model.layers.{index}."
        shapes |= {prefix + name: shape for name, shape in _layer_shapes(config).items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    linears = {
        "self_attn.q_proj": (config.q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (config.kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (config.kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, config.q_size, config.o_bias),
        "mlp.gate_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.up_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, intermediate, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out_features, in_features, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (out_features, in_features)
        if has_bias:
            shapes[f"{name}.bias"] = (out_features,)
    shapes["input_layernorm.weight"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if config.output_norms:
        shapes["input_layernorm_2.weight"] = (hidden,)
        shapes["post_attention_layernorm_2.weight"] = (hidden,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (head_dim,)
        shapes["self_attn.k_norm.weight"] = (head_dim,)
    return shapes


def count_layer_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters of one decoder layer: all of them, and those of its matrices alone."""
    shapes = _layer_shapes(config).values()
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    vectors = sum(shape[0] for shape in shapes if len(shape) == 1)
    return matrices + vectors, matrices
