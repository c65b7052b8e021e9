"""What the sampler has in C++ gives what plain torch gives, draw for draw."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sortserve.core.grammar import Constraint, num_words
from sortserve.core.sampling_params import RowFailure, SampledToken, SamplingParams, SamplingRow
from sortserve.engine.sampling.bitmask import apply_bitmasks
from sortserve.engine.sampling.filters import draw_filtered, has_filter
from sortserve.engine.sampling.logprobs import log_sums
from sortserve.engine.sampling.sampler import Sampler
from sortserve.engine.sampling.vocab_ops import block_maxima, draw, num_blocks
from sortserve.model.backends.cpu.sampling import NativeSampling
from support.native import each_isa, instance
from support.scripted_grammar import Form

LOG_SUM_TOLERANCE = 1e-4
"""torch adds up the exponentials of a long flat row in float32, and is off by so much."""
VOCAB_SIZES = [1, 2, 7, 64, 100, 1000, 4096, 5003]
SETTINGS: dict[str, list[object]] = {
    "top_k": [0, 0, 0, 1, 3, 50, 1000, 10_000],
    "top_p": [1.0, 1.0, 0.0, 1e-12, 0.3, 0.9, 0.99, 0.999999, 1.0 - 1e-12],
    "min_p": [0.0, 0.0, 0.0, 5e-324, 1e-6, 0.05, 0.5, 1.0],
}


def make_row(seed: int, **params: object) -> SamplingRow:
    sampling = SamplingParams(max_tokens=100, **params)  # type: ignore[arg-type]
    return SamplingRow(sampling, seed, (1, 2), (3,), frozenset({0}))


def random_rows(rng: random.Random, num_rows: int) -> list[SamplingRow]:
    rows = []
    for _ in range(num_rows):
        params = {name: rng.choice(values) for name, values in SETTINGS.items()}
        params["temperature"] = rng.choice([1e-40, 0.1, 0.8, 1.0, 1.0, 3.0, 100.0])
        params["logprobs"] = rng.choice([None, None, 0, 3])
        rows.append(make_row(rng.randrange(2**63), **params))
    return rows


def random_logits(rng: random.Random, num_rows: int, vocab_size: int) -> Tensor:
    """Sure rows, unsure ones, flat ones; some with many ties, some with tokens that cannot be."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits_RV = torch.randn(num_rows, vocab_size, generator=generator)
    for logits_V in logits_RV:
        logits_V *= rng.choice([0.0, 0.3, 1.0, 3.0, 10.0, 1e4, 1e30])
        kind = rng.randrange(4)
        if kind == 0:
            logits_V.round_()
        elif kind == 1:
            logits_V[torch.rand(vocab_size, generator=generator) < 0.5] = -torch.inf
            logits_V[rng.randrange(vocab_size)] = 1.0
        elif kind == 2:
            logits_V[rng.randrange(vocab_size)] += 5.0
    return logits_RV


def both(
    isa: str, logits_RV: Tensor, rows: Sequence[SamplingRow]
) -> tuple[list[SampledToken | RowFailure], list[SampledToken | RowFailure]]:
    """What is sampled with the kernels, and without."""
    plain = Sampler().sample(logits_RV.clone(), rows)
    return Sampler(NativeSampling(instance(isa))).sample(logits_RV.clone(), rows), plain


def is_same(token: SampledToken | RowFailure, expected: SampledToken | RowFailure) -> bool:
    """Ids are the same, also of the likeliest tokens; log-probabilities are close."""
    if not (isinstance(token, SampledToken) and isinstance(expected, SampledToken)):
        return token == expected
    if token.logprob is None or expected.logprob is None:
        return token == expected
    tops, expected_tops = token.top_logprobs, expected.top_logprobs
    if [top.token_id for top in tops] != [top.token_id for top in expected_tops]:
        return False
    logprobs = [token.logprob, *(top.logprob for top in tops)]
    expected_logprobs = [expected.logprob, *(top.logprob for top in expected_tops)]
    return token.token_id == expected.token_id and logprobs == pytest.approx(
        expected_logprobs, rel=1e-6, abs=LOG_SUM_TOLERANCE
    )


def draw_both(
    isa: str, logits_RV: Tensor, params: Sequence[SamplingParams], noise: Sequence[float]
) -> list[tuple[int | None, int]]:
    """Of each row: what the kernel draws (None: left open), and what torch draws."""
    answers = NativeSampling(instance(isa)).draw_tokens(
        *(logits_RV, block_maxima(logits_RV), range(len(params))),
        *([1.0] * len(params), params, noise),
    )
    noise_R = torch.tensor(noise, dtype=torch.float64)
    if has_filter(params[0]):
        expected = draw_filtered(logits_RV, noise_R, params)
    else:
        expected = draw(logits_RV.softmax(-1), noise_R).tolist()
    return list(zip(answers, expected, strict=True))


