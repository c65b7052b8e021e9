"""``sortserve train --dry-run``: what a run will need, by arithmetic, before anything is loaded.

A token's FLOPs are those of matrix products (2 for each element of a matrix that it meets, and as
many for each gradient), as in Kaplan et al. 2020, section 2.1. Memory counts what a step holds at
once; what torch keeps in reserve comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sortserve.checkpoint.exit_table import exit_table
from sortserve.checkpoint.families import count_layer_parameters
from sortserve.checkpoint.sorted_json import SortedInfo
from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import EXIT_MODULE_KINDS, ExitModule
from sortserve_trainer.run.settings import TrainSettings

__all__ = ["Estimate", "estimate", "estimate_text"]

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}
"""Of dense bfloat16 products, by their makers' data sheets."""
UTILISATION = 0.4
"""Of the peak that training of such models reaches (PaLM, table 3, has 0.21 to 0.46)."""
NUM_CARDS = (1, 2, 4, 8)
LOGIT_ROWS = 8192
"""At most, of one chunk of the loss on a GPU."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs."""

    num_parameters: int
    """Of the base."""
    num_trained: int
    flops_per_token: float
    """Of a training step."""
    weight_bytes: int
    """Weights, gradients and the optimiser's state, of all cards together under FSDP."""
    activation_bytes: int
    """Of one card's micro-batch, the logits and the merged weights of LoRA layers among it."""
    exit_costs: Mapping[int, float]
    """Exit layer to the share of the full depth's products in a forward pass."""
    tokens_per_step: int
    """On one card."""

    def bytes_per_card(self, num_cards: int) -> float:
        """With weights, gradients and optimiser sharded over the cards."""
        return self.weight_bytes / num_cards + self.activation_bytes

    def tokens_per_s(self, flops_per_s: float, num_cards: int) -> float:
        """By a card's peak."""
        return UTILISATION * flops_per_s * num_cards / self.flops_per_token


def estimate(settings: TrainSettings, config: ModelConfig, exits: tuple[int, ...]) -> Estimate:
    """From the settings and the shape of the base.

    Args:
        settings: of the run.
        config: the base's.
        exits: ascending, the last the full depth.
    """
    layer, matrices = count_layer_parameters(config)
    num_layers, hidden, vocab = config.num_layers, config.hidden_size, config.vocab_size
    trunk, head = num_layers * matrices, vocab * hidden
    num_base = num_layers * layer + hidden + head * (1 if config.tie_word_embeddings else 2)
    kinds = _kinds(settings, exits)
    modules = sum(math.prod(s) for kind in kinds.values() for s in kind.shapes(config).values())
    adapter = _adapter_size(settings, config) if settings.trains_adapter else 0
    trained = modules + adapter + (num_base if settings.trains_weights else 0)
    compute_bytes = 4 if settings.dtype == "float32" else 2
    base_bytes = 0.55 if settings.quantize == "nf4" else compute_bytes
    frozen = 0 if settings.trains_weights else num_base
    micro = settings.batch_size * settings.pack_length
    return Estimate(
        num_parameters=num_base,
        num_trained=trained,
        flops_per_token=_flops(settings, config, exits, trunk, kinds, adapter),
        # Weight, gradient and AdamW's two moments, all in float32.
        weight_bytes=int(frozen * base_bytes + trained * 16),
        activation_bytes=_activations(settings, config, exits, micro, compute_bytes),
        exit_costs=_exit_costs(settings, exits, config),
        tokens_per_step=micro * settings.gradient_accumulation,
    )


def estimate_text(found: Estimate, exits: tuple[int, ...]) -> str:
    """The estimate as a person reads it."""
    costs = ", ".join(f"{e}: {found.exit_costs[e]:.0%}" for e in exits)
    lines = [
        f"parameters   {found.num_parameters:,} in the base, {found.num_trained:,} trained "
        f"({found.num_trained / found.num_parameters:.1%})",
        f"compute      {found.flops_per_token / 1e9:.2f} GFLOP a token, "
        f"{found.tokens_per_step:,} tokens a step of each card",
        f"exits        {costs} of the full depth's products",
        f"memory       {found.weight_bytes / GIB:.1f} GiB of weights, gradients and optimiser, "
        "shared among the cards under FSDP; "
        f"{found.activation_bytes / GIB:.1f} GiB of activations on each",
        "",
        "cards   GiB on each   " + "   ".join(f"tokens/s ({name})" for name in PEAK_FLOPS),
    ]
    for count in NUM_CARDS:
        rates = (found.tokens_per_s(peak, count) for peak in PEAK_FLOPS.values())
        cells = "   ".join(f"{rate:>15,.0f}" for rate in rates)
        lines.append(f"{count:>5}   {found.bytes_per_card(count) / GIB:>11.1f}   {cells}")
    lines.append(
        f"Rates are {UTILISATION:.0%} of a card's peak in bfloat16: a guess, not a promise."
    )
    return "\n".join(lines)


