"""Masks of tokens: bits to logits, and what a constrained row may be asked besides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sortserve.core.grammar import Constraint, clear, num_words
from sortserve.core.sampling_params import RowFailure, SamplingParams, SamplingRow
from sortserve.engine.sampling.bitmask import MaskMaker, apply_bitmasks, make_masks
from sortserve.engine.sampling.sampler import Sampler
from support.scripted_grammar import Form

LETTER = {ord(c) for c in "abcdefghijklmnopqrstuvwxyz"}


def words_of(token_ids: set[int], vocab_size: int) -> NDArray[np.int32]:
    bits = np.zeros(32 * num_words(vocab_size), dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def row_of(form: str, **sampling: object) -> SamplingRow:
    params = SamplingParams(**{"max_tokens": 9, **sampling})  # type: ignore[arg-type]
    constraint = Constraint(Form(form).start())
    return SamplingRow(params, 5, (1, 2), [], frozenset({0}), constraint)


@given(
    vocab_size=st.integers(1, 100),
    data=st.data(),
)
@settings(deadline=None)
def test_the_logits_of_clear_bits_become_minus_infinity(
    vocab_size: int, data: st.DataObject
) -> None:
    ids = st.sets(st.integers(0, vocab_size - 1))
    allowed = [data.draw(ids), data.draw(ids)]
    logits_RV = torch.arange(3.0 * vocab_size).view(3, vocab_size)
    before_RV = logits_RV.clone()

    apply_bitmasks(
        logits_RV, {0: words_of(allowed[0], vocab_size), 2: words_of(allowed[1], vocab_size)}
    )

    assert torch.equal(logits_RV[1], before_RV[1])
    for r, mask in zip([0, 2], allowed, strict=True):
        for token_id in range(vocab_size):
            kept = before_RV[r, token_id].item() if token_id in mask else -math.inf
            assert logits_RV[r, token_id].item() == kept


def test_clearing_tokens_leaves_the_others_and_ignores_ids_beyond() -> None:
    mask_W = words_of({0, 31, 32, 63}, 64)

    assert (clear(mask_W, [31, 63, 64, 1000]) == words_of({0, 32}, 64)).all()
    assert (mask_W == words_of({0, 31, 32, 63}, 64)).all()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.3, "logit_bias": {33: 100.0, 97: -100.0}},
        {"temperature": 1.0, "repetition_penalty": 1.5, "logprobs": 2},
    ],
)
def test_only_what_is_allowed_is_drawn(sampling: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [row_of("?", **sampling) for _ in range(8)]
    logits_RV = torch.randn(8, 128, generator=generator) * 5

    tokens = Sampler().sample(logits_RV.clone(), rows)

    assert all(not isinstance(t, RowFailure) and t.token_id in LETTER for t in tokens)


def test_a_forced_token_is_the_only_one_allowed_and_asking_changes_nothing() -> None:
    row = row_of("xy?")

    for _ in range(2):
        [mask_W] = make_masks([row], 128).values()
        assert not isinstance(mask_W, RowFailure)
        assert (mask_W == words_of({ord("x")}, 128)).all()


def test_log_probabilities_are_the_models_own() -> None:
    logits_RV = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    row = row_of("z", logprobs=1, temperature=0.0)

    [token] = Sampler().sample(logits_RV.clone(), [row])

    assert not isinstance(token, RowFailure)
    assert token.token_id == ord("z")
    expected = logits_RV.log_softmax(-1)[0, ord("z")].item()
    assert token.logprob == pytest.approx(expected, abs=1e-5)


def test_masks_are_made_on_a_thread_of_their_own_and_only_if_asked_for() -> None:
    maker, free = MaskMaker(), SamplingRow(SamplingParams(), 0, (1,), [], frozenset())
    row = row_of("x")

    assert maker.start([free], 128) is None
    pending = maker.start([free, row], 128)

    assert pending is not None
    assert list(pending.result()) == [row]


def test_a_row_whose_grammar_fails_has_no_token_and_its_neighbours_have() -> None:
    broken = SamplingRow(
        SamplingParams(),
        0,
        (1,),
        [],
        frozenset(),
        Constraint(Form("?x", fails_after=0).start()),
    )

    results = Sampler().sample(torch.zeros(2, 128), [broken, row_of("x")])

    assert results[0] == RowFailure("grammar", "scripted failure")
    assert not isinstance(results[1], RowFailure)


def test_rows_that_depend_on_all_tokens_before_say_so() -> None:
    assert row_of("x").needs_history
    for params, needs in ((SamplingParams(), False), (SamplingParams(presence_penalty=1.0), True)):
        assert SamplingRow(params, 0, (1,), [], frozenset()).needs_history is needs