@each_isa
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_every_row_samples_what_it_samples_in_torch(isa: str, vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    for _ in range(4):
        logits_RV, rows = random_logits(rng, 64, vocab_size), random_rows(rng, 64)
        tokens, expected = both(isa, logits_RV, rows)
        wrong = [r for r in range(64) if not is_same(tokens[r], expected[r])]
        assert not wrong, [(rows[r].params, tokens[r], expected[r]) for r in wrong[:3]]


@each_isa
def test_huge_logits_whose_largest_is_masked_sample_what_they_do_in_torch(isa: str) -> None:
    """What is left may be minus infinity at a low temperature: the kernel is not asked."""
    logits_RV = torch.randn(40, 200, generator=torch.Generator().manual_seed(0)) * 1e30
    rows = []
    for r, logits_V in enumerate(logits_RV):
        params = SamplingParams(max_tokens=9, min_tokens=9, temperature=[1e-40, 1.0][r % 2])
        rows.append(SamplingRow(params, r, (1,), (), frozenset({int(logits_V.argmax())})))
    tokens, expected = both(isa, logits_RV, rows)
    assert tokens == expected


@each_isa
def test_noise_at_the_border_of_two_tokens_is_left_open_or_decided_as_in_torch(isa: str) -> None:
    rng = random.Random(0)
    logits_RV = random_logits(rng, 200, 500).clamp(-50.0, 50.0) / 0.7
    cumulative_RV = logits_RV.softmax(-1).double().cumsum(-1)
    cumulative_RV /= cumulative_RV[:, -1:].clone()
    borders = [cumulative_V[rng.randrange(500)].item() for cumulative_V in cumulative_RV]
    params = [SamplingParams()] * len(borders)
    for distance in (-1e-5, -1e-6, -1e-7, -1e-9, 0.0, 1e-9, 1e-7, 1e-6, 1e-5):
        noise = [min(max(border + distance, 0.0), 1.0 - 2.0**-53) for border in borders]
        for answer, expected in draw_both(isa, logits_RV, params, noise):
            assert answer in (None, expected)


@each_isa
@pytest.mark.parametrize("others", [{}, {"min_p": 0.01}, {"top_k": 60}])
def test_a_cut_of_top_p_at_the_border_is_left_open_or_decided_as_in_torch(
    isa: str, others: dict[str, object]
) -> None:
    rng = random.Random(1)
    logits_RV = random_logits(rng, 200, 500).clamp(-20.0, 20.0)
    tail_RV = logits_RV.softmax(-1).double().sort().values.cumsum(-1)
    for distance in (-1e-6, -1e-7, -1e-8, 0.0, 1e-8, 1e-7, 1e-6):
        cuts = [1.0 - tail_V[rng.randrange(500)].item() + distance for tail_V in tail_RV]
        params = [
            SamplingParams(top_p=min(max(cut, 0.0), 0.999), **others)  # type: ignore[arg-type]
            for cut in cuts
        ]
        noise = [rng.random() for _ in params]
        for answer, expected in draw_both(isa, logits_RV, params, noise):
            assert answer in (None, expected)


@each_isa
def test_nearly_all_draws_are_answered(isa: str) -> None:
    rng = random.Random(2)
    logits_RV = torch.randn(128, 49_152, generator=torch.Generator().manual_seed(2))
    logits_RV *= torch.linspace(0.5, 5.0, 128)[:, None]
    settings: list[dict[str, object]] = [{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}]
    params = [SamplingParams(**settings[r % 4]) for r in range(128)]  # type: ignore[arg-type]
    answers = NativeSampling(instance(isa)).draw_tokens(
        *(logits_RV, block_maxima(logits_RV), range(128)),
        *([1.0] * 128, params, [rng.random() for _ in params]),
    )
    assert answers.count(None) <= 13


@each_isa
@pytest.mark.parametrize("vocab_size", [1, 7, 5003, 49_152])
def test_the_sums_of_logprobs_are_those_of_float64(isa: str, vocab_size: int) -> None:
    logits_RV = random_logits(random.Random(vocab_size), 16, vocab_size)
    rows = [0, 3, 15]
    log_sum_N = NativeSampling(instance(isa)).log_sums(logits_RV, block_maxima(logits_RV), rows)
    exact_N = -logits_RV[rows].double().log_softmax(-1).amax(-1)
    torch.testing.assert_close(log_sum_N.double(), exact_N, rtol=1e-6, atol=1e-6)


@each_isa
@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, 96, 49_152])
def test_masks_and_the_largest_of_blocks_are_those_of_torch(isa: str, vocab_size: int) -> None:
    rng, native = random.Random(vocab_size), NativeSampling(instance(isa))
    generator = np.random.default_rng(vocab_size)
    logits_RV = random_logits(rng, 12, vocab_size)
    maxima_RK = native.block_maxima(logits_RV, num_blocks(vocab_size))
    assert torch.equal(maxima_RK, block_maxima(logits_RV))
    shares = {0: 0.0, 2: 0.001, 3: 0.01, 5: 0.5, 8: 0.99, 9: 0.999, 11: 1.0}
    masks = {r: mask_of(generator.random(vocab_size) < share) for r, share in shares.items()}

    expected_RV = logits_RV.clone()
    apply_bitmasks(expected_RV, masks)
    native.apply_bitmasks(logits_RV, maxima_RK, masks)

    assert torch.equal(logits_RV, expected_RV)
    assert torch.equal(maxima_RK, block_maxima(expected_RV))


