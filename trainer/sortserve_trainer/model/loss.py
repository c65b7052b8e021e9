"""The loss of all exits, without the logits of all exits.

An exit's loss is ``ce * CE(targets, exit) + kl * KL(teacher || exit)``, summed over the target
tokens and divided by their number. The teacher is the full depth, detached, or another model that
reads the same tokens (the frozen base). ``exit_losses`` takes it in chunks of tokens and one exit
at a time, and computes each chunk's gradient on the spot, so that the logits of one chunk and one
exit are all that ever exists of [tokens, vocabulary]; backward only scales what forward kept,
[tokens, hidden] per exit.

With a vocabulary sample the sums over the vocabulary run over the columns that matter to this
chunk: those the teacher finds likely anywhere in it, the targets, and a uniform draw of the
rest whose columns count for all that were not drawn. That is importance sampling of the partition
function (Bengio and Senecal 2008): unbiased for it, and a sixth of the arithmetic of a head of
49,152 tokens. The teacher's own logits are always computed whole.

Shape legend: T target tokens, C tokens of a chunk, D hidden, V vocabulary, K sampled columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from sortserve_trainer.model.loss_chunk import Likely, Plan, Teacher, VocabSample, chunk_class
from sortserve_trainer.run.terms import ExitTerm

__all__ = ["Likely", "Teacher", "VocabSample", "exit_losses", "unlikelihood_loss"]

CHUNK_TOKENS = 1024
"""On a CPU."""
MAX_CHUNK_TOKENS = 8192
CHUNK_SHARE = 1 / 64
"""Of a GPU's memory: for the logits of one chunk, the teacher's and one exit's."""


