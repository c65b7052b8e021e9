"""Which weights a run keeps: the mean of the last ones, or those of the best evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sortserve.core.errors import ConfigError
from sortserve_trainer.run import train as train_module
from sortserve_trainer.run.averaging import TailAverage
from sortserve_trainer.run.choice import (
    Evaluation,
    best_of,
    evaluations,
    metric_name,
    should_stop,
)
from sortserve_trainer.run.settings import load_train_settings
from sortserve_trainer.run.train import train
from sortserve_trainer.run.trainer import SortedTrainer
from support.tiny_models import make_tiny_checkpoint

# Decisions


def found(*values: float) -> list[Evaluation]:
    return [Evaluation(10 * i, value) for i, value in enumerate(values, start=1)]


def test_the_first_of_the_best_is_chosen_and_never_what_is_no_number() -> None:
    assert best_of(found(3.0, 2.0, 2.0)) == Evaluation(20, 2.0)
    assert best_of(found(2.0, float("nan"))) == Evaluation(10, 2.0)
    assert best_of(found(float("nan"), 3.0, 2.0)) == Evaluation(30, 2.0)
    assert best_of([]) is None


@pytest.mark.parametrize(
    ("values", "patience", "threshold", "stops"),
    [
        ((3, 2, 1), 1, 0, False),
        ((3, 2, 2), 1, 0, True),
        ((3, 4, 2, 3), 2, 0, False),
        ((3, 4, 4), 2, 0, True),
        ((3, 2.95, 2.9), 2, 0.2, True),
        ((3, 2.9, 2.7), 2, 0.2, False),
        ((float("nan"), float("nan")), 2, 0, True),
        ((3, 4, 5), None, 0, False),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_a_better_one(
    values: tuple[float, ...], patience: int | None, threshold: float, stops: bool
) -> None:
    assert should_stop(found(*values), patience, threshold) is stops


def test_evaluations_are_read_from_the_log_by_step() -> None:
    log = [{"step": 4, "loss": 1.0}, {"step": 4, "eval_loss": 2.0}, {"step": 2, "eval_loss": 3.0}]

    assert evaluations(log, "eval_loss") == [Evaluation(2, 3.0), Evaluation(4, 2.0)]


def test_a_metric_that_is_none_is_refused_with_those_there_are() -> None:
    assert metric_name(None, (2, 6)) == "eval_loss_mean"
    assert metric_name("eval_loss_exit_2", (2, 6)) == "eval_loss_exit_2"
    with pytest.raises(ConfigError, match=r"--metric-for-best-model 'accuracy'.*loss_exit_6"):
        metric_name("accuracy", (2, 6))


# The mean


def step(average: TailAverage, number: int, of: int = 10) -> None:
    average.on_step_end(None, SimpleNamespace(global_step=number, max_steps=of), None)


def test_the_mean_is_of_the_last_steps_alone_and_survives_a_state(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    average = TailAverage(model, 0.3)
    for number in range(1, 11):
        model.weight.data.fill_(float(number))
        step(average, number)
        if number == 9:
            average.save(tmp_path)
    assert average.count == 3

    with average.applied():
        assert model.weight.item() == 9.0
    assert model.weight.item() == 10.0

    resumed = TailAverage(model, 0.3)
    resumed.load(tmp_path)
    step(resumed, 10)
    resumed.take()
    assert model.weight.item() == 9.0


def test_without_a_share_nothing_is_averaged_or_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1, 1)
    before = model.weight.clone()
    average = TailAverage(model, 0.0)
    step(average, 10)
    monkeypatch.setattr(Tensor, "clone", None, raising=False)

    with average.applied():
        assert torch.equal(model.weight, before)
    assert average.count == 0


# Whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("choice") / "base", exits=None)


def run(base: Path, output: Path, **overrides: object) -> dict[str, Tensor]:
    data = base.parent / "data.jsonl"
    if not data.exists():
        rows = [{"instruction": f"Count to {i}.", "output": "one two three"} for i in range(50)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "base": str(base), "data": str(data), "output": str(output), "exits": "2,4",
        "dtype": "float32", "device": "cpu", "max_length": 96, "pack_length": 128, "lora_rank": 2,
        "max_tokens": 1300, "report_to": "none", "save_every": 3, "eval_every": 2,
        "held_out": 0.1,
    }  # fmt: skip
    train(load_train_settings({**flags, **overrides}))
    return {
        f"{path.name}:{name}": tensor
        for path in sorted(output.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def recipe(output: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((output / "sorted.json").read_text())["recipe"]
    return told


def assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_an_averaged_run_in_pieces_ends_at_the_weights_of_one_in_one_piece(
    base: Path, tmp_path: Path
) -> None:
    plain = run(base, tmp_path / "plain")
    whole = run(base, tmp_path / "whole", average=0.6)

    starts = 0
    while not starts or "stopped_by" in recipe(tmp_path / "pieces"):
        pieces = run(base, tmp_path / "pieces", average=0.6, max_steps_per_run=2)
        starts += 1

    assert starts > 3
    assert_equal(pieces, whole)
    assert any(not torch.equal(plain[name], tensor) for name, tensor in whole.items())
    assert (
        recipe(tmp_path / "pieces")["held_out_loss"] == recipe(tmp_path / "whole")["held_out_loss"]
    )


def losses_of(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations say these in turn, by step, whatever the model has learned."""

    def scripted(self: SortedTrainer, prefix: str) -> dict[str, float]:
        value = values[self.state.global_step]
        names = ["loss", "loss_mean", *(f"loss_exit_{e}" for e in self.sorted_model.exits)]
        return {f"{prefix}_{name}": value for name in names}

    monkeypatch.setattr(SortedTrainer, "_evaluate_now", scripted)


