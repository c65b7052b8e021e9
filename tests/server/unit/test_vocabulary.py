"""The engine's own check of token ids: the last line of defence of the embedding."""

from __future__ import annotations

from typing import Any

import pytest

from sortserve.core.errors import InvalidRequestError
from support.scripted import EOS, make_engine, make_request


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ([1, 2, 10], {}, "prompt.2"),
        ([-1, 2], {}, "prompt.0"),
        ([10**30], {}, "prompt.0"),
        ([1], {"logit_bias": {3: 1.0, 10: 1.0}}, "logit_bias.10"),
        ([1], {"stop_token_ids": (3, 10)}, "stop_token_ids.1"),
    ],
)
def test_an_id_beyond_the_vocabulary_is_refused_with_the_path_of_its_field(
    prompt: list[int], sampling: dict[str, Any], param: str
) -> None:
    engine = make_engine(vocab_size=10)

    with pytest.raises(InvalidRequestError, match="ids go from 0 to 9") as caught:
        engine.validate(make_request("r", prompt, **sampling))

    assert caught.value.param == param


def test_the_last_id_of_the_vocabulary_is_allowed_everywhere() -> None:
    request = make_request("r", [0, 9], logit_bias={9: 1.0}, stop_token_ids=(0, 9), min_tokens=1)

    assert make_engine(vocab_size=10).validate(request)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_must_leave_a_token_that_does_not_end_the_answer(ignore_eos: bool) -> None:
    engine = make_engine(vocab_size=10)
    stop = tuple(i for i in range(10) if i != EOS or ignore_eos)

    with pytest.raises(InvalidRequestError, match="would end the answer") as caught:
        engine.validate(
            make_request("r", [1], min_tokens=1, stop_token_ids=stop, ignore_eos=ignore_eos)
        )

    assert caught.value.param == "min_tokens"
    for fewer in ({"min_tokens": 0, "stop_token_ids": stop}, {"stop_token_ids": stop[1:]}):
        assert engine.validate(make_request("r", [1], ignore_eos=ignore_eos, **fewer))
