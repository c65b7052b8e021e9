"""One chunk of tokens of the loss of all exits; see ``loss``.

Shape legend: C tokens of a chunk, D hidden, V vocabulary, K sampled columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import linear

from sortserve_trainer.model.loss_rows import row_losses, row_losses_work, row_lse
from sortserve_trainer.run.terms import ExitTerm

__all__ = ["Chunk", "FusedChunk", "Likely", "Plan", "Teacher", "VocabSample", "chunk_class"]


@dataclass(frozen=True)
class VocabSample:
    """How many columns of the head stand for all of them; see ``loss``."""

    num_likely: int
    """The targets among them; a chunk of more tokens has as many as tokens."""
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


@dataclass(frozen=True)
class Likely:
    """What the teacher finds likeliest at each token, known before its logits are.

    With it a vocabulary sample is chosen first, and the teacher's logits are computed at the
    chosen columns alone: a sixth of the arithmetic, and the same distribution over them.
    """

    ids: Tensor
    """int64 [T, k], k columns of each token."""
    log_probs: Tensor
    """float32 [T, k]."""

    @classmethod
    def of(cls, cached: Mapping[str, Tensor] | None) -> Likely | None:
        """From what ``CachedTrunk`` reads; None where that has none."""
        if cached is None or "likely_ids" not in cached:
            return None
        at = cached["target_at"]
        ids, log_probs = cached["likely_ids"], cached["likely_log_probs"]
        return cls(ids.index_select(0, at).long(), log_probs.index_select(0, at))


@dataclass(frozen=True)
class Plan:
    """What is computed of every chunk."""

    exits: tuple[int, ...]
    terms: tuple[ExitTerm, ...]
    sample: VocabSample | None
    teacher: Teacher | None
    chunk_tokens: int
    likely: Likely | None = None

    def is_teacher(self, index: int) -> bool:
        """Whether the exit at this place of ``exits`` is what the others learn from."""
        return self.teacher is None and index == len(self.exits) - 1

    @property
    def needs_teacher(self) -> bool:
        """Whether anything reads the teacher's distribution."""
        return self.sample is not None or any(
            term.kl and not self.is_teacher(i) for i, term in enumerate(self.terms)
        )


