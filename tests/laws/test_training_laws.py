"""Laws of training: equalities between two ways to get the same weights or losses (fp32)."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sortserve.checkpoint.sorted_json import SortedInfo
from sortserve_trainer.run.export import export_submodel
from sortserve_trainer.run.prepare import prepare
from sortserve_trainer.run.settings import load_train_settings
from sortserve_trainer.run.train import train
from support.tiny_models import make_tiny_checkpoint
from support.training_runs import (
    assert_close,
    assert_equal,
    flags,
    run,
    start,
    tensors,
)

STATE = "complete"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("training") / "base", exits=None)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the command gives as ``flags`` has it."""
    return run(base, tmp_path_factory.mktemp("plain") / "out")


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


@pytest.mark.parametrize("method", ["soft", "sft", "sft+ict"])
def test_all_weights_over_an_adapter_train_as_those_of_the_merged_model(
    base: Path, tmp_path: Path, method: str
) -> None:
    run(base, tmp_path / "first", exit_modules="none")
    export_submodel(str(tmp_path / "first"), 6, tmp_path / "merged")

    trained = {
        name: run(tmp_path / name, tmp_path / f"{name}-{method}", method=method, lora_rank=None)
        for name in ("first", "merged")
    }

    assert_equal(trained["first"], trained["merged"])
    before = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in before.items():
        assert not torch.equal(trained["first"][f"model.safetensors:{name}"], tensor), name


def test_modules_that_a_base_has_train_by_a_method_that_makes_none(
    base: Path, tmp_path: Path
) -> None:
    first = run(base, tmp_path / "first", exits="2")

    then = run(tmp_path / "first", tmp_path / "then", method="soft", freeze_trunk=True, exits="2,4")

    assert kinds(tmp_path / "then") == {"2": "affine"}
    name = "exit_modules.safetensors:exits.2.affine.weight"
    assert not torch.equal(then[name], first[name])


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


def test_kinds_of_some_exits_leave_the_modules_of_others_as_they_are(
    base: Path, tmp_path: Path
) -> None:
    first = run(base, tmp_path / "first", exits="2,4")  # affine

    then = run(tmp_path / "first", tmp_path / "then", learning_rate=1e-9, exit_modules="2=layer")

    assert kinds(tmp_path / "then") == {"2": "layer", "4": "affine"}
    (name,) = (name for name in first if name.endswith("exits.4.affine.weight"))
    torch.testing.assert_close(then[name], first[name], rtol=0, atol=1e-6)


def kinds(folder: Path) -> dict[str, str]:
    """Of the exit modules, by exit."""
    found: dict[str, str] = json.loads((folder / "sorted.json").read_text())["exit_modules"]
    return found


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


def wait_for(path_pattern: str, folder: Path, process: subprocess.Popen[bytes]) -> None:
    while not list(folder.glob(path_pattern)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)


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
