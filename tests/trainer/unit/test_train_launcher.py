"""What ``sortserve train`` makes of how it is launched, before it loads anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from sortserve.core.errors import ConfigError
from sortserve_trainer.run.launcher import follow_launcher, on_one_gpu
from sortserve_trainer.run.settings import TrainSettings, load_train_settings

WHOLE = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def settings(**flags: object) -> TrainSettings:
    needed = {"data": "rows.jsonl", "output": "out", "exits": "2,4"}
    return load_train_settings({**needed, **flags})


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ],
)
def test_ways_to_share_weights_out_that_are_not_supported_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigError, match=f"{name} is not supported.*--fsdp_version 2"):
        follow_launcher(settings())


def test_under_fsdp_each_process_loads_the_base_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's default is that the first sends the others what it has."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", WHOLE: "true"}.items():
        monkeypatch.setenv(name, value)

    follow_launcher(settings())

    assert os.environ[WHOLE] == "false"


@pytest.mark.parametrize(("device", "chosen"), [("auto", [3]), ("cuda", [3]), ("cpu", [])])
def test_each_process_loads_onto_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, chosen: list[int]
) -> None:
    asked: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)

    follow_launcher(settings(device=device))

    assert asked == chosen


def test_a_process_alone_uses_one_gpu_and_says_how_to_use_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 8

    on_one_gpu(arguments)

    assert arguments.n_gpu == 1  # transformers' Trainer would deal batches out to more
    assert "accelerate launch --num_processes 8" in caplog.text
