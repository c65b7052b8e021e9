"""What a run says while it runs, where there is no terminal: a line of everything."""

from __future__ import annotations

import io
from types import SimpleNamespace

import torch

from sortserve_trainer.commands.console import Console
from sortserve_trainer.run.meter import Meter
from sortserve_trainer.run.progress import ProgressDisplay

LOGS = {"loss_exit_2": 3.25, "loss_exit_6": 2.0, "tokens_per_s": 351.4, "memory_gb": 1.94}


def lines(
    *logs: dict[str, float], steps_between: int = 20, seconds_between: float = 60.0
) -> list[str]:
    """Of a run that goes on from step 40 of 100."""
    file = io.StringIO()
    now = [5.0]
    display = ProgressDisplay(Console(file=file), clock=lambda: now[0])
    state = SimpleNamespace(global_step=40, max_steps=100, is_world_process_zero=True)
    display.on_train_begin(None, state, None)
    for one in logs:
        state.global_step += steps_between
        now[0] += seconds_between
        display.on_step_end(None, state, None)
        display.on_log(None, state, None, logs=one)
    display.on_train_end(None, state, None)
    return file.getvalue().splitlines()


def test_a_line_has_each_exit_the_speed_the_memory_and_the_time_left() -> None:
    (line,) = lines(LOGS)

    assert line == (
        "step 60/100 training: exit 2 3.250, exit 6 2.000 | 351 tokens/s | 1.9 GB | 2m left"
    )


def test_the_last_line_has_no_time_left_and_an_evaluation_has_none_of_it() -> None:
    evaluation = {"eval_loss_exit_2": 3.5, "eval_loss": 3.5, "eval_loss_mean": 3.5}

    first, last = lines(evaluation, LOGS, steps_between=30)

    assert first == "step 70/100 held out: exit 2 3.500"
    assert last.endswith("| 1.9 GB")


def test_the_meter_counts_memory() -> None:
    assert 0.01 < Meter().read()["memory_gb"] < 1000


def test_the_meter_reads_what_all_processes_have_done() -> None:
    """Two with as many tokens, of which the other's losses are 1 higher at exit 2, and 2 at 6."""
    meter = Meter()
    inputs = {"target_rows": torch.arange(5), "input_ids": torch.zeros(1, 12, dtype=torch.int64)}
    means = {2: torch.tensor(3.0), 6: torch.tensor(2.0)}
    meter.add(means, inputs)
    alone = Meter()
    alone.add(means, inputs)
    asked: list[torch.Tensor] = []

    def total(own: torch.Tensor) -> torch.Tensor:
        asked.append(own)
        other = own.clone()
        other[:2] += torch.tensor([1.0, 2.0]) * 5
        return own + other

    found = meter.read(total)

    assert (found["loss_exit_2"], found["loss_exit_6"]) == (3.5, 3.0)
    assert asked[0].tolist() == [15.0, 10.0, 12.0, 5.0, 5.0]
    own = alone.read()
    assert (own["loss_exit_2"], own["loss_exit_6"]) == (3.0, 2.0)