def mask_of(allowed_V: NDArray[np.bool_]) -> NDArray[np.int32]:
    bits = np.zeros(32 * num_words(len(allowed_V)), dtype=np.bool_)
    bits[: len(allowed_V)] = allowed_V
    return np.packbits(bits, bitorder="little").view("<i4")


@each_isa
@pytest.mark.parametrize("vocab_size", [64, 1000, 5003])
def test_a_block_with_a_nan_has_no_largest(isa: str, vocab_size: int) -> None:
    logits_RV = torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(3))
    for r in range(64):
        logits_RV[r, (r * 37) % vocab_size] = torch.nan

    maxima_RK = NativeSampling(instance(isa)).block_maxima(logits_RV, num_blocks(vocab_size))

    assert torch.equal(maxima_RK.isnan(), block_maxima(logits_RV).isnan())


@each_isa
def test_constrained_rows_sample_what_they_do_in_torch(isa: str) -> None:
    rng, generator = random.Random(6), np.random.default_rng(6)
    for vocab_size in (1000, 4096):
        logits_RV, rows = random_logits(rng, 40, vocab_size), random_rows(rng, 40)
        rows = [dataclasses.replace(row, constraint=Constraint(Form("?").start())) for row in rows]
        masks = {
            row: mask_of(generator.random(vocab_size) < rng.choice([0.01, 0.5, 0.99]))
            for row in rows
        }
        expected = Sampler().sample(logits_RV.clone(), rows, masks)
        tokens = Sampler(NativeSampling(instance(isa))).sample(logits_RV.clone(), rows, masks)
        assert all(map(is_same, tokens, expected))


@each_isa
def test_a_row_is_the_same_alone_and_in_any_batch(isa: str) -> None:
    rng = random.Random(4)
    logits_RV, rows = random_logits(rng, 32, 3000), random_rows(rng, 32)
    sampler = Sampler(NativeSampling(instance(isa)))
    together = sampler.sample(logits_RV.clone(), rows)
    alone = [sampler.sample(logits_RV[r : r + 1].clone(), [rows[r]])[0] for r in range(32)]
    assert together == alone


@each_isa
@pytest.mark.parametrize("num_rows", [1, 3])
def test_what_is_left_open_is_drawn_in_torch(isa: str, num_rows: int) -> None:
    class Undecided(NativeSampling):
        """Draws for no row."""

        def draw_tokens(self, logits_RV: Tensor, *args: object) -> list[int | None]:
            return [None] * num_rows

        def log_sums(self, logits_RV: Tensor, *args: object) -> Tensor:
            return log_sums(logits_RV)

    rng = random.Random(num_rows)
    for _ in range(20):
        rows = [row for row in random_rows(rng, 50) if not row.params.greedy][:num_rows]
        rows = [replace_logprobs(row) for row in rows]
        logits_RV = random_logits(rng, num_rows, 300)
        expected = Sampler().sample(logits_RV.clone(), rows)
        assert Sampler(Undecided(instance(isa))).sample(logits_RV, rows) == expected


def replace_logprobs(row: SamplingRow) -> SamplingRow:
    """The same row, that reports."""
    params = dataclasses.replace(row.params, logprobs=2)
    return SamplingRow(
        params, row.seed, row.prompt_token_ids, row.output_token_ids, row.stop_token_ids
    )