class Chunk:
    """One chunk of tokens: the columns that count in it, and each exit's loss over them."""

    def __init__(
        self,
        plan: Plan,
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
        self._probs: tuple[Tensor, Tensor] | None = None
        likely = plan.likely if plan.teacher is None else None
        if plan.sample is not None and likely is not None:
            self._choose_columns(plan.sample, self._likeliest_known(likely, span))
        if plan.needs_teacher:
            self.teacher = self._teacher_log_probs(span)
        if plan.sample is not None and likely is None:
            assert self.teacher is not None
            self._choose_columns(plan.sample, self._likeliest(self.teacher))
            if self.columns is not None:
                self._restrict_teacher(self.teacher[:, self.columns])

    def loss(
        self, index: int, num_targets: float | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One exit's weighted loss, its cross-entropy sum, and the gradient of its logits.

        Args:
            index: of the exit, in ``plan.exits``.
            num_targets: what the gradient is divided by; None wants none.

        Returns:
            Two sums over the tokens, float32; and [C, V] or [C, K] in the dtype of the states.
        """
        term, is_teacher = self.plan.terms[index], self.plan.is_teacher(index)
        if is_teacher and self.teacher is not None:
            log_q = self.teacher
        elif term.ce or term.kl:
            log_q = self._log_probs(index)
        else:
            return self._nothing()
        rows = torch.arange(self.targets.numel(), device=self.targets.device)
        ce = -log_q[rows, self.targets].sum()
        if not (term.ce or term.kl):
            return torch.zeros_like(ce), ce, None
        loss, p = term.ce * ce, None
        if term.kl and not is_teacher:
            p, negentropy_C = self._teacher_probs()
            loss = loss + term.kl * (negentropy_C - vecdot(p, log_q)).sum()
        if num_targets is None:
            return loss, ce, None
        # In place: what is read and written here is most of the time beside the two products.
        # The teacher's own comes last, when no other exit reads it.
        dlogits = log_q.exp_().mul_(term.ce + (term.kl if p is not None else 0.0))
        if p is not None:
            dlogits.sub_(p, alpha=term.kl)
        dlogits[rows, self.targets] -= term.ce
        return loss, ce, dlogits.div_(num_targets).to(self.states[index].dtype)

    def _teacher_probs(self) -> tuple[Tensor, Tensor]:
        """Once for all exits: the teacher's probabilities, and the sum of ``p log p`` of each row,
        float32 [C].
        """
        if self._probs is None:
            assert self.teacher is not None
            p = self.teacher.exp()
            self._probs = p, vecdot(p, self.teacher)
        return self._probs

    def _nothing(self) -> tuple[Tensor, Tensor, None]:
        zero = self.targets.new_zeros((), dtype=torch.float32)
        return zero, zero, None

    def state_grad(self, index: int, dlogits: Tensor) -> Tensor:
        """The gradient of an exit's states, [C, D]."""
        return dlogits @ self.heads[self.which[index]]

    def add_head_grad(self, index: int, dlogits: Tensor, grad: Tensor | None) -> None:
        """Add the gradient of an exit's head to ``grad``, float32 [V, D]; None wants none."""
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
            return logits.float().add_(self.bias).log_softmax(-1)
        return logits.log_softmax(-1, dtype=torch.float32)

    def _choose_columns(self, sample: VocabSample, best_V: Tensor) -> None:
        """Restrict heads and targets to the columns that stand for all.

        Their number is known to the host, which waits for nothing. ``best_V`` is overwritten.
        """
        vocab_size, device = best_V.shape[0], best_V.device
        num_likely = max(sample.num_likely, self.targets.numel())
        num_rest = vocab_size - num_likely
        if sample.num_drawn >= num_rest:
            return
        best_V.index_fill_(0, self.targets, torch.inf)
        likely = best_V.topk(num_likely).indices.sort().values
        generator = torch.Generator(device).manual_seed(sample.seed)
        lots_V = torch.rand(vocab_size, generator=generator, device=device)
        drawn = lots_V.index_fill_(0, likely, -1.0).topk(sample.num_drawn).indices
        self.columns = torch.cat([likely, drawn])
        self.bias = torch.zeros(self.columns.numel(), device=device)
        self.bias[num_likely:] = math.log(num_rest / max(1, sample.num_drawn))
        place_V = torch.full((vocab_size,), -1, dtype=torch.int64, device=device)
        place_V[self.columns] = torch.arange(self.columns.numel(), device=device)
        self.targets = place_V[self.targets]
        self.heads = [head[self.columns] for head in self.heads]

    def _likeliest_known(self, likely: Likely, span: slice) -> Tensor:
        """float32 [V], as ``_likeliest`` has it, from each token's best columns alone."""
        vocab_size = self.heads[self.which[-1]].shape[0]
        best_V = torch.full((vocab_size,), -torch.inf, device=self.targets.device)
        ids, log_probs = likely.ids[span].flatten(), likely.log_probs[span].flatten().float()
        return best_V.scatter_reduce_(0, ids, log_probs, reduce="amax")

    def _likeliest(self, teacher_CV: Tensor) -> Tensor:
        """float32 [V]: the best that any token of the chunk thinks of a column."""
        return teacher_CV.amax(dim=0)

    def _restrict_teacher(self, teacher_CK: Tensor) -> None:
        assert self.bias is not None
        self.teacher = (teacher_CK + self.bias).log_softmax(-1)


class FusedChunk(Chunk):
    """The same with logits where ``Chunk`` has log-probabilities, and one kernel for each exit.

    Between the two products of an exit the logits are read twice and written once, in the dtype
    of the products.
    """

    teacher_lse: Tensor | None = None
    """float32 [C]."""

    def loss(
        self, index: int, num_targets: float | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``Chunk``."""
        term, is_teacher = self.plan.terms[index], self.plan.is_teacher(index)
        logits = self.teacher if is_teacher else None
        if logits is None:
            if not (term.ce or term.kl):
                return self._nothing()
            logits = self._logits(index)
        distils = bool(term.kl) and not is_teacher
        if distils and self.teacher_lse is None:
            assert self.teacher is not None
            self.teacher_lse = row_lse(self.teacher, self.bias)
        wants_grad = num_targets is not None and bool(term.ce or term.kl)
        # What the last exit, the teacher, has is overwritten when no other needs it.
        ce_C, kl_C = row_losses(
            logits,
            self.targets,
            teacher=self.teacher if distils else None,
            teacher_lse=self.teacher_lse if distils else None,
            bias=self.bias,
            ce_weight=term.ce,
            kl_weight=term.kl if distils else 0.0,
            divisor=num_targets if wants_grad else None,
        )
        ce = ce_C.sum()
        loss = term.ce * ce + (term.kl * kl_C.sum() if distils else 0.0)
        return loss, ce, logits if wants_grad else None

    def _teacher_log_probs(self, span: slice) -> Tensor:
        teacher = self.plan.teacher
        if teacher is None:
            return self._logits(len(self.states) - 1)
        dtype = self.states[0].dtype
        return linear(teacher.state[span].to(dtype), teacher.head.to(dtype))

    def _logits(self, index: int) -> Tensor:
        return linear(self.states[index], self.heads[self.which[index]])

    def _likeliest(self, teacher_CV: Tensor) -> Tensor:
        lse_C = row_lse(teacher_CV, None)
        return (teacher_CV - lse_C[:, None].to(teacher_CV.dtype)).amax(dim=0).float()

    def _restrict_teacher(self, teacher_CK: Tensor) -> None:
        self.teacher = teacher_CK.contiguous()


def chunk_class(device: torch.device, dtype: torch.dtype) -> type[Chunk]:
    """What computes chunks fastest on a device."""
    is_fused = device.type == "cuda" and row_losses_work(device, dtype)
    return FusedChunk if is_fused else Chunk