@pytest.mark.parametrize("pieces", [False, True])
def test_the_weights_of_the_best_evaluation_are_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: bool
) -> None:
    at_four = run(base, tmp_path / "four", max_steps_per_run=4)
    losses_of([9, 8, 7, 6, 1, 5, 4, 5, 6, 7, 8, 9], monkeypatch)
    more = {"max_steps_per_run": 5} if pieces else {}

    kept = run(base, tmp_path / "out", load_best_model_at_end=True, **more)
    if pieces:
        kept = run(base, tmp_path / "out", load_best_model_at_end=True)

    assert_equal(kept, at_four)
    assert recipe(tmp_path / "out")["best_step"] == 4
    assert recipe(tmp_path / "out")["held_out_loss"] == {"2": 1, "4": 1, "6": 1}


def test_a_run_ends_early_and_one_killed_at_that_moment_ends_there_too(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_of([9, 8, 2, 6, 3, 5, 4, 5, 6, 7, 8, 9], monkeypatch)
    whole = run(base, tmp_path / "whole", early_stopping_patience=2)
    assert recipe(tmp_path / "whole")["steps"] == 6

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "killed", early_stopping_patience=2)
    again = run(base, tmp_path / "killed", early_stopping_patience=2)

    assert_equal(again, whole)
    assert recipe(tmp_path / "killed")["steps"] == 6


def test_a_run_that_ends_before_its_mean_begins_says_so(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    losses_of([9, 8, 2, 6, 3, 5, 4, 5, 6, 7, 8, 9], monkeypatch)
    plain = run(base, tmp_path / "plain", early_stopping_patience=2)
    assert "--average" not in caplog.text

    ended = run(base, tmp_path / "out", early_stopping_patience=2, average=0.1)

    assert "ended early, after step 6 of" in caplog.text
    assert_equal(ended, plain)


def test_named_files_are_evaluated_and_nothing_is_held_out(base: Path, tmp_path: Path) -> None:
    judged = tmp_path / "judged.jsonl"
    judged.write_text(json.dumps({"instruction": "Say it.", "output": "it"}) + "\n")

    run(base, tmp_path / "out", eval_data=str(judged), held_out=0, max_tokens=300)

    told = recipe(tmp_path / "out")
    assert told["data"][0]["held_out_rows"] == 0
    assert told["eval_data"][0]["name"] == "judged.jsonl"
    assert set(told["held_out_loss"]) == {"2", "4", "6"}


@pytest.mark.parametrize(
    "flags", [{"load_best_model_at_end": True}, {"early_stopping_patience": 1}]
)
def test_a_choice_among_evaluations_of_nothing_is_refused(
    base: Path, tmp_path: Path, flags: dict[str, object]
) -> None:
    one_row = tmp_path / "one.jsonl"
    one_row.write_text(json.dumps({"instruction": "Say it.", "output": "it"}) + "\n")

    with pytest.raises(ConfigError, match="one row is never held out"):
        run(base, tmp_path / "out", data=str(one_row), **flags)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"eval_data": "x.jsonl", "held_out": 0.2}, "--held-out"),
        ({"held_out": 0, "load_best_model_at_end": True}, "--eval-data"),
        ({"held_out": 0, "early_stopping_patience": 1}, "--eval-data"),
    ],
)
def test_what_does_not_fit_together_is_refused(flags: dict[str, object], words: str) -> None:
    known = {"data": "d.jsonl", "output": "o", "exits": "2"}

    with pytest.raises(ConfigError, match=words):
        load_train_settings({**known, **flags})
