"""What each training method asks of each exit at each step (no torch).

soft      Sorted Fine-Tuning as published: mean cross-entropy over all exits (arXiv 2309.08968,
Eq. 1), shared final norm and head
sft       fine-tuning of the full depth alone
sft+ict   sft, then every block frozen and one head per exit trained for one more epoch (the
paper's "Early-Exit" baseline)
soft+kd   ours: the full depth keeps a fixed share of the loss, exits learn from its detached
distribution, and each has a small module before the shared head
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sortserve.model.exit_module import NO_MODULE
from sortserve_trainer.run.terms import ExitTerm

__all__ = ["DEFAULT_METHOD", "METHODS", "Method", "Weighting"]

DEFAULT_METHOD = "soft+kd"

Weighting = Literal["equal", "depth", "depth-squared"]
_POWERS: dict[Weighting, float] = {"equal": 0.0, "depth": 1.0, "depth-squared": 2.0}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method; the command line may override the fields that are not its definition."""

    name: str
    summary: str
    trains_exits: bool = True
    """Whether exits below full depth have a loss of their own."""
    protect: float | None = None
    """Share of the loss the full depth keeps; None is the plain mean over all exits."""
    weighting: Weighting = "equal"
    """How exits share the rest: equally, or each by 1 / (layers it lacks), plain or squared: an
    exit just below the full depth is used most, has least excuse, and its small loss would drown
    among the others."""
    distill: float = 0.0
    """Share of an exit's loss that is KL(teacher || exit); the rest is cross-entropy."""
    teacher: Literal["full", "base"] = "full"
    """Whose distribution exits learn from: the full depth's own, detached, or that of the base as
    it was before training, which then teaches the full depth too and keeps it what it was."""
    unlikelihood: float = 0.0
    """Weight of the loss on what generated answers repeat, beside that on targets."""
    exits_per_step: int | None = None
    """Exits below full depth that a step trains, drawn anew each step; None is all."""
    exit_modules: str = NO_MODULE
    """A name in ``EXIT_MODULE_KINDS``: new modules of exits below full depth."""
    lora_rank: int = 0
    """0 trains all weights."""
    learning_rate: float = 2e-5
    vocab_sample: int = 0
    """Columns of the head that stand for all in the loss (``loss.VocabSample``); 0 is all."""
    has_head_phase: bool = False
    """Whether a second phase trains a head per exit over frozen blocks."""

    def terms(self, exits: Sequence[int], step: int, seed: int) -> dict[int, ExitTerm]:
        """The weights of each exit's losses at a step; they sum to 1.

        Args:
            exits: ascending, the last the full depth.
            step: optimiser step, from 0; all micro-batches of a step agree.
            seed: of the run.
        """
        *shallow, full = exits
        if not self.trains_exits or not shallow:
            return {full: ExitTerm(ce=1.0)}
        if self.exits_per_step is not None and self.exits_per_step < len(shallow):
            drawn = random.Random(seed * 1_000_003 + step)
            shallow = sorted(drawn.sample(shallow, self.exits_per_step))
        protect = 1.0 / (len(shallow) + 1) if self.protect is None else self.protect
        parts = {e: (full - e) ** -_POWERS[self.weighting] for e in shallow}
        unit = (1.0 - protect) / sum(parts.values())
        terms = {
            e: ExitTerm(ce=unit * part * (1.0 - self.distill), kl=unit * part * self.distill)
            for e, part in parts.items()
        }
        own = self.distill if self.teacher == "base" else 0.0
        return {**terms, full: ExitTerm(ce=protect * (1.0 - own), kl=protect * own)}


METHODS = {
    method.name: method
    for method in (
        Method(
            name="soft+kd",
            summary="ours, the default: protected full depth, distillation, exit modules, LoRA",
            protect=0.6,
            weighting="depth",
            distill=0.9,
            exit_modules="affine",
            lora_rank=64,
            learning_rate=1e-3,
            vocab_sample=4608,
        ),
        Method(name="soft", summary="Sorted Fine-Tuning as published"),
        Method(name="sft", summary="fine-tuning of the full depth alone", trains_exits=False),
        Method(
            name="sft+ict",
            summary="sft, then one head per exit over frozen blocks",
            trains_exits=False,
            has_head_phase=True,
        ),
    )
}
