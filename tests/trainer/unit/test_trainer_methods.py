"""What each method asks of each exit: pure values."""

from dataclasses import replace

import pytest

from sortserve_trainer.run.methods import METHODS, Method, Weighting
from sortserve_trainer.run.terms import ExitTerm

EXITS = (9, 18, 27, 30)


def test_soft_is_the_mean_cross_entropy_over_all_exits_at_every_step() -> None:
    assert METHODS["soft"].terms(EXITS, step=7, seed=1) == dict.fromkeys(EXITS, ExitTerm(ce=0.25))


def test_soft_is_as_published_in_everything_else() -> None:
    soft = METHODS["soft"]

    assert soft.learning_rate == 2e-5
    assert soft.exit_modules == "none"
    assert soft.lora_rank == 0
    assert soft.vocab_sample == 0


@pytest.mark.parametrize("name", ["sft", "sft+ict"])
def test_sft_trains_the_full_depth_alone(name: str) -> None:
    assert METHODS[name].terms(EXITS, step=0, seed=0) == {30: ExitTerm(ce=1.0)}


@pytest.mark.parametrize("name", METHODS)
def test_soft_with_one_exit_is_sft(name: str) -> None:
    assert METHODS[name].terms((30,), step=0, seed=0) == {30: ExitTerm(ce=1.0)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("step", [0, 1, 99])
def test_the_weights_of_a_step_sum_to_one(name: str, step: int) -> None:
    terms = METHODS[name].terms(EXITS, step, seed=3).values()

    assert sum(term.ce + term.kl for term in terms) == pytest.approx(1.0)


def test_ours_keeps_a_share_for_the_full_depth_and_distils_the_rest() -> None:
    method = METHODS["soft+kd"]
    assert method.protect is not None

    terms = method.terms(EXITS, step=0, seed=0)

    assert terms[30] == ExitTerm(ce=method.protect)
    for exit_layer in EXITS[:-1]:
        term = terms[exit_layer]
        assert term.kl / (term.ce + term.kl) == pytest.approx(method.distill)


def test_a_teacher_of_its_own_teaches_the_full_depth_too() -> None:
    method = replace(METHODS["soft+kd"], teacher="base")
    assert method.protect is not None

    full = method.terms(EXITS, step=0, seed=0)[30]

    assert full.ce + full.kl == pytest.approx(method.protect)
    assert full.kl / (full.ce + full.kl) == pytest.approx(method.distill)


@pytest.mark.parametrize(
    ("weighting", "ratio"), [("equal", 1.0), ("depth", 2.0), ("depth-squared", 4.0)]
)
def test_an_exit_weighs_by_the_layers_it_lacks(weighting: Weighting, ratio: float) -> None:
    method = Method(name="x", summary="", protect=0.0, weighting=weighting)

    terms = method.terms((24, 27, 30), step=0, seed=0)

    assert terms[27].ce / terms[24].ce == pytest.approx(ratio)


def test_exits_of_a_step_are_drawn_anew_each_step_and_alike_in_every_process() -> None:
    method = Method(name="x", summary="", exits_per_step=1)

    drawn = [tuple(method.terms(EXITS, step, seed=5)) for step in range(40)]

    assert drawn == [tuple(method.terms(EXITS, step, seed=5)) for step in range(40)]
    assert {exits[0] for exits in drawn} == {9, 18, 27}
    assert all(exits[-1] == 30 and len(exits) == 2 for exits in drawn)
