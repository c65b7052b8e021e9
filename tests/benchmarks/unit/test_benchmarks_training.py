"""The training benchmarks: what they run, and what they count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import exit_kinds, recipes
from benchmarks import train as speed
from support.tiny_models import make_tiny_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "model", exits=None)


@pytest.mark.parametrize("method", ["naive", "soft+kd", "soft", "sft"])
def test_every_method_is_measured_by_real_steps(model: Path, method: str) -> None:
    arguments = speed.parse_arguments(
        ["--model", str(model), "--exits", "2,4", "--tokens", "512", "--steps", "1"]
    )

    found = speed._measure(method, arguments)

    assert found["tokens_per_s"] > 0
    assert found["peak_gib"] > 0


def test_the_floor_counts_the_products_of_a_step(model: Path) -> None:
    def flops(method: str, *more: str) -> float:
        arguments = speed.parse_arguments(
            ["--model", str(model), "--exits", "2,4", "--tokens", "64", "--steps", "1", *more]
        )
        return speed._measure(method, arguments)["flops_per_token"]

    head, layer = 288 * 64, 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96

    assert flops("sft") == 6 * (6 * layer + head)
    assert flops("soft") == 6 * (6 * layer + 3 * head)


def test_a_packed_row_has_exactly_the_tokens_that_are_timed() -> None:
    batch = speed._batch(1000, vocab_size=50, seed=3)

    assert batch["input_ids"].shape == (1, 1000)
    assert int(batch["lengths"].sum()) == 1000
    ends = batch["lengths"].cumsum(0) - 1
    assert bool((batch["labels"][0, ends] == -100).all())
    assert torch.equal(batch["position_ids"][0, ends] + 1, batch["lengths"])


def test_recipes_trains_and_measures_each_method_once_on_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def scripted(*arguments: str) -> None:
        calls.append(list(arguments))
        output = Path(arguments[arguments.index("--output") + 1])
        output.mkdir(parents=True)
        exits: list[dict[str, Any]] = [{"exit_layer": 4, "metrics": {"loss": 2.5}}]
        if arguments[0] == "eval":
            (output / "report.json").write_text(json.dumps({"exits": exits}))

    monkeypatch.setattr(recipes, "_sortserve", scripted)
    command = ["--work", str(tmp_path / "work"), "--data", "a.jsonl", "--eval-data", "b.jsonl"]

    assert recipes.main([*command, "--learning-rate", "soft=1e-4", "--seed", "3"]) == 0
    assert recipes.main(command) == 0

    trained = [call for call in calls if call[0] == "train"]
    assert [call[call.index("--method") + 1] for call in trained] == list(recipes.METHODS)
    assert all(call[-2:] == ["--seed", "3"] for call in trained)
    assert {call[call.index("--data") + 1] for call in trained} == {"a.jsonl"}
    with_rate = [call for call in trained if "--learning-rate" in call]
    assert [call[call.index("--method") + 1] for call in with_rate] == ["soft"]
    assert len(calls) == 2 * len(recipes.METHODS)
    assert "2.500" in capsys.readouterr().out


def test_kinds_of_modules_are_compared_on_the_same_tokens(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[dict[str, str]] = []

    def step_ms(checkpoint: Path, exits: tuple[int, ...], _: object) -> dict[int, float]:
        timed.append(json.loads((checkpoint / "sorted.json").read_text())["exit_modules"])
        return {e: float(e) for e in exits}

    monkeypatch.setattr(exit_kinds, "_offline_step_ms", step_ms)
    text = "".join(f"Line {i} is about {i * i}, and about {i % 7}.\n\n" for i in range(200))
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "dev.txt").write_text(text[:1000])
    flags = ["--model", str(model), "--exits", "2,4", "--max-tokens", "1500", "--steps", "2"]
    flags += ["--data", str(tmp_path / "train.txt"), "--eval-data", str(tmp_path / "dev.txt")]

    flags += ["--pack-length", "128", "--dtype", "float32", "--plot", str(tmp_path / "plot.svg")]

    assert exit_kinds.main(flags) == 0

    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f">{kind}<" in drawn for kind in exit_kinds.KINDS)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["exits"]
    by_place = {(entry["kind"], entry["exit_layer"]): entry for entry in found}
    assert by_place.keys() == {(kind, e) for kind in exit_kinds.KINDS for e in (2, 4)}
    costs = [by_place[kind, 2]["compute"] for kind in ("none", "affine", "mlp", "layer")]
    assert costs == sorted(costs)
    assert len(set(costs)) == 4
    (plain,), (trained,) = (by_place[k, 4]["losses"].values() for k in ("none", "layer"))
    assert trained < plain
    assert timed == [{}, *({"2": kind, "4": kind} for kind in exit_kinds.KINDS[1:])]
    assert by_place["mlp", 2]["step_of_full"] == pytest.approx(2 / 6)
