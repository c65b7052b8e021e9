from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from sortserve.core.sampling_params import RowFailure, SampledToken, SamplingParams, SamplingRow
from sortserve.engine.sampling import filters, wide
from sortserve.engine.sampling.sampler import Sampler, uniform
from sortserve.engine.sampling.vocab_ops import argmax, at_least, block_maxima, draw, kth_largest
from support.reference_sampling import processed_logits, reference_uniform, sample_reference


def make_row(
    *,
    seed: int = 0,
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
    stop_ids: tuple[int, ...] = (0,),
    **params: object,
) -> SamplingRow:
    sampling = SamplingParams(max_tokens=100, **params)  # type: ignore[arg-type]
    return SamplingRow(sampling, seed, prompt, output, frozenset(stop_ids))


def sample(logits_RV: Tensor, *rows: SamplingRow) -> list[int]:
    return [token.token_id for token in sampled(logits_RV, *rows)]


def sampled(logits_RV: Tensor, *rows: SamplingRow) -> list[SampledToken]:
    tokens = Sampler().sample(logits_RV.clone(), rows)
    assert all(isinstance(token, SampledToken) for token in tokens), tokens
    return tokens  # type: ignore[return-value]


def random_logits(num_rows: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


_CHOICES: dict[str, list[object]] = {
    "top_k": [1, 3, 10, 50, 10_000],
    "top_p": [0.01, 0.3, 0.9, 0.99],
    "min_p": [0.01, 0.1, 0.5, 1.0],
    "repetition_penalty": [0.7, 1.2, 2.0],
    "presence_penalty": [-1.0, 0.5, 2.0],
    "frequency_penalty": [-0.7, 0.3],
    "min_tokens": [3, 16],
    "logprobs": [0, 5],
}


def random_row(rng: random.Random, vocab_size: int) -> SamplingRow:
    """Any mix of settings, each with a chance of one in three; one row in four is greedy."""
    params: dict[str, object] = {"temperature": rng.choice([0.0, 0.3, 1.0, 1.7])}
    for name, values in _CHOICES.items():
        if rng.random() < 1 / 3:
            params[name] = rng.choice(values)
    if rng.random() < 1 / 3:
        params["logit_bias"] = {rng.randrange(vocab_size): rng.choice([-100.0, 2.0, 9.0])}
    tokens = [rng.randrange(vocab_size) for _ in range(rng.randrange(2, 30))]
    cut = rng.randrange(1, len(tokens))
    return make_row(
        seed=rng.randrange(2**64),
        prompt=tuple(tokens[:cut]),
        output=tuple(tokens[cut:]),
        stop_ids=(rng.randrange(vocab_size),),
        **params,
    )


# ---- the noise --------------------------------------------------------------------------------


def test_the_noise_is_a_fixed_function_of_seed_and_position() -> None:
    """Recorded: a change here changes every seeded sample that was ever served."""
    assert uniform(0, 0) == 0.8833108082136426
    assert uniform(1234, 56) == 0.13669885217308897
    for seed, position in [(0, 0), (-1, 3), (2**64 + 5, 7), (2**63, 10**6)]:
        assert uniform(seed, position) == reference_uniform(seed, position)


def test_neighbouring_seeds_and_positions_give_unrelated_uniform_noise() -> None:
    """20 000 numbers: mean 0.5 within 6 sigma, lag-one correlations within 6 sigma."""
    noise = torch.tensor([[uniform(s, p) for p in range(200)] for s in range(100)]).double()
    assert noise.min() >= 0.0
    assert noise.max() < 1.0
    assert abs(noise.mean() - 0.5) < 6 * (1 / 12 / 20_000) ** 0.5
    centred = noise - 0.5
    for a, b in [(centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])]:
        assert abs((a * b).mean() * 12) < 6 / 20_000**0.5


