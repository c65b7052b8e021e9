"""Public early-exit models are known by their hub ids: here tiny ones, in a hub's cache on disk."""

from __future__ import annotations

import logging
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from sortserve import LLM, Budget, SamplingParams
from sortserve.checkpoint.exits_of import exits_of
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.checkpoint.presets import PRESETS, UNREADABLE, find_preset
from sortserve.core.errors import CheckpointError
from support.tiny_models import (
    hf_logits,
    load_hf,
    make_tiny_checkpoint,
    random_exit_module,
    read_exit_module,
    write_sorted_json,
)

LAYERSKIP = "facebook/layerskip-llama3.2-1B"
EXITS = (4, 6, 8, 10, 12, 14, 16)
PROMPT = list(range(40, 60))
PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text("utf-8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the hub's downloads are kept in; nothing else can be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


def add(hub: Path, hub_id: str, *, num_layers: int = 16) -> Path:
    """A tiny Llama under this id, as the hub's client lays it out; returns its snapshot."""
    repository = hub / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return make_tiny_checkpoint(
        repository / "snapshots" / commit, exits=None, num_hidden_layers=num_layers
    )


def load(hub_id: str, exits: tuple[int, ...] | None = None) -> LoadedCheckpoint:
    return load_checkpoint(hub_id, dtype="float32", device="cpu", exits=exits)


@pytest.mark.parametrize("hub_id", PRESETS)
def test_exits_ascend_to_the_full_depth_in_slabs_of_several_layers(hub_id: str) -> None:
    known = PRESETS[hub_id]

    assert known.exits[-1] == known.num_layers
    assert all(shallower < deeper for shallower, deeper in pairwise(known.exits))
    assert math.gcd(*known.exits) >= 2
    assert known.license


def test_capitals_do_not_matter_and_other_names_are_unknown() -> None:
    assert find_preset(LAYERSKIP.lower()) is PRESETS[LAYERSKIP]
    assert find_preset("facebook/layerskip-llama9-9B") is None
    assert find_preset("/models/layerskip-llama3.2-1B") is None


def test_a_known_model_has_its_exits_and_its_licence_is_said_once(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(hub, LAYERSKIP)

    checkpoint = load(LAYERSKIP)

    assert checkpoint.name == LAYERSKIP
    assert checkpoint.exits.layers == EXITS
    assert checkpoint.license == PRESETS[LAYERSKIP].license
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"{LAYERSKIP}: FAIR research licence, for non-commercial research only; gated on the hub."
    ]
    assert exits_of(LAYERSKIP)[1].layers == EXITS


def test_exit_e_is_the_first_e_layers_the_final_norm_and_the_head(hub: Path) -> None:
    hf = load_hf(add(hub, LAYERSKIP))
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

    with LLM(LAYERSKIP, dtype="float32", device="cpu", max_model_len=64) as llm:
        for exit_layer in (4, 10, 16):
            (result,) = llm.generate([PROMPT], greedy, budget=Budget(exit_layer=exit_layer))
            tokens = list(result.outputs[0].token_ids)
            logits_TV = hf_logits(hf, [*PROMPT, *tokens[:-1]], exit_layer)
            assert tokens == logits_TV[len(PROMPT) - 1 :].argmax(-1).tolist()


def test_other_exits_may_be_asked_for_and_every_layer_was_trained(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(hub, LAYERSKIP)

    assert load(LAYERSKIP, exits=(3, 5)).exits.layers == (3, 5, 16)

    assert "untrained" not in caplog.text


def test_a_sorted_json_knows_better(hub: Path) -> None:
    write_sorted_json(add(hub, LAYERSKIP), (2, 16))

    checkpoint = load(LAYERSKIP)

    assert checkpoint.exits.layers == (2, 16)
    assert checkpoint.license is None


def test_a_model_of_another_depth_is_not_the_known_one(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(hub, LAYERSKIP, num_layers=6)

    assert load(LAYERSKIP).exits.layers == (6,)

    assert "known here as a model of 16 layers, but this one has 6" in caplog.text


def test_an_unknown_id_is_served_as_ever(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(hub, "some-org/some-llama")

    checkpoint = load("some-org/some-llama")

    assert checkpoint.exits.layers == (16,)
    assert checkpoint.license is None
    assert not caplog.records
    assert load("some-org/some-llama", exits=(4,)).exits.layers == (4, 16)
    assert "Exits [4] are untrained: no sorted.json." in caplog.text


def test_a_gated_model_that_cannot_be_had_is_refused_with_what_to_do(hub: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gated on the hub\. Accept that .* HF_TOKEN"):
        load(LAYERSKIP)


@pytest.mark.parametrize("hub_id", UNREADABLE)
def test_exits_in_a_format_that_nobody_documented_are_refused(hub: Path, hub_id: str) -> None:
    with pytest.raises(CheckpointError, match=r"a format that is not documented.*docs/models\.md"):
        load(hub_id)


# ---- the page ----


def test_the_page_has_every_known_model_in_a_row_with_its_depth_and_exits() -> None:
    for hub_id, preset in PRESETS.items():
        [row] = [
            line for line in PAGE.splitlines() if line.startswith("|") and f"`{hub_id}`" in line
        ]
        first, second, third, last = (*preset.exits[:3], preset.exits[-1])
        assert row.endswith(f"| {preset.num_layers} | {first}, {second}, {third}, ..., {last} |")
    assert all(f"`{hub_id}`" in PAGE for hub_id in UNREADABLE)


def test_what_the_page_writes_of_others_heads_is_served(tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", "llama-untied", exits=None)
    hf, config = load_hf(base), load(str(base)).config
    heads = {e: random_exit_module("head", config, seed=e)["lm_head.weight"] for e in (2, 5)}
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    out = tmp_path / "heads"

    names["write_heads"](base, hf.model.norm.weight.detach(), heads, 6, out)

    greedy = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    with LLM(out, dtype="float32", device="cpu", max_model_len=64) as llm:
        for exit_layer in (2, 5, 6):
            (result,) = llm.generate([PROMPT], greedy, budget=Budget(exit_layer=exit_layer))
            tokens = list(result.outputs[0].token_ids)
            module = read_exit_module(out, exit_layer)
            logits_TV = hf_logits(hf, [*PROMPT, *tokens[:-1]], exit_layer, module)
            assert tokens == logits_TV[len(PROMPT) - 1 :].argmax(-1).tolist()
