"""Laws of training: equalities between two ways to get the same weights or losses (fp32)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sortserve.checkpoint.sorted_json import SortedInfo
from sortserve_trainer.run.prepare import prepare
from sortserve_trainer.run.settings import load_train_settings
from sortserve_trainer.run.train import train
from support.tiny_models import make_tiny_checkpoint

STATE = "complete"


def write_data(folder: Path, num_rows: int = 60) -> Path:
    """Rows of different lengths that a tiny model can learn a little of."""
    rows = [
        {"instruction": f"Say {word} {i % 4 + 1} times.", "output": " ".join([word] * (i % 4 + 1))}
        for i, word in enumerate(["red", "blue", "green", "black", "white"] * (num_rows // 5))
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("training") / "base", exits=None)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the command gives as ``flags`` has it."""
    return run(base, tmp_path_factory.mktemp("plain") / "out")


def flags(base: Path, output: Path, **overrides: object) -> dict[str, object]:
    """A short run in fp32 on a tiny model."""
    return {
        "base": str(base),
        "data": str(write_data(base.parent)),
        "output": str(output),
        "exits": "2,4",
        "dtype": "float32",
        "device": "cpu",
        "max_length": 96,
        "pack_length": 128,
        "learning_rate": 2e-3,
        "lora_rank": 4,
        "max_tokens": 1300,
        "held_out": 0,
        "report_to": "none",
        "save_every": 3,
        **overrides,
    }