def exit_losses(
    states: Mapping[int, Tensor],
    heads: Mapping[int, Tensor],
    targets: Tensor,
    terms: Mapping[int, ExitTerm],
    *,
    num_targets: float | Tensor,
    sample: VocabSample | None = None,
    teacher: Teacher | None = None,
    chunk_tokens: int | None = None,
    likely: Likely | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The weighted loss, and each exit's cross-entropy for the log.

    Args:
        states: exit layer to [T, D], as the head reads it.
        heads: exit layer to [V, D]; mostly one tensor for all.
        targets: int64 [T].
        terms: exit layer to weights, of exits in ``states``.
        num_targets: what sums are divided by: the target tokens of the whole global batch.
        sample: None computes every column of every exit.
        teacher: of all exits; None is the deepest of them, which then has no KL of its own.
        chunk_tokens: rows of logits that exist at once. None is what suits the device.
        likely: of the full depth, where it is known; a sample then needs no whole logits.

    Returns:
        A scalar to call backward on, and exit layer to the mean cross-entropy over these T tokens
        (an estimate with ``sample``), detached.
    """
    exits = sorted(states)
    weights = tuple(terms.get(e, ExitTerm()) for e in exits)
    if chunk_tokens is None:
        chunk_tokens = _chunk_tokens(targets.device, heads[exits[-1]].shape[0])
    plan = Plan(tuple(exits), weights, sample, teacher, chunk_tokens, likely)
    unique = list({id(heads[e]): heads[e] for e in exits}.values())
    which = tuple(next(i for i, h in enumerate(unique) if h is heads[e]) for e in exits)
    loss, sums = _ExitLosses.apply(  # type: ignore[no-untyped-call]
        plan, which, targets, num_targets, *unique, *(states[e] for e in exits)
    )
    means = sums.detach() / max(1, targets.numel())
    return loss, {e: means[i] for i, e in enumerate(exits) if terms.get(e) is not None}


def _chunk_tokens(device: torch.device, vocab_size: int) -> int:
    """A power of two: more rows make products efficient, and memory bounds them."""
    if device.type != "cuda":
        return CHUNK_TOKENS
    memory = torch.cuda.get_device_properties(device).total_memory
    rows = int(memory * CHUNK_SHARE) // (2 * 2 * vocab_size)
    return max(CHUNK_TOKENS, min(MAX_CHUNK_TOKENS, 1 << max(0, rows.bit_length() - 1)))


class _ExitLosses(torch.autograd.Function):
    """Forward computes the gradients with the loss; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        which: tuple[int, ...],
        targets: Tensor,
        num_targets: float | Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        num_heads = max(which) + 1
        heads, states = tensors[:num_heads], tensors[num_heads:]
        dtype = _compute_dtype(states[0])
        make_chunk = chunk_class(targets.device, dtype)
        cast = [head.to(dtype) for head in heads]
        wants_head = [ctx.needs_input_grad[4 + i] for i in range(num_heads)]
        head_grads = [
            torch.zeros_like(head, dtype=torch.float32) if wanted else None
            for head, wanted in zip(heads, wants_head, strict=True)
        ]
        # A trunk that is frozen wants no gradient, and its own logits none either.
        wants_state = ctx.needs_input_grad[4 + num_heads :]
        wants = [s or wants_head[w] for s, w in zip(wants_state, which, strict=True)]
        state_grads = [
            torch.zeros_like(state) if wanted else None
            for state, wanted in zip(states, wants_state, strict=True)
        ]
        loss = torch.zeros((), dtype=torch.float32, device=targets.device)
        sums = torch.zeros(len(states), dtype=torch.float32, device=targets.device)
        with torch.autocast(targets.device.type, enabled=False):
            for start in range(0, targets.numel(), plan.chunk_tokens):
                span = slice(start, start + plan.chunk_tokens)
                chunk = make_chunk(
                    plan, which, [s[span].to(dtype) for s in states], cast, targets[span], span
                )
                for i in range(len(states)):
                    term_loss, ce_sum, dlogits = chunk.loss(i, num_targets if wants[i] else None)
                    loss += term_loss / num_targets
                    sums[i] += ce_sum
                    if dlogits is not None:
                        if (state_grad := state_grads[i]) is not None:
                            state_grad[span] = chunk.state_grad(i, dlogits)
                        chunk.add_head_grad(i, dlogits, head_grads[which[i]])
        ctx.grads = [
            None if g is None else g.to(h.dtype) for g, h in zip(head_grads, heads, strict=True)
        ] + state_grads
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        scale = grad_outputs[0]
        grads = [None if grad is None else grad.mul_(scale) for grad in ctx.grads]
        ctx.grads = None
        return (None, None, None, None, *grads)


def _compute_dtype(state: Tensor) -> torch.dtype:
    """Under autocast its dtype, else that of the states."""
    device = state.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else state.dtype


def unlikelihood_loss(
    states: Mapping[int, Tensor],
    heads: Mapping[int, Tensor],
    unwanted: Tensor,
    terms: Mapping[int, ExitTerm],
    *,
    num_targets: float | Tensor,
) -> Tensor:
    """-log(1 - p(unwanted token)), each exit by the weight of its term (arXiv 1908.04319, Eq. 4).

    Args:
        states: exit layer to [U, D], as the head reads it, before each unwanted token.
        heads: exit layer to [V, D].
        unwanted: int64 [U]; few beside the targets: they are what a model says in circles.
        terms: exit layer to weights, of exits in ``states``.
        num_targets: what sums are divided by, as in ``exit_losses``.

    Returns:
        A scalar to call backward on.
    """
    loss = torch.zeros((), device=unwanted.device)
    for exit_layer, term in terms.items():
        # Recomputed in backward, so that the logits of one exit are all that exist at once.
        own = checkpoint(
            _unlikelihood, states[exit_layer], heads[exit_layer], unwanted, use_reentrant=False
        )
        loss = loss + (term.ce + term.kl) * own
    return loss / num_targets


def _unlikelihood(state: Tensor, head: Tensor, unwanted: Tensor) -> Tensor:
    dtype = _compute_dtype(state)
    logits = linear(state.to(dtype), head.to(dtype)).float()
    log_p = logits.log_softmax(-1).gather(1, unwanted[:, None])
    # Where the model is certain 1 - p is nothing in fp32, and its logarithm has no slope.
    return -torch.log1p(-log_p.clamp(max=-1e-4).exp()).sum()
