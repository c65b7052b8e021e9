"""The lean loss is the plain loss: value and gradients, in chunks, with and without a teacher."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from sortserve_trainer.model.loss import (
    Likely,
    Teacher,
    VocabSample,
    exit_losses,
    unlikelihood_loss,
)
from sortserve_trainer.run.terms import ExitTerm

EXITS = (2, 4, 6)
NUM_TOKENS, HIDDEN, VOCAB = 23, 16, 97

PAPER = dict.fromkeys(EXITS, ExitTerm(ce=1 / 3))
OURS = {2: ExitTerm(ce=0.1, kl=0.2), 4: ExitTerm(kl=0.3), 6: ExitTerm(ce=0.4)}
OURS_BY_THE_BASE = {**OURS, 6: ExitTerm(ce=0.1, kl=0.3)}
FULL_DEPTH_ONLY = {6: ExitTerm(ce=1.0)}


def make_inputs(seed: int = 0) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = {
        e: torch.randn(NUM_TOKENS, HIDDEN, generator=generator, requires_grad=True) for e in EXITS
    }
    head = torch.randn(VOCAB, HIDDEN, generator=generator, requires_grad=True)
    return states, head, torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)


def make_teacher(seed: int = 7) -> Teacher:
    generator = torch.Generator().manual_seed(seed)
    return Teacher(
        torch.randn(NUM_TOKENS, HIDDEN, generator=generator),
        torch.randn(VOCAB, HIDDEN, generator=generator),
    )


def gradients(loss: Tensor, states: dict[int, Tensor], head: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, [*states.values(), head], allow_unused=True)
    return [
        torch.zeros_like(x) if grad is None else grad
        for grad, x in zip(found, [*states.values(), head], strict=True)
    ]


def plain_exit_losses(
    states: Mapping[int, Tensor],
    heads: Mapping[int, Tensor],
    targets: Tensor,
    terms: Mapping[int, ExitTerm],
    *,
    num_targets: float,
    teacher: Teacher | None = None,
) -> Tensor:
    """The same loss as one writes it down."""
    last = max(states)
    source = teacher or Teacher(states[last], heads[last])
    log_p = linear(source.state, source.head).float().log_softmax(-1).detach()
    loss = torch.zeros((), device=targets.device)
    for exit_layer, term in terms.items():
        log_q = linear(states[exit_layer], heads[exit_layer]).float().log_softmax(-1)
        ce = -log_q.gather(1, targets[:, None]).sum()
        learns = exit_layer != last or teacher is not None
        kl = (log_p.exp() * (log_p - log_q)).sum() if learns else 0.0
        loss = loss + term.ce * ce + term.kl * kl
    return loss / num_targets


@pytest.mark.parametrize(
    ("terms", "teacher"),
    [(PAPER, None), (OURS, None), (OURS_BY_THE_BASE, make_teacher())],
    ids=["paper", "ours", "taught by the base"],
)
@pytest.mark.parametrize("chunk_tokens", [5, 1024])
def test_the_lean_loss_and_its_gradients_are_those_of_the_plain_loss(
    terms: dict[int, ExitTerm], teacher: Teacher | None, chunk_tokens: int
) -> None:
    states, head, targets = make_inputs()

    lean, _ = exit_losses(
        states,
        dict.fromkeys(EXITS, head),
        targets,
        terms,
        num_targets=40,
        teacher=teacher,
        chunk_tokens=chunk_tokens,
    )
    plain = plain_exit_losses(
        states, dict.fromkeys(EXITS, head), targets, terms, num_targets=40, teacher=teacher
    )

    torch.testing.assert_close(lean, plain, rtol=1e-5, atol=1e-6)
    for lean_grad, plain_grad in zip(
        gradients(lean, states, head), gradients(plain, states, head), strict=True
    ):
        torch.testing.assert_close(lean_grad, plain_grad, rtol=1e-4, atol=1e-6)


def test_an_exit_without_a_weight_gets_no_gradient_and_is_not_computed() -> None:
    states, head, targets = make_inputs()

    loss, means = exit_losses(
        states, dict.fromkeys(EXITS, head), targets, FULL_DEPTH_ONLY, num_targets=NUM_TOKENS
    )
    grads = gradients(loss, states, head)

    assert set(means) == {6}
    assert not grads[0].any()
    assert not grads[1].any()
    assert grads[2].any()


def test_the_full_depth_learns_nothing_from_the_exits_it_teaches() -> None:
    states, head, targets = make_inputs()
    terms = {2: ExitTerm(kl=1.0), 6: ExitTerm()}

    loss, _ = exit_losses(
        states, dict.fromkeys(EXITS, head.detach()), targets, terms, num_targets=NUM_TOKENS
    )
    grads = torch.autograd.grad(loss, [states[2], states[6]])

    assert grads[0].any()
    assert not grads[1].any()


def test_every_exit_may_have_a_head_of_its_own() -> None:
    states, head, targets = make_inputs()
    own = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    heads = {2: own, 4: head, 6: head}

    loss, _ = exit_losses(states, heads, targets, PAPER, num_targets=NUM_TOKENS)
    plain = plain_exit_losses(states, heads, targets, PAPER, num_targets=NUM_TOKENS)

    torch.testing.assert_close(loss, plain)
    for lean_grad, plain_grad in zip(
        torch.autograd.grad(loss, [own, head]), torch.autograd.grad(plain, [own, head]), strict=True
    ):
        torch.testing.assert_close(lean_grad, plain_grad, rtol=1e-4, atol=1e-6)


def test_the_log_shows_the_mean_cross_entropy_of_each_exit() -> None:
    states, head, targets = make_inputs()

    _, means = exit_losses(
        states, dict.fromkeys(EXITS, head), targets, OURS, num_targets=3 * NUM_TOKENS
    )

    for exit_layer in EXITS:
        expected = torch.nn.functional.cross_entropy(states[exit_layer] @ head.T, targets)
        torch.testing.assert_close(means[exit_layer], expected.detach())


def test_a_sample_as_large_as_the_vocabulary_is_the_whole_vocabulary() -> None:
    states, head, targets = make_inputs()
    heads = dict.fromkeys(EXITS, head)

    whole, _ = exit_losses(states, heads, targets, OURS, num_targets=NUM_TOKENS)
    sampled, _ = exit_losses(
        states, heads, targets, OURS, num_targets=NUM_TOKENS, sample=VocabSample(VOCAB, 0, seed=1)
    )

    assert float(sampled.detach()) == float(whole.detach())


def test_the_partition_function_of_a_vocabulary_sample_is_right_in_the_mean() -> None:
    states, head, targets = make_inputs()
    first = {e: state[:1].detach() for e, state in states.items()}
    heads = dict.fromkeys(EXITS, head.detach() * 0.3)
    terms = {2: ExitTerm(ce=1.0), 6: ExitTerm()}
    target_logit = first[2][0] @ heads[2][targets[0]]

    def partition(sample: VocabSample | None) -> float:
        """Cross-entropy is log Z minus the target's logit."""
        _, means = exit_losses(first, heads, targets[:1], terms, num_targets=1, sample=sample)
        return math.exp(float(means[2] + target_logit))

    samples = [VocabSample(num_likely=8, num_drawn=24, seed=seed) for seed in range(400)]
    mean = sum(map(partition, samples)) / len(samples)

    assert mean == pytest.approx(partition(None), rel=0.05)