# ---- against transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [7, 100, 4096, 49_152])
def test_every_row_of_a_mixed_batch_samples_what_transformers_would(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    for batch in range(2 if vocab_size > 5000 else 12):
        logits_RV = random_logits(9, vocab_size, seed=batch, scale=rng.choice([0.5, 2.0, 6.0]))
        rows = [random_row(rng, vocab_size) for _ in range(9)]
        expected = [
            sample_reference(logits, row) for logits, row in zip(logits_RV, rows, strict=True)
        ]
        assert sample(logits_RV, *rows) == expected


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"top_k": 5}, id="top_k"),
        pytest.param({"top_p": 0.7}, id="top_p"),
        pytest.param({"min_p": 0.2}, id="min_p"),
        pytest.param({"top_k": 20, "top_p": 0.8, "min_p": 0.05}, id="all"),
        pytest.param({"top_k": 3, "repetition_penalty": 1.5}, id="after-penalty"),
    ],
)
def test_the_tokens_that_can_be_sampled_are_those_that_transformers_keeps(
    params: dict[str, object],
) -> None:
    logits_V = random_logits(1, 60, seed=3)[0]
    rows = [
        make_row(seed=seed, temperature=1.3, **params)  # type: ignore[arg-type]
        for seed in range(4000)
    ]
    seen = Counter(sample(logits_V.expand(len(rows), -1), *rows))
    probability_V = processed_logits(logits_V, rows[0]).softmax(-1)
    for token_id, probability in enumerate(probability_V.tolist()):
        mean = probability * len(rows)
        assert abs(seen[token_id] - mean) <= 6 * mean**0.5  # 0 where the probability is 0


def test_ties_with_the_kth_score_are_kept_as_in_transformers() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    rows = [make_row(seed=seed, temperature=1.0, top_k=2) for seed in range(200)]
    assert set(sample(logits_V.expand(200, -1), *rows)) == {1, 2, 3}


@pytest.mark.parametrize("lead", [0.0, 60.0])
def test_the_likeliest_token_survives_every_filter(lead: float) -> None:
    """Also where its probability rounds to 1, and 1 - top_p too."""
    logits_V = random_logits(1, 300)[0]
    best = int(logits_V.argmax())
    logits_V[best] += lead
    rows = [make_row(seed=5, top_p=1e-6), make_row(seed=5, top_p=1e-12)]
    rows += [make_row(seed=5, min_p=1.0), make_row(seed=5, top_k=1)]
    assert sample(logits_V.expand(4, -1), *rows) == [best] * 4