def _adapted(settings: TrainSettings, config: ModelConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the linear layers of a block that get LoRA."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "q_proj": (hidden, config.q_size),
        "k_proj": (hidden, config.kv_size),
        "v_proj": (hidden, config.kv_size),
        "o_proj": (config.q_size, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    names = settings.lora_targets or tuple(shapes)
    return [shapes[name] for name in names if name in shapes]


def _adapter_size(settings: TrainSettings, config: ModelConfig) -> int:
    sides = sum(map(sum, _adapted(settings, config)))
    return config.num_layers * settings.resolved.lora_rank * sides


def _merged_elements(settings: TrainSettings, config: ModelConfig) -> int:
    """Of the weights that LoRA layers compute with, and keep for the backward pass (``lora``):
    those of a block at a time where it is recomputed.
    """
    is_merged = settings.trains_adapter and settings.quantize == "none"
    if not is_merged or settings.lora_dropout:
        return 0
    num_blocks = 1 if settings.gradient_checkpointing else config.num_layers
    return num_blocks * sum(math.prod(shape) for shape in _adapted(settings, config))


def _flops(
    settings: TrainSettings,
    config: ModelConfig,
    exits: tuple[int, ...],
    trunk: int,
    kinds: Mapping[int, type[ExitModule]],
    adapter: int,
) -> float:
    """Forward, gradients of activations, gradients of what is trained."""
    method = settings.resolved
    columns = min(method.vocab_sample or config.vocab_size, config.vocab_size)
    heads = len(method.terms(exits, 0, 0)) * columns * config.hidden_size
    whole_head = config.vocab_size * config.hidden_size
    modules = sum(kind.num_matrix_elements(config) for kind in kinds.values())
    flops = 2.0 * trunk + 6.0 * modules + 4.0 * heads
    if method.trains_exits:
        num_own_heads = sum(kind.has_head for kind in kinds.values())
        flops += 2.0 * num_own_heads * columns * config.hidden_size
    if not settings.freeze_trunk:
        flops += 2.0 * trunk
    if settings.trains_weights:
        flops += 2.0 * trunk + 2.0 * heads
    if method.vocab_sample:
        flops += 2.0 * whole_head
    if method.teacher == "base" and method.distill:
        flops += 2.0 * (trunk + whole_head)
    if settings.gradient_checkpointing:
        flops += 2.0 * trunk
    return flops + 4.0 * adapter  # two thin products for each of A's and B's gradients


def _activations(
    settings: TrainSettings,
    config: ModelConfig,
    exits: tuple[int, ...],
    num_tokens: int,
    compute_bytes: int,
) -> int:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.q_size + config.kv_size
    # Of a layer, for its backward: both norms in float32, what each product reads, RoPE, SwiGLU.
    of_layer = 2 * 4 * 4 * hidden + compute_bytes * (4 * hidden + 3 * heads + 4 * inner)
    kept = compute_bytes * hidden * config.num_layers + of_layer
    if not settings.gradient_checkpointing:
        kept = of_layer * config.num_layers
    if settings.freeze_trunk:
        kept = compute_bytes * hidden
    read = len(exits) * hidden * (3 * compute_bytes + 4)
    columns = config.vocab_size * compute_bytes * 2
    merged = compute_bytes * _merged_elements(settings, config)
    return num_tokens * (kept + read) + min(num_tokens, LOGIT_ROWS) * columns + merged


def _exit_costs(
    settings: TrainSettings, exits: tuple[int, ...], config: ModelConfig
) -> dict[int, float]:
    """As the server will tell them, what deeper rows leave at shallower layers of their own too."""
    info = SortedInfo(
        format_version=1,
        base=None,
        num_layers=config.num_layers,
        exits=exits,
        exit_modules=_kind_names(settings, exits),
    )
    return {one.exit_layer: one.compute for one in exit_table(config, info, exits).exits}


def _kinds(settings: TrainSettings, exits: tuple[int, ...]) -> dict[int, type[ExitModule]]:
    return {e: EXIT_MODULE_KINDS[name] for e, name in _kind_names(settings, exits).items()}


def _kind_names(settings: TrainSettings, exits: tuple[int, ...]) -> dict[int, str]:
    """Of the exits below full depth, over a base that has none."""
    method, asked = settings.resolved, settings.asked_kinds
    if method.has_head_phase:
        return dict.fromkeys(exits[:-1], "head")
    asked.check_exits(exits[:-1])
    return {e: asked.at(e, method.exit_modules) for e in exits[:-1]}
