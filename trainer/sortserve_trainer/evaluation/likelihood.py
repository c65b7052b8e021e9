"""How likely each exit finds held-out text, and how close it is to the full depth.

Exact over the whole vocabulary and in float32 from the head on, a chunk of tokens and an exit at a
time, so that the logits of two exits and ``CHUNK_TOKENS`` tokens are all that ever exists.

Under a depth schedule token k of an answer is predicted at the exit of its place. The keys and
values that it needs are those of the true text up to that exit, which deeper tokens have too. So
its loss is the loss of that exit at that position, and nothing more is computed.

Shape legend: T tokens of a pack, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sortserve.core.schedule import MAX_TOKEN, DepthSchedule
from sortserve.model.weight import PLAIN, LinearOp, Weight
from sortserve_trainer.data import IGNORED, Pack, collate
from sortserve_trainer.model.sorted_model import SortedModel

__all__ = ["Likelihood", "Likelihoods", "measure_likelihood"]

CHUNK_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Means over the target tokens of one file, at one exit."""

    loss: float
    """Cross-entropy in nats."""
    agreement: float
    """Share of tokens at which the exit and the full depth find the same token the likeliest."""
    kl: float
    """KL(full depth || exit) in nats; 0 at full depth."""
    num_tokens: int
    tokens_by_exit: Mapping[int, int] = field(default_factory=dict)
    """Of a schedule: how many of the tokens each exit predicted."""


@dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """What was found on one file."""

    exits: dict[int, Likelihood]
    """By exit layer; the deepest exit is the full depth the others are compared with."""
    schedules: dict[DepthSchedule, Likelihood]


@torch.inference_mode()
def measure_likelihood(
    model: SortedModel,
    packs: Iterable[Pack],
    on_pack: Callable[[], None] = lambda: None,
    *,
    quantize: Callable[[Tensor], Weight] = Weight.plain,
    schedules: Sequence[DepthSchedule] = (),
) -> Likelihoods:
    """Every exit of ``model`` on the targets of ``packs``, teacher-forced.

    Args:
        model: in eval mode.
        packs: with at least one target.
        on_pack: called after each pack.
        quantize: makes the weights of the heads.
        schedules: of exits of the model. Tokens count from the first of each run of targets: the
            start of an answer, or of a piece of text.
    """
    sums = {exit_layer: torch.zeros(3, dtype=torch.float64) for exit_layer in model.exits}
    scheduled = {schedule: _ScheduleSums() for schedule in schedules}
    heads = _float_heads(model, quantize)
    device = model.base.model.norm.weight.device
    num_tokens = 0
    for pack in packs:
        batch = {name: tensor.to(device) for name, tensor in collate([pack]).items()}
        labels = batch["labels"][0]
        is_target = labels != IGNORED
        targets, places = labels[is_target], _places(is_target)
        states = model.exit_states(
            batch["input_ids"],
            batch["position_ids"],
            batch["lengths"],
            model.exits,
            rows=batch["target_rows"],
        )
        for start in range(0, targets.numel(), CHUNK_TOKENS):
            span = slice(start, start + CHUNK_TOKENS)
            chunk = {exit_layer: state[span].float() for exit_layer, state in states.items()}
            found = _chunk_totals(chunk, heads, targets[span])
            for exit_layer, totals_3C in found.items():
                sums[exit_layer] += totals_3C.sum(1).cpu()
            for schedule, own in scheduled.items():
                own.add(schedule, found, places[span])
        num_tokens += targets.numel()
        on_pack()
    assert num_tokens, "there is no target in these packs"
    return Likelihoods(
        exits={exit_layer: _means(own, num_tokens, {}) for exit_layer, own in sums.items()},
        schedules={
            schedule: _means(own.sums, num_tokens, own.tokens_by_exit)
            for schedule, own in scheduled.items()
        },
    )


def _means(sums_3: Tensor, num_tokens: int, tokens_by_exit: Mapping[int, int]) -> Likelihood:
    ce, agreed, kl = (sums_3 / num_tokens).tolist()
    return Likelihood(
        loss=ce, agreement=agreed, kl=kl, num_tokens=num_tokens, tokens_by_exit=tokens_by_exit
    )


def _places(is_target_T: Tensor) -> Tensor:
    """Of each target, how many targets stand right before it: its place in its answer."""
    positions_T = torch.arange(is_target_T.numel(), device=is_target_T.device)
    before_T = torch.where(is_target_T, -1, positions_T).cummax(0).values
    return (positions_T - before_T - 1)[is_target_T]


class _ScheduleSums:
    """What a schedule has come to so far."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.tokens_by_exit: dict[int, int] = {}

    def add(self, schedule: DepthSchedule, totals: Mapping[int, Tensor], places_C: Tensor) -> None:
        """Add a chunk's targets, each at the exit of its place."""
        for start, end, exit_layer in schedule.spans(MAX_TOKEN):
            is_here_C = (places_C >= start) & (places_C < end)
            num_tokens = int(is_here_C.sum())
            if num_tokens:
                self.sums += totals[exit_layer][:, is_here_C].sum(1).cpu()
                before = self.tokens_by_exit.get(exit_layer, 0)
                self.tokens_by_exit[exit_layer] = before + num_tokens


def _float_heads(model: SortedModel, quantize: Callable[[Tensor], Weight]) -> dict[int, LinearOp]:
    """Each exit's head, float32 to float32; the shared one is converted once."""
    converted: dict[int, LinearOp] = {}
    heads = {exit_layer: model.head(exit_layer) for exit_layer in model.exits}
    for head in heads.values():
        if id(head) not in converted:
            weight = quantize(head)
            if weight.format is PLAIN:
                weight = Weight.plain(head.float())
            converted[id(head)] = weight.format.linear(weight, None)
    return {exit_layer: converted[id(head)] for exit_layer, head in heads.items()}


def _chunk_totals(
    states_CD: dict[int, Tensor], heads: dict[int, LinearOp], targets_C: Tensor
) -> dict[int, Tensor]:
    """Exit layer to the cross-entropy, agreement and KL of each target of a chunk, [3, C]."""
    found = {}
    full = max(states_CD)
    teacher = _Logits(heads[full](states_CD[full]), targets_C)
    p_CV = (teacher.logits_CV - teacher.log_norm_C[:, None]).exp_()
    # KL(p || q) = E_p[log p] - E_p[log q], and log q = logits - log_norm.
    full_mean_C = _expected(p_CV, teacher.logits_CV) - teacher.log_norm_C
    for exit_layer, state_CD in states_CD.items():
        own = teacher
        if exit_layer != full:
            own = _Logits(heads[exit_layer](state_CD), targets_C)
        mean_C = full_mean_C
        if exit_layer != full:
            mean_C = _expected(p_CV, own.logits_CV) - own.log_norm_C
        totals = (own.ce_C, (own.best_C == teacher.best_C), full_mean_C - mean_C)
        found[exit_layer] = torch.stack([total.double() for total in totals])
    return found


class _Logits:
    """One exit's logits, and what is read off them."""

    def __init__(self, logits_CV: Tensor, targets_C: Tensor) -> None:
        self.logits_CV = logits_CV
        self.log_norm_C = logits_CV.logsumexp(dim=-1)
        self.best_C = logits_CV.argmax(dim=-1)
        self.ce_C = self.log_norm_C - logits_CV.gather(1, targets_C[:, None]).squeeze(1)


def _expected(p_CV: Tensor, values_CV: Tensor) -> Tensor:
    """``sum_v p_v values_v`` per row, without the product as a tensor."""
    return torch.bmm(p_CV[:, None], values_CV[:, :, None]).view(-1)
