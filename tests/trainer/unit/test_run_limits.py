"""A run ends in time: at a limit, with a checkpoint and a state to go on from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sortserve.core.errors import ConfigError
from sortserve_trainer.run.duration import duration_text, parse_duration
from sortserve_trainer.run.limits import RunLimits
from sortserve_trainer.run.save import atomic_folder, is_unfinished


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90), ("90s", 90), ("20m", 1200), ("1h30m", 5400), ("2d", 172800), ("1m5", 65),
        (300, 300), (0.5, 0.5),
    ],
)  # fmt: skip
def test_a_duration_is_read_as_people_write_it(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "m", "20 minutes", "-5m", "1m2h", "9" * 12, True, None, "nan", -1]
)
def test_what_is_no_duration_is_refused_with_examples(text: object) -> None:
    with pytest.raises(ValueError, match="such as 90s, 20m or 1h30m"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["1h30m", "20m", "45s", "2d1h"])
def test_a_duration_is_said_as_it_was_written(text: str) -> None:
    assert duration_text(parse_duration(text)) == text


class Run:
    """Steps of transformers' loop, by a clock that each step moves."""

    def __init__(self, *, step_s: float = 1.0, max_steps: int = 100) -> None:
        self.now_s, self.step_s = 50.0, step_s
        self.args = SimpleNamespace(world_size=1)
        self.state = SimpleNamespace(global_step=0, max_steps=max_steps)
        self.control = SimpleNamespace(should_save=False, should_training_stop=False)

    def limits(self, *, max_time_s: float | None = None, max_steps: int | None = None) -> RunLimits:
        return RunLimits(
            max_time_s=max_time_s, max_steps=max_steps, started_s=50.0, clock=lambda: self.now_s
        )

    def steps_until_stopped(self, limits: RunLimits) -> int:
        while (
            not self.control.should_training_stop and self.state.global_step < self.state.max_steps
        ):
            self.now_s += self.step_s
            self.state.global_step += 1
            limits.on_step_end(self.args, self.state, self.control)
        return int(self.state.global_step)


def test_a_run_stops_after_the_step_that_reaches_its_time() -> None:
    run = Run(step_s=7.0)
    limits = run.limits(max_time_s=30.0)

    assert run.steps_until_stopped(limits) == 5
    assert run.control.should_save
    assert limits.reached == "--max-time 30s"


@pytest.mark.parametrize(("step_s", "num_looks", "stops_after"), [(30.0, 7, 7), (0.5, 27, 102)])
def test_processes_that_agree_on_the_time_do_so_as_often_as_their_steps_are_long(
    monkeypatch: pytest.MonkeyPatch, step_s: float, num_looks: int, stops_after: int
) -> None:
    run = Run(step_s=step_s, max_steps=1000)
    run.args = SimpleNamespace(world_size=2, device="cpu")
    looks: list[int] = []
    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda decision, _: looks.append(int(decision))
    )
    limits = run.limits(max_time_s=6.5 * step_s if step_s > 1 else 50.5)

    assert run.steps_until_stopped(limits) == stops_after
    assert len(looks) == num_looks
    assert looks[-1] == 0


def test_a_run_stops_after_so_many_steps_of_its_own() -> None:
    run = Run()
    run.state.global_step = 12
    limits = run.limits(max_steps=3)

    assert run.steps_until_stopped(limits) == 15
    assert limits.reached == "--max-steps-per-run 3"


def test_the_last_step_of_all_is_no_limit_reached() -> None:
    run = Run(max_steps=4)
    limits = run.limits(max_steps=4, max_time_s=3.5)

    for _ in range(4):
        run.state.global_step += 1
        run.now_s += 1.0
        limits.on_step_end(run.args, run.state, run.control)

    assert limits.reached is None
    assert not run.control.should_training_stop


def test_an_unfinished_checkpoint_is_replaced_whole_and_only_if_it_may(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "sorted.json").write_text('{"recipe": {"stopped_by": "--max-time 20m"}}')
    (folder / "old").touch()
    assert is_unfinished(folder)

    with pytest.raises(ConfigError, match="not empty"), atomic_folder(folder):
        pass
    with atomic_folder(folder, replaces_unfinished=True) as draft:
        (draft / "new").touch()

    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": 3}', '{"recipe": {"steps": 3}}'])
def test_any_other_folder_is_no_unfinished_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / "sorted.json").write_text(text)

    assert not is_unfinished(tmp_path)
    assert not is_unfinished(tmp_path / "nowhere")