def test_a_vocabulary_sample_depends_on_its_seed_alone() -> None:
    states, head, targets = make_inputs()
    heads = dict.fromkeys(EXITS, head)

    def loss(seed: int) -> float:
        sample = VocabSample(num_likely=8, num_drawn=8, seed=seed)
        found, _ = exit_losses(states, heads, targets, OURS, num_targets=NUM_TOKENS, sample=sample)
        return float(found.detach())

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_unlikelihood_is_minus_log_of_one_minus_p_with_its_gradients() -> None:
    states, head, unwanted = make_inputs()

    lean = unlikelihood_loss(
        states, dict.fromkeys(EXITS, head), unwanted, OURS_BY_THE_BASE, num_targets=40
    )
    plain = torch.zeros(())
    for exit_layer, term in OURS_BY_THE_BASE.items():
        p = (states[exit_layer] @ head.T).softmax(-1).gather(1, unwanted[:, None])
        plain = plain - (term.ce + term.kl) * (1 - p).log().sum() / 40

    torch.testing.assert_close(lean, plain)
    for own, expected in zip(
        gradients(lean, states, head), gradients(plain, states, head), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-5)


def test_unlikelihood_of_what_a_model_is_sure_of_is_finite() -> None:
    state = torch.tensor([[100.0, 0.0]], requires_grad=True)
    heads = {6: torch.eye(2)}

    loss = unlikelihood_loss({6: state}, heads, torch.tensor([0]), FULL_DEPTH_ONLY, num_targets=1)
    (gradient,) = torch.autograd.grad(loss, state)

    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_a_sample_is_the_same_where_the_likely_columns_are_known_before() -> None:
    states, head, targets = make_inputs()
    full = max(states)
    frozen = {e: state if e < full else state.detach() for e, state in states.items()}
    terms = {e: ExitTerm(ce=0.1, kl=0.2) for e in states}
    best = (states[full] @ head.T).detach().log_softmax(-1).topk(head.shape[0])
    found = []
    for likely in (None, Likely(best.indices, best.values)):
        loss, means = exit_losses(
            frozen,
            dict.fromkeys(states, head.detach()),
            targets,
            terms,
            num_targets=30,
            sample=VocabSample(num_likely=12, num_drawn=6, seed=1),
            likely=likely,
        )
        shallow = [states[e] for e in sorted(states) if e < full]
        found.append([loss.detach(), *means.values(), *torch.autograd.grad(loss, shallow)])

    for chosen_after, chosen_before in zip(*found, strict=True):
        torch.testing.assert_close(chosen_before, chosen_after, rtol=1e-5, atol=1e-6)