def test_a_wide_row_does_not_change_and_is_not_changed_by_narrow_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows with many candidates are handled alone; the limit must not show."""
    logits_RV = random_logits(6, 2048, scale=4.0)
    logits_RV[2] *= 0.01
    rows = [make_row(seed=seed, temperature=1.0, top_p=0.95) for seed in range(6)]
    expected = sample(logits_RV, *rows)
    for limit in (1, 100, 10_000):
        monkeypatch.setattr(filters, "_WIDE", limit)
        assert sample(logits_RV, *rows) == expected


def test_only_the_candidates_of_a_top_p_row_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_sizes: list[int] = []
    original = torch.Tensor.sort

    def counting_sort(self: Tensor, *args: object, **kwargs: object) -> object:
        sorted_sizes.append(self.shape[-1])
        return original(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(torch.Tensor, "sort", counting_sort)
    logits_RV = random_logits(4, 49_152, scale=5.0)
    sample(logits_RV, *[make_row(seed=seed, temperature=0.8) for seed in range(4)])
    assert sorted_sizes == []
    sample(logits_RV, *[make_row(seed=seed, temperature=0.8, top_p=0.9) for seed in range(4)])
    assert sorted_sizes
    assert max(sorted_sizes) < 49_152 // 20


# ---- no row sees its neighbours ---------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [97, 4096])
def test_a_row_samples_the_same_alone_and_in_any_batch(vocab_size: int) -> None:
    rng = random.Random(1)
    logits_RV = random_logits(16, vocab_size)
    rows = [random_row(rng, vocab_size) for _ in range(16)]
    together = Sampler().sample(logits_RV.clone(), rows)
    order = rng.sample(range(16), 16)
    shuffled = Sampler().sample(logits_RV[order].clone(), [rows[r] for r in order])
    for r, row in enumerate(rows):
        alone = Sampler().sample(logits_RV[r : r + 1].clone(), [row])
        assert alone == [together[r]] == [shuffled[order.index(r)]]


def test_a_row_keeps_the_same_candidates_and_weights_to_the_last_bit_in_any_batch() -> None:
    logits_RV = random_logits(12, 5000, scale=2.0) * torch.linspace(0.01, 2.0, 12)[:, None]
    settings = [{"top_p": 0.95}, {"top_p": 0.6, "min_p": 0.01}, {"top_k": 700, "top_p": 0.99}]
    params = [SamplingParams(**settings[r % 3]) for r in range(12)]  # type: ignore[arg-type]

    def surviving(logits_NV: Tensor, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
        by_mass = [n for n, p in enumerate(params) if p.top_k <= 0]
        found = filters._find_candidates(
            logits_NV, params, block_maxima(logits_NV), logits_NV[by_mass].softmax(-1)
        )
        candidates = filters._tighten(found, params)
        return candidates.ids_NC, filters._surviving_weights(candidates, params)

    ids_RC, weights_RC = surviving(logits_RV, params)
    widths = set()
    for r in range(12):
        ids_1C, weights_1C = surviving(logits_RV[r : r + 1].clone(), params[r : r + 1])
        widths.add(width := ids_1C.shape[1])
        assert torch.equal(ids_1C[0], ids_RC[r, :width])
        assert torch.equal(weights_1C[0], weights_RC[r, :width])
        assert (weights_RC[r, width:] == 0.0).all()
    assert len(widths) > 6


def test_the_same_seed_draws_new_noise_for_each_token() -> None:
    logits_V = torch.zeros(1, 1000)
    drawn = {
        sample(logits_V, make_row(seed=3, temperature=1.0, output=(0,) * n))[0] for n in range(20)
    }
    assert len(drawn) > 15


# ---- single settings --------------------------------------------------------------------------


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits_RV = torch.zeros(2, 640)
    logits_RV[0, [70, 71, 500]] = 5.0
    logits_RV[1, [639]] = 1.0
    assert sample(logits_RV, *[make_row(temperature=0.0)] * 2) == [70, 639]


def test_a_plain_greedy_batch_is_one_argmax_and_no_softmax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a plain greedy batch needs none of this")

    for name in ("softmax", "log_softmax", "sort", "topk", "cumsum"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    assert len(sample(random_logits(32, 512), *[make_row(temperature=0.0)] * 32)) == 32


def test_repetition_penalty_counts_prompt_and_output_the_others_only_output() -> None:
    logits_V = torch.tensor([[0.0, 4.0, 4.1, 3.9, -9.0]])
    common = {"prompt": (2,), "output": (1,), "temperature": 0.0}
    assert sample(logits_V, make_row(**common, repetition_penalty=1.5)) == [3]  # type: ignore[arg-type]
    assert sample(logits_V, make_row(**common, presence_penalty=1.0)) == [2]  # type: ignore[arg-type]
    assert sample(logits_V, make_row(**common, frequency_penalty=1.0)) == [2]  # type: ignore[arg-type]


def test_frequency_penalty_grows_with_each_use_and_presence_penalty_does_not() -> None:
    logits_V = torch.tensor([[5.0, 3.2]])
    often = {"output": (0, 0, 0), "temperature": 0.0}
    assert sample(logits_V, make_row(**often, presence_penalty=1.0)) == [0]  # type: ignore[arg-type]
    assert sample(logits_V, make_row(**often, frequency_penalty=1.0)) == [1]  # type: ignore[arg-type]


def test_logit_bias_bans_and_forces_tokens() -> None:
    logits_V = torch.tensor([[5.0, 3.0, 1.0]])
    assert sample(logits_V, make_row(temperature=0.0, logit_bias={0: -100.0})) == [1]
    assert sample(logits_V, make_row(temperature=1.0, logit_bias={2: 100.0})) == [2]


def test_stop_tokens_are_masked_exactly_until_min_tokens_are_out() -> None:
    logits_V = torch.tensor([[5.0, 9.0, 3.0]])
    for num_output, expected in [(0, 2), (1, 2), (2, 1), (3, 1)]:
        row = make_row(
            temperature=0.0, min_tokens=2, stop_ids=(0, 1, 999), output=(2,) * num_output
        )
        assert sample(logits_V, row) == [expected]


def test_a_tiny_temperature_is_greedy_and_overflows_nothing() -> None:
    logits_V = random_logits(1, 500)
    assert sample(logits_V, make_row(temperature=1e-40)) == [int(logits_V.argmax())]


# ---- logprobs ---------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_model_before_penalties_and_temperature() -> None:
    logits_RV = random_logits(2, 200)
    row = make_row(
        temperature=0.5, logprobs=3, repetition_penalty=1.7, logit_bias={7: 50.0}, output=(3, 4)
    )
    plain = make_row(temperature=0.0)
    without, token = sampled(logits_RV, plain, row)
    logprobs_V = logits_RV[1].log_softmax(-1)
    best = logprobs_V.topk(3)
    assert token.token_id == 7
    assert token.logprob == pytest.approx(logprobs_V[7].item(), abs=1e-5)
    assert [top.token_id for top in token.top_logprobs] == best.indices.tolist()
    assert [top.logprob for top in token.top_logprobs] == pytest.approx(
        best.values.tolist(), abs=1e-5
    )
    assert without == SampledToken(without.token_id)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 30.0, 1e5])
def test_logprobs_are_those_of_log_softmax_to_the_last_bit(scale: float) -> None:
    """Also their order: logits whose logprobs are rounded to the same are ordered by id."""
    logits_RV = random_logits(8, 3000, seed=1, scale=scale) + 7.0
    rows = [make_row(seed=seed, temperature=1.0, logprobs=20, top_k=50) for seed in range(8)]
    for logprobs_V, token in zip(logits_RV.log_softmax(-1), sampled(logits_RV, *rows), strict=True):
        best = logprobs_V.sort(descending=True, stable=True)
        assert token.logprob == logprobs_V[token.token_id].item()
        assert [top.token_id for top in token.top_logprobs] == best.indices[:20].tolist()
        assert [top.logprob for top in token.top_logprobs] == best.values[:20].tolist()


def test_each_row_gets_as_many_top_logprobs_as_it_asked_for() -> None:
    rows = [make_row(temperature=0.0, logprobs=k) for k in (0, 20, 1)]
    tokens = sampled(random_logits(3, 10), *rows)
    assert [len(token.top_logprobs) for token in tokens] == [0, 10, 1]
    assert all(token.logprob is not None for token in tokens)


def test_a_greedy_token_heads_its_top_logprobs_even_among_ties() -> None:
    logits_V = torch.zeros(1, 1000)
    logits_V[0, [900, 31, 500]] = 2.0
    [token] = sampled(logits_V, make_row(temperature=0.0, logprobs=2))
    assert token.token_id == 31
    assert [top.token_id for top in token.top_logprobs] == [31, 500]


# ---- numbers that go wrong --------------------------------------------------------------------


NOT_FINITE = RowFailure("non_finite", "its logits are not finite numbers")


def spoiled(logits_V: Tensor, how: str) -> Tensor:
    """Logits as a broken model gives them."""
    logits_V = logits_V.clone()
    if how == "one NaN":
        logits_V[5] = torch.nan
    elif how == "one inf":
        logits_V[5] = torch.inf
    else:
        logits_V[:] = {"all NaN": torch.nan, "all -inf": -torch.inf}[how]
    return logits_V


@pytest.mark.parametrize("how", ["one NaN", "one inf", "all NaN", "all -inf"])
@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"temperature": 0.0}, id="greedy"),
        pytest.param({"temperature": 1.0}, id="sampled"),
        pytest.param({"top_p": 0.9, "top_k": 20, "min_p": 0.01}, id="filtered"),
        pytest.param({"top_p": 0.9, "logprobs": 3}, id="logprobs"),
        pytest.param({"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 0}, id="edited"),
    ],
)
def test_a_row_that_is_not_finite_fails_alone(how: str, params: dict[str, object]) -> None:
    logits_RV = random_logits(5, 128)
    rows = [make_row(seed=seed, **params) for seed in range(5)]  # type: ignore[arg-type]
    expected: list[object] = list(Sampler().sample(logits_RV.clone(), rows))
    for r in (1, 4):
        logits_RV[r] = spoiled(logits_RV[r], how)
        expected[r] = NOT_FINITE
    assert Sampler().sample(logits_RV, rows) == expected


def test_a_step_of_rows_that_are_not_finite_has_a_failure_for_each() -> None:
    tokens = Sampler().sample(torch.full((3, 10), torch.nan), [make_row()] * 3)
    assert tokens == [NOT_FINITE] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_every_token_is_masked_fails_alone(temperature: float) -> None:
    logits_RV = random_logits(3, 5)
    rows = [make_row(temperature=temperature, seed=seed) for seed in range(3)]
    first, _, last = Sampler().sample(logits_RV.clone(), rows)
    rows[1] = make_row(temperature=temperature, min_tokens=1, stop_ids=tuple(range(5)))
    failure = RowFailure("non_finite", "min_tokens masks every token of the vocabulary")
    assert Sampler().sample(logits_RV, rows) == [first, failure, last]


EXTREME: dict[str, list[object]] = {
    "temperature": [0.0, 1e-300, 1e-40, 1.0, 100.0],
    "repetition_penalty": [5e-324, 1e-300, 1e-46, 1e-40, 1.0, 100.0],
    "presence_penalty": [-2.0, 0.0, 2.0],
    "frequency_penalty": [-2.0, 0.0, 2.0],
    "top_p": [0.0, 5e-324, 1e-30, 1.0],
    "top_k": [0, 1, 2**31 - 1],
    "min_p": [0.0, 5e-324, 1e-30, 1.0],
    "logit_bias": [{}, {3: -100.0, 7: 100.0}],
    "min_tokens": [0, 100],
    "logprobs": [None, 20],
}


@pytest.mark.parametrize("scale", [0.0, 1e-38, 3.0, 3e4, 1e30, 6e37])
def test_no_mix_of_extreme_settings_and_logits_gives_a_failure_or_moves_a_neighbour(
    scale: float,
) -> None:
    rng = random.Random(0)
    healthy = make_row(seed=1, temperature=1.0)
    plain_1V = random_logits(1, 64, seed=9)
    expected = sample(plain_1V, healthy)
    for case in range(150):
        logits_V = random_logits(1, 64, seed=case)[0].clamp(-5.0, 5.0) * scale
        params = {name: rng.choice(values) for name, values in EXTREME.items()}
        row = make_row(seed=case, prompt=(1, 7), output=(3, 3, 9) * 20, **params)  # type: ignore[arg-type]
        mixed, beside = Sampler().sample(torch.stack((logits_V, plain_1V[0])), [row, healthy])
        assert isinstance(mixed, SampledToken), params
        assert 0 <= mixed.token_id < 64
        assert all(math.isfinite(top.logprob) for top in mixed.top_logprobs)
        assert beside == SampledToken(expected[0])


@pytest.mark.parametrize("temperature", [1e-40, 1e-12, 1.0])
@pytest.mark.parametrize("filters_of", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
def test_huge_logits_whose_largest_is_masked_sample_from_what_is_left(
    temperature: float, filters_of: dict[str, object]
) -> None:
    """It lies far below 0, and a low temperature would carry it out of float32."""
    logits_V = torch.tensor([[3e30, 1e30, 2e30, -5e30, 2e30]])
    row = make_row(seed=1, temperature=temperature, min_tokens=1, stop_ids=(0,), **filters_of)  # type: ignore[arg-type]
    assert sample(logits_V, row)[0] in (2, 4)


def test_a_repetition_penalty_near_zero_prefers_seen_tokens_by_their_logits() -> None:
    logits_V = torch.tensor([[1.0, 2.0, 3.0, 9.0, -1.0]])
    seen: dict[str, object] = {"prompt": (0, 1), "output": (2, 4), "repetition_penalty": 1e-40}
    for temperature in (0.0, 1.0, 1e-30):
        row = make_row(temperature=temperature, **seen)  # type: ignore[arg-type]
        assert sample(logits_V, row) == [2]


def test_top_p_0_takes_the_likeliest_token_and_the_first_of_equal_ones() -> None:
    logits_RV = random_logits(2, 300)
    logits_RV[1, [40, 7, 299]] = 20.0
    rows = [make_row(seed=seed, temperature=1.5, top_p=0.0) for seed in range(2)]
    assert sample(logits_RV, *rows) == [int(logits_RV[0].argmax()), 7]


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("vocab_size", [5, 64, 1000])
def test_a_token_of_probability_zero_is_never_drawn(noise: float, vocab_size: int) -> None:
    weights_NV = torch.zeros(50, vocab_size)
    generator = torch.Generator().manual_seed(0)
    for n in range(50):
        where = torch.randperm(vocab_size, generator=generator)[:3]
        weights_NV[n, where] = torch.rand(3, generator=generator) * 10.0 ** -(n / 2)
    uniform_N = torch.full((50,), noise, dtype=torch.float64)
    drawn_N = draw(weights_NV, uniform_N)
    assert (weights_NV[torch.arange(50), drawn_N] > 0).all()


def test_an_empty_batch_has_no_tokens() -> None:
    assert Sampler().sample(torch.zeros(0, 10), []) == []


@pytest.mark.parametrize("vocab_size", [1, 7, 64, 96, 1000, 4096])
def test_block_wise_argmax_and_search_agree_with_torch(vocab_size: int) -> None:
    x_NV = random_logits(5, vocab_size).round()  # many ties
    token_ids, values = argmax(x_NV)
    assert token_ids == x_NV.argmax(-1).tolist()
    assert values == x_NV.amax(-1).tolist()
    floor_N1 = torch.tensor([[-100.0], [0.0], [2.0], [5.0], [100.0]])
    ids_NC, count_N = at_least(x_NV, floor_N1)
    for n in range(5):
        expected = (x_NV[n] >= floor_N1[n]).nonzero()[:, 0].tolist()
        assert ids_NC[n, : count_N[n]].tolist() == expected


@pytest.mark.parametrize("vocab_size", [1, 7, 96, 4096, 5000])
def test_the_kth_largest_of_a_row_is_that_of_a_sort_whatever_its_neighbours_ask(
    vocab_size: int,
) -> None:
    x_NV = random_logits(6, vocab_size).round()  # many ties
    x_NV[4, 2:] = -torch.inf
    ks = [1, 2, 50, 3000, 40, 10**6]
    expected = [
        x_V.sort(descending=True).values[min(k, vocab_size) - 1].item()
        for x_V, k in zip(x_NV, ks, strict=True)
    ]
    assert kth_largest(x_NV, ks)[:, 0].tolist() == expected
    for n, k in enumerate(ks):
        assert kth_largest(x_NV[n : n + 1], [k]).item() == expected[n]


# ---- where the model is unsure ----------------------------------------------------------------


def unsure_logits(num_rows: int, *, seed: int, scale: float) -> Tensor:
    """Many tokens near each other, a few ahead, as after a prompt that says nothing."""
    logits_RV = random_logits(num_rows, 20_000, seed=seed, scale=scale)
    logits_RV[:, :50] += 2.0
    return logits_RV


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.6])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
def test_an_unsure_row_draws_what_it_draws_candidate_by_candidate(
    scale: float, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_RV = unsure_logits(24, seed=1, scale=scale)
    rows = [make_row(seed=seed, temperature=1.0, top_p=top_p) for seed in range(24)]
    outcomes: list[Tensor] = []
    original = wide.draw_wide

    def watched(*args: Tensor) -> wide.Wide:
        outcomes.append((result := original(*args)).done_M)
        return result

    monkeypatch.setattr(wide, "draw_wide", watched)
    tokens = sample(logits_RV, *rows)
    assert sum(int(done_M.sum()) for done_M in outcomes) >= 6  # the fast way was taken
    alone = [sample(logits_RV[r : r + 1], row)[0] for r, row in enumerate(rows)]
    monkeypatch.setattr(wide, "_MANY", 10**9)
    assert tokens == alone == sample(logits_RV, *rows)


@pytest.mark.parametrize("bounds", [(1.5, 3.0), (0.01, 0.5)])
def test_a_wrong_guess_about_an_unsure_row_costs_time_and_no_token(
    bounds: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_RV = unsure_logits(8, seed=2, scale=1.0)
    rows = [make_row(seed=seed, temperature=1.0, top_p=0.9) for seed in range(8)]
    expected = sample(logits_RV, *rows)
    monkeypatch.setattr(wide, "_LOW", bounds[0])
    monkeypatch.setattr(wide, "_HIGH", bounds[1])
    assert sample(logits_RV, *rows) == expected


def test_of_equal_tokens_of_an_unsure_row_the_higher_id_is_cut_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits_RV = unsure_logits(6, seed=3, scale=1.0).round()
    rows = [make_row(seed=seed, temperature=1.0, top_p=0.7) for seed in range(6)]
    tokens = sample(logits_RV, *rows)
    monkeypatch.setattr(wide, "_MANY", 10**9)
    assert sample(logits_RV, *rows) == tokens


# ---- tokens are counted once ------------------------------------------------------------------


def test_a_row_that_comes_again_samples_what_a_new_one_of_the_same_tokens_would() -> None:
    rng, sampler, vocab_size = random.Random(5), Sampler(), 300
    outputs: list[list[int]] = [[] for _ in range(12)]
    settings = [
        {
            "temperature": rng.choice([0.0, 1.0]),
            "repetition_penalty": rng.choice([1.0, 0.7, 1.4]),
            "presence_penalty": rng.choice([0.0, 0.9]),
            "frequency_penalty": rng.choice([0.0, -0.5, 0.6]),
            "logit_bias": rng.choice([{}, {3: 4.0, 17: -100.0, 200: 1.5}]),
        }
        for _ in outputs
    ]
    lasting = [
        make_row(seed=r, output=output, **settings[r])  # type: ignore[arg-type]
        for r, output in enumerate(outputs)
    ]
    for step in range(40):
        logits_RV = random_logits(12, vocab_size, seed=step)
        fresh = [
            make_row(seed=r, output=tuple(output), **settings[r])  # type: ignore[arg-type]
            for r, output in enumerate(outputs)
        ]
        present = rng.sample(range(12), rng.randrange(1, 13))  # some sit a step out
        tokens = sampler.sample(logits_RV[present].clone(), [lasting[r] for r in present])
        assert tokens == Sampler().sample(logits_RV[present].clone(), [fresh[r] for r in present])
        for r, token in zip(present, tokens, strict=True):
            assert isinstance(token, SampledToken)
            outputs[r].append(token.token_id)


def test_what_was_counted_for_a_request_goes_with_it() -> None:
    sampler = Sampler()
    row = make_row(temperature=0.0, presence_penalty=1.0, output=(3, 4))
    sampler.sample(random_logits(1, 10), [row])
    assert len(sampler._editor._edits) == 1
    del row
    assert len(sampler._editor._edits) == 0