def run(base: Path, output: Path, **overrides: object) -> dict[str, Tensor]:
    """The tensors of the checkpoint that a run ends with."""
    return tensors(train(load_train_settings(flags(base, output, **overrides))))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.name}:{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_close(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=2e-4, msg=name)


def test_the_same_command_gives_the_same_weights(
    base: Path, tmp_path: Path, plain: dict[str, Tensor]
) -> None:
    assert_equal(run(base, tmp_path / "second"), plain)


@pytest.mark.parametrize("method", [pytest.param("soft", marks=pytest.mark.slow), "sft"])
def test_so_it_does_by_any_method(base: Path, tmp_path: Path, method: str) -> None:
    first = run(base, tmp_path / "first", method=method)
    second = run(base, tmp_path / "second", method=method)

    assert_equal(first, second)


def test_one_pack_and_four_accumulations_are_four_packs(base: Path, tmp_path: Path) -> None:
    options = {"vocab_sample": 0, "method": "soft+kd"}

    accumulated = run(base, tmp_path / "a", batch_size=1, gradient_accumulation=4, **options)
    at_once = run(base, tmp_path / "b", batch_size=4, gradient_accumulation=1, **options)

    assert_close(accumulated, at_once)


def test_soft_with_the_full_depth_alone_is_sft(base: Path, tmp_path: Path) -> None:
    soft = run(base, tmp_path / "soft", method="soft", exits="6", lora_rank=0)
    sft = run(base, tmp_path / "sft", method="sft", exits="2,4", lora_rank=0)

    assert_equal(soft, sft)


@pytest.mark.parametrize("kind", ["affine", "layer"])
def test_gradient_checkpointing_changes_nothing(
    base: Path, tmp_path: Path, plain: dict[str, Tensor], kind: str
) -> None:
    kept = plain if kind == "affine" else run(base, tmp_path / "kept", exit_modules=kind)
    recomputed = run(base, tmp_path / "recomputed", exit_modules=kind, gradient_checkpointing=True)

    assert_close(kept, recomputed)


@pytest.mark.parametrize("kind", ["mlp", "layer"])
def test_a_frozen_trunk_stays_what_it_was(base: Path, tmp_path: Path, kind: str) -> None:
    names = run(base, tmp_path / "frozen", freeze_trunk=True, exit_modules=kind)

    assert {name.partition(":")[0] for name in names} == {"exit_modules.safetensors"}


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_a_frozen_trunk_keeps_the_adapter_that_it_was_trained_with(
    base: Path, tmp_path: Path, save_dtype: str
) -> None:
    first = run(base, tmp_path / "first", save_dtype=save_dtype)

    then = run(tmp_path / "first", tmp_path / "then", freeze_trunk=True, save_dtype=save_dtype)

    assert first.keys() == then.keys()
    for name, tensor in then.items():
        assert torch.equal(tensor, first[name]) is name.startswith("adapter_model"), name


def test_modules_of_a_kind_that_is_asked_for_take_the_place_of_others(
    base: Path, tmp_path: Path
) -> None:
    first = run(base, tmp_path / "first", exits="2")  # affine

    run(tmp_path / "first", tmp_path / "kept", freeze_trunk=True, exits="2,4")
    asked = run(
        tmp_path / "first", tmp_path / "asked", freeze_trunk=True, exits="2", exit_modules="layer"
    )

    assert kinds(tmp_path / "kept") == {"2": "affine", "4": "affine"}
    assert kinds(tmp_path / "asked") == {"2": "layer"}
    trunk = {name: tensor for name, tensor in first.items() if name.startswith("adapter_model")}
    assert_equal({name: asked[name] for name in trunk}, trunk)
    modules = {name.rpartition(":")[2] for name in asked.keys() - trunk.keys()}
    assert {"exits.2.q_proj.weight", "exits.2.norm.weight"} < modules
    assert "exits.2.affine.weight" not in modules
    then = run(tmp_path / "asked", tmp_path / "then", freeze_trunk=True, exits="2,4")
    assert then.keys() > asked.keys()
    assert kinds(tmp_path / "then") == {"2": "layer", "4": "affine"}


def kinds(folder: Path) -> dict[str, str]:
    """Of the exit modules, by exit."""
    found: dict[str, str] = json.loads((folder / "sorted.json").read_text())["exit_modules"]
    return found


COMMAND = (
    "import sys; from sortserve_trainer.run.train import train_command; train_command(sys.argv[1:])"
)


SAVES_ONCE = """
import signal
from sortserve_trainer.run.trainer import SortedTrainer
save = SortedTrainer._save_checkpoint

def save_once(*given):
    SortedTrainer._save_checkpoint = lambda *given: signal.pause()
    save(*given)

SortedTrainer._save_checkpoint = save_once
"""
"""It saves one state, goes on, and waits for its end where it would save another."""


def start(
    base: Path, output: Path, *, before: str = "", **overrides: Any
) -> subprocess.Popen[bytes]:
    """``sortserve train`` in a process of its own; ``before`` is run first."""
    arguments = [
        part
        for name, value in flags(base, output, **overrides).items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-c", before + COMMAND, *arguments],
        env=environment,
        stderr=subprocess.DEVNULL,
    )


def wait_for(path_pattern: str, folder: Path, process: subprocess.Popen[bytes]) -> None:
    while not list(folder.glob(path_pattern)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["affine", "layer"])
def test_a_run_that_is_killed_and_started_again_ends_at_the_same_weights(
    base: Path, tmp_path: Path, kind: str
) -> None:
    """Only what is killed needs a process of its own: one loads libraries for ten seconds."""
    options: dict[str, Any] = {"save_every": 2, "exit_modules": kind}
    undisturbed = run(base, tmp_path / "undisturbed", **options)

    killed = tmp_path / "killed"
    process = start(base, killed, before=SAVES_ONCE, **options)
    wait_for(f"states/checkpoint-*/{STATE}", tmp_path / "killed.run", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists(), "nothing half-trained is taken for a checkpoint"
    assert_equal(run(base, killed, **options), undisturbed)


def test_a_run_of_two_steps_at_a_time_ends_at_the_same_weights(
    base: Path, tmp_path: Path, plain: dict[str, Tensor]
) -> None:
    output = tmp_path / "leased"
    starts, is_done = 0, False

    while not starts or (tmp_path / "leased.run" / "run.json").exists():
        starts += 1
        found = run(base, output, max_steps_per_run=2, log_every=starts)
        info = SortedInfo.read(output)
        assert info is not None
        assert info.exits == (2, 4, 6)
        assert found.keys() == plain.keys()

        is_done = "stopped_by" not in info.recipe

    assert starts > 3
    assert is_done
    assert_equal(plain, found)


def test_prepared_data_trains_to_the_same_weights_without_its_files(
    base: Path, tmp_path: Path, plain: dict[str, Tensor]
) -> None:
    settings = load_train_settings(flags(base, tmp_path / "prepared"))
    data = base.parent / "data.jsonl"

    prepare(settings)
    away = data.rename(tmp_path / "away.jsonl")
    try:
        found = tensors(train(settings))
    finally:
        away.rename(data)

    assert_equal(found, plain)
    assert not (tmp_path / "prepared.run" / "data").exists()


def test_a_state_that_was_cut_short_is_not_resumed_from(
    base: Path, tmp_path: Path, plain: dict[str, Tensor]
) -> None:
    states = tmp_path / "resumed.run" / "states"
    half = states / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "trained.safetensors").write_bytes(b"half of a file")

    assert_equal(run(base, tmp_path / "resumed"), plain)


def free_port() -> int:
    """One that no other test is given: systems give ports above 32767 to who names none."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", ["soft+kd", pytest.param("soft", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_learns_from_the_same_global_batch(
    base: Path, tmp_path: Path, method: str
) -> None:
    options: dict[str, Any] = {"method": method, "vocab_sample": 0}
    one = run(base, tmp_path / "one", batch_size=2, **options)

    port = str(free_port())
    processes = []
    for rank in range(2):
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            ACCELERATE_USE_CPU="true",
        )
        try:
            processes.append(start(base, tmp_path / "two", batch_size=1, **options))
        finally:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
            for name in ("MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
                os.environ.pop(name, None)
    assert [process.wait() for process in processes] == [0, 0]

    assert_close(one, tensors(tmp_path / "two"))
