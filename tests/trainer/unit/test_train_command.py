"""What ``sortserve train`` refuses, in one line and exit code 2, and what it leaves behind."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sortserve.checkpoint.sorted_json import SortedInfo
from sortserve.cli import main
from sortserve_trainer.run import recipe, save, trainer
from sortserve_trainer.run.folder import Run
from sortserve_trainer.run.settings import load_train_settings
from support.tiny_models import make_tiny_checkpoint

ROWS = [{"instruction": f"Count to {i}.", "output": "one two three"} for i in range(40)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "base", exits=None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path)


def write_rows(folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def command(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    """A quick run; flags in ``more`` take the place of those here."""
    flags = {"--base": str(base), "--data": str(data), "--output": str(output), "--exits": "2,4"}
    flags |= {"--max-tokens": "600", "--pack-length": "128", "--max-length": "128"}
    flags |= {"--dtype": "float32", "--lora-rank": "2", "--held-out": "0", "--report-to": "none"}
    kept = [part for name, value in flags.items() if name not in more for part in (name, value)]
    return ["train", *kept, *more]


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a command ends with, which must end with exit code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "softer"], ["--method 'softer'", "soft+kd, soft, sft, sft+ict"]),
        (["--exits", "4,2"], ["--exits", "must ascend"]),
        (["--exits", "2,9"], ["--exits", "1..6"]),
        (["--exits", "0,2"], ["--exits", "greater than or equal to 1"]),
        (["--exits", "two"], ["--exits", "integer"]),
        (["--learning-rate", "0"], ["--learning-rate", "greater than 0"]),
        (["--learning-rate", "nan"], ["--learning-rate", "finite"]),
        (["--held-out", "1"], ["--held-out", "less than 1"]),
        (["--max-length", "500"], ["--max-length 500", "--pack-length 128"]),
        (["--lora-rank", "100000"], ["--lora-rank 100000", "(96)"]),
        (["--lora-targets", "nothing"], ["--lora-targets", "nothing"]),
        (["--lora-targets", "q_proj,k_porj"], ["--lora-targets", "'k_porj'", "k_proj"]),
        (["--lora-targets", "q_proj,lm_head"], ["--lora-targets", "lm_head", "one tensor"]),
        (["--quantize", "nf4", "--lora-rank", "0"], ["--quantize nf4", "--lora-rank"]),
        (["--teacher", "base", "--lora-rank", "0"], ["--teacher base", "--lora-rank"]),
        (["--teacher", "base", "--freeze-trunk"], ["--teacher base", "--freeze-trunk"]),
        (["--teacher", "base", "--distill", "0"], ["--teacher base", "--distill"]),
        (["--freeze-trunk", "--exit-modules", "none"], ["--freeze-trunk", "nothing to train"]),
        (["--exit-modules", "2=layer,3=mlp"], ["--exit-modules", "exit 3", "2, 4"]),
        (["--exit-modules", "2=layer,4"], ["--exit-modules", "EXIT=KIND"]),
        (["--report-to", "nobody"], ["--report-to 'nobody'"]),
        (
            ["--freeze-trunk", "--method", "sft", "--exit-modules", "affine"],
            ["--freeze-trunk with --method sft", "nothing to train"],
        ),
        (["--freeze-trunk", "--exits", "6"], ["--freeze-trunk", "nothing to train"]),
        (["--freeze-trunk", "--method", "soft"], ["--freeze-trunk", "nothing to train"]),
        (
            ["--freeze-trunk", "--exit-modules", "4=none", "--exits-per-step", "1"],
            ["--exits-per-step 1", "(4)", "2 or more"],
        ),
        (["--method", "sft+ict", "--exits", "6"], ["--method sft+ict", "--exits names none"]),
        (["--trunk-cache", "/nowhere"], ["--trunk-cache", "needs --freeze-trunk"]),
        (["--batch-size", "1000"], ["--data", "smaller batches"]),
        (["--exit", "4"], ["--exit", "Did you mean --exits?"]),
        (["--device", "tpu"], ["--device", "'auto', 'cpu' or 'cuda'"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_allowed(
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: list[str],
) -> None:
    line = refusal(capsys, command(base, data, tmp_path / "out", *flags))

    for word in words:
        assert word in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("missing", ["--data", "--exits", "--output"])
def test_a_flag_that_is_needed_is_asked_for(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    arguments = ["train", "--data", str(data), "--exits", "2", "--output", str(tmp_path / "out")]
    at = arguments.index(missing)

    assert f"{missing} is missing" in refusal(capsys, arguments[:at] + arguments[at + 2 :])


def test_a_broken_row_is_named_by_file_and_line(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with data.open("a") as file:
        file.write('{"instruction": "no answer"}\n')

    assert f"{data}:41" in refusal(capsys, command(base, data, tmp_path / "out"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data_is_refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    data.write_text(content)

    assert str(data) in refusal(capsys, command(base, data, tmp_path / "out"))


def test_data_that_is_no_regular_file_is_refused_and_never_waited_for(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.unlink()
    os.mkfifo(data)

    assert "no regular file" in refusal(capsys, command(base, data, tmp_path / "out"))


def test_a_base_without_weights_is_refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "model.safetensors").unlink()

    line = refusal(capsys, command(base, data, tmp_path / "out"))

    assert str(base) in line
    assert "safetensors" in line


def test_an_output_folder_that_is_not_empty_is_refused_before_anything_is_done(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")

    line = refusal(capsys, command(base, data, output))

    assert "not empty" in line
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--freeze-trunk", "--trunk-cache", "CACHE"],
        ["--average", "0.5"],
        ["--method", "sft+ict"],
        ["--held-out", "0.1", "--early-stopping-patience", "2", "--load-best-model-at-end"],
    ],
)
def test_what_needs_whole_weights_is_refused_under_fsdp_before_anything_is_done(
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
) -> None:
    # As `accelerate launch --use_fsdp --fsdp_version 2` sets them.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    cache = tmp_path / "cache"
    flags = [str(cache) if flag == "CACHE" else flag for flag in flags]

    line = refusal(capsys, command(base, data, tmp_path / "out", *flags))

    asked = {"--trunk-cache", "--average", "--method", "--early-stopping-patience"}
    asked.add("--load-best-model-at-end")
    for word in (*asked.intersection(flags), "FSDP", "leave", "DDP"):
        assert word in line
    assert not cache.exists()
    assert not list(tmp_path.glob("out*"))


def test_a_run_without_a_library_that_it_does_not_need_can_tell_its_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine without peft trains all weights, and would say so with a traceback at the end."""
    version = importlib.metadata.version

    def without_peft(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_peft)

    assert "peft" not in recipe.versions()
    assert recipe.versions()["torch"]


