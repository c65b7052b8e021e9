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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from sortserve_trainer.run.terms import ExitTerm

__all__ = ["Teacher", "VocabSample", "exit_losses", "unlikelihood_loss"]

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class VocabSample:
    """How many columns of the head stand for all of them; see the module's docstring."""

    num_likely: int
    num_drawn: int
    seed: int

    @classmethod
    def of(cls, size: int, seed: int) -> VocabSample | None:
        """``size`` columns, two thirds of them the likely ones; None for 0, which is all."""
        num_likely = size * 2 // 3
        return cls(num_likely, size - num_likely, seed) if size else None


@dataclass(frozen=True)
class Teacher:
    """A model other than the one in training whose distribution all depths learn from."""

    state: Tensor
    """[T, D], as its head reads it."""
    head: Tensor
    """[V, D]."""


def exit_losses(
    states: Mapping[int, Tensor],
    heads: Mapping[int, Tensor],
    targets: Tensor,
    terms: Mapping[int, ExitTerm],
    *,
    num_targets: float,
    sample: VocabSample | None = None,
    teacher: Teacher | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
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
        chunk_tokens: rows of logits that exist at once.

    Returns:
        A scalar to call backward on, and exit layer to the mean cross-entropy over these T tokens
        (an estimate with ``sample``), detached.
    """
    exits = sorted(states)
    weights = tuple(terms.get(e, ExitTerm()) for e in exits)
    plan = _Plan(tuple(exits), weights, sample, teacher, chunk_tokens)
    unique = list({id(heads[e]): heads[e] for e in exits}.values())
    which = tuple(next(i for i, h in enumerate(unique) if h is heads[e]) for e in exits)
    loss, sums = _ExitLosses.apply(  # type: ignore[no-untyped-call]
        plan, which, targets, float(num_targets), *unique, *(states[e] for e in exits)
    )
    means = sums.detach() / max(1, targets.numel())
    return loss, {e: means[i] for i, e in enumerate(exits) if terms.get(e) is not None}


@dataclass(frozen=True)
class _Plan:
    exits: tuple[int, ...]
    terms: tuple[ExitTerm, ...]
    sample: VocabSample | None
    teacher: Teacher | None
    chunk_tokens: int

    def is_teacher(self, index: int) -> bool:
        """Whether the exit at this place of ``exits`` is what the others learn from."""
        return self.teacher is None and index == len(self.exits) - 1

    @property
    def needs_teacher(self) -> bool:
        return self.sample is not None or any(
            term.kl and not self.is_teacher(i) for i, term in enumerate(self.terms)
        )


class _ExitLosses(torch.autograd.Function):
    """Forward computes the gradients with the loss; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        which: tuple[int, ...],
        targets: Tensor,
        num_targets: float,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        num_heads = max(which) + 1
        heads, states = tensors[:num_heads], tensors[num_heads:]
        dtype = _compute_dtype(states[0])
        wants_grad = any(ctx.needs_input_grad)
        cast = [head.to(dtype) for head in heads]
        wants_head = [ctx.needs_input_grad[4 + i] for i in range(num_heads)]
        head_grads = [
            torch.zeros_like(head, dtype=torch.float32) if wanted else None
            for head, wanted in zip(heads, wants_head, strict=True)
        ]
        state_grads = [torch.zeros_like(state) for state in states]
        loss = torch.zeros((), dtype=torch.float32, device=targets.device)
        sums = torch.zeros(len(states), dtype=torch.float32, device=targets.device)
        with torch.autocast(targets.device.type, enabled=False):
            for start in range(0, targets.numel(), plan.chunk_tokens):
                span = slice(start, start + plan.chunk_tokens)
                chunk = _Chunk(
                    plan, which, [s[span].to(dtype) for s in states], cast, targets[span], span
                )
                for i in range(len(states)):
                    term_loss, ce_sum, dlogits = chunk.loss(i, wants_grad)
                    loss += term_loss / num_targets
                    sums[i] += ce_sum
                    if dlogits is not None:
                        dlogits = (dlogits / num_targets).to(dtype)
                        state_grads[i][span] = chunk.state_grad(i, dlogits)
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


class _Chunk:
    """One chunk of tokens: the columns that count in it, and each exit's loss over them."""

    def __init__(
        self,
        plan: _Plan,
        which: tuple[int, ...],
        states: Sequence[Tensor],
        heads: Sequence[Tensor],
        targets: Tensor,
        span: slice,
    ) -> None:
        self.plan, self.which, self.states = plan, which, states
        self.heads, self.targets = list(heads), targets
        self.columns: Tensor | None = None
        self.bias: Tensor | None = None
        self.teacher: Tensor | None = None
        """Log-probabilities [C, V] or [C, K], detached."""
        if plan.needs_teacher:
            self.teacher = self._teacher_log_probs(span)
        if plan.sample is not None:
            assert self.teacher is not None
            self._choose_columns(plan.sample, self.teacher)

    def loss(self, index: int, wants_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """One exit's weighted loss, its cross-entropy sum, and d loss / d logits if wanted."""
        term, is_teacher = self.plan.terms[index], self.plan.is_teacher(index)
        if is_teacher and self.teacher is not None:
            log_q = self.teacher
        elif term.ce or term.kl:
            log_q = self._log_probs(index)
        else:
            zero = self.targets.new_zeros((), dtype=torch.float32)
            return zero, zero, None
        rows = torch.arange(self.targets.numel(), device=self.targets.device)
        ce = -log_q[rows, self.targets].sum()
        if not (term.ce or term.kl):
            return torch.zeros_like(ce), ce, None
        distils = bool(term.kl) and not is_teacher
        kl, p = torch.zeros_like(ce), None
        if distils:
            assert self.teacher is not None
            p = self.teacher.exp()
            kl = (p * (self.teacher - log_q)).sum()
        loss = term.ce * ce + term.kl * kl
        if not wants_grad:
            return loss, ce, None
        dlogits = log_q.exp().mul_(term.ce + (term.kl if distils else 0.0))
        if p is not None:
            dlogits.sub_(p.mul_(term.kl))
        dlogits[rows, self.targets] -= term.ce
        return loss, ce, dlogits

    def state_grad(self, index: int, dlogits: Tensor) -> Tensor:
        return dlogits @ self.heads[self.which[index]]

    def add_head_grad(self, index: int, dlogits: Tensor, grad: Tensor | None) -> None:
        if grad is None:
            return
        own = (dlogits.T @ self.states[index]).float()
        if self.columns is None:
            grad += own
        else:
            grad.index_add_(0, self.columns, own)

    def _teacher_log_probs(self, span: slice) -> Tensor:
        teacher = self.plan.teacher
        if teacher is None:
            return self._log_probs(len(self.states) - 1)
        dtype = self.states[0].dtype
        logits = linear(teacher.state[span].to(dtype), teacher.head.to(dtype))
        return logits.log_softmax(-1, dtype=torch.float32)

    def _log_probs(self, index: int) -> Tensor:
        logits = linear(self.states[index], self.heads[self.which[index]])
        if self.bias is not None:
            return (logits.float() + self.bias).log_softmax(-1)
        return logits.log_softmax(-1, dtype=torch.float32)

    def _choose_columns(self, sample: VocabSample, teacher_CV: Tensor) -> None:
        """Restrict heads, targets and teacher to the columns that stand for all."""
        vocab_size = teacher_CV.shape[1]
        if sample.num_likely + sample.num_drawn + self.targets.numel() >= vocab_size:
            return
        best_V = teacher_CV.amax(dim=0)
        best_V[self.targets] = torch.inf
        num_likely = min(vocab_size, sample.num_likely + int((best_V == torch.inf).sum()))
        is_likely_V = torch.zeros(vocab_size, dtype=torch.bool, device=best_V.device)
        is_likely_V[best_V.topk(num_likely).indices] = True
        rest = (~is_likely_V).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(sample.seed)
        drawn = torch.randperm(rest.numel(), generator=generator)[: sample.num_drawn]
        drawn = rest[drawn.to(rest.device)]
        likely = is_likely_V.nonzero().squeeze(1)
        self.columns = torch.cat([likely, drawn])
        self.bias = torch.zeros(self.columns.numel(), device=best_V.device)
        self.bias[likely.numel() :] = math.log(rest.numel() / max(1, drawn.numel()))
        place_V = torch.full((vocab_size,), -1, dtype=torch.int64, device=best_V.device)
        place_V[self.columns] = torch.arange(self.columns.numel(), device=best_V.device)
        self.targets = place_V[self.targets]
        self.heads = [head[self.columns] for head in self.heads]
        self.teacher = (teacher_CV[:, self.columns] + self.bias).log_softmax(-1)


def unlikelihood_loss(
    states: Mapping[int, Tensor],
    heads: Mapping[int, Tensor],
    unwanted: Tensor,
    terms: Mapping[int, ExitTerm],
    *,
    num_targets: float,
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
