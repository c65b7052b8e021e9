"""The architecture of a decoder, family quirks resolved (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ModelConfig"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder of a supported family."""

    family: str
    """A key of ``checkpoint.families.FAMILIES``."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    """The longest context, in tokens, as RoPE scaling stretches it."""
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Qwen3: RMSNorm over head_dim of each query and key head, before RoPE."""
    sliding_window: int | None = None
    """If set, the served context is capped to it: below it, sliding and full attention agree."""
    num_loops: int = 1
    """Ouro: so often its layers are run, one after another, and the final norm between two times.
    ``num_layers`` is the depth, each layer counted once for each time: layer l has the weights of
    layer ``l % num_stack_layers``, and keys and values of its own."""
    output_norms: bool = False
    """Ouro: RMSNorm of what attention and MLP give, before it is added to the residual stream."""

    @property
    def num_stack_layers(self) -> int:
        """Layers that have weights of their own."""
        return self.num_layers // self.num_loops

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads."""
        return self.num_kv_heads * self.head_dim