def test_an_unfinished_run_is_not_resumed_with_other_flags(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    settings = load_train_settings({"data": str(data), "exits": "2,4", "output": str(output)})
    with Run.open(settings) as run:
        run.begin([])

    line = refusal(capsys, command(base, data, output))

    assert f"{output}.run holds an unfinished run" in line


@pytest.mark.parametrize("module", [save, trainer], ids=["checkpoint", "state"])
def test_a_full_disk_leaves_no_checkpoint_and_the_run_goes_on_afterwards(
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
) -> None:
    output = tmp_path / "out"

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", no_space)
        line = refusal(capsys, command(base, data, output))
    assert "No space left on device" in line
    assert not output.exists()

    assert main(command(base, data, output)) == 0
    assert SortedInfo.read(output) is not None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint beside its base ``base``, which no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    base = make_tiny_checkpoint(folder / "base", exits=None)
    arguments = command(
        base, write_rows(folder), folder / "out", "--seed", "7", "--held-out", "0.1"
    )
    assert main(arguments) == 0
    return folder / "out"


def test_a_checkpoint_tells_how_it_was_made(finished: Path) -> None:
    info = SortedInfo.read(finished)
    assert info is not None
    assert info.exits == (2, 4, 6)
    recipe = info.recipe
    assert recipe["method"] == "soft+kd"
    assert recipe["command"].startswith("sortserve train --base")
    assert recipe["seed"] == 7
    assert recipe["data"][0]["name"] == "data.jsonl"
    assert len(recipe["data"][0]["sha256"]) == 64
    assert set(recipe["held_out_loss"]) == {"2", "4", "6"}
    assert {"torch", "transformers", "sortserve"} <= set(recipe["versions"])
    card = (finished / "README.md").read_text()
    assert recipe["command"] in card
    assert not finished.with_name("out.run").joinpath("states").exists()


def test_every_run_draws_the_loss_of_each_exit_in_its_own_tensorboard_log(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)

    for name in ("first", "second"):
        arguments = command(base, data, tmp_path / name, "--held-out", "0.1", "--log-every", "1")
        arguments[arguments.index("--report-to") + 1] = "tensorboard"
        assert main(arguments) == 0

        drawn = EventAccumulator(str(tmp_path / f"{name}.run" / "tensorboard")).Reload()
        for exit_layer in (2, 4, 6):
            assert drawn.Scalars(f"train/loss_exit_{exit_layer}")
            assert drawn.Scalars(f"eval/loss_exit_{exit_layer}")


def test_a_checkpoint_can_be_read_by_whoever_can_read_its_folder(finished: Path) -> None:
    allowed = finished.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o666 for path in finished.iterdir()} == {allowed}


def test_a_finished_checkpoint_can_be_trained_further(finished: Path, data: Path) -> None:
    second = finished.with_name("second")
    arguments = command(finished, data, second)
    del arguments[arguments.index("--lora-rank") : arguments.index("--lora-rank") + 2]

    assert main(arguments) == 0

    info = SortedInfo.read(second)
    assert info is not None
    assert info.base == "../base"
    assert info.recipe["continued_from"]["command"]
