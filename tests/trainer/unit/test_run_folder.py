"""What ``OUTPUT.run`` takes for the same run, whom it lets in, and what a refused run leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sortserve.cli import main
from sortserve.core.errors import ConfigError
from sortserve_trainer.run.folder import Run, plain_settings
from sortserve_trainer.run.settings import TrainSettings, load_train_settings
from support.tiny_models import make_tiny_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("run") / "base", exits=None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    row = json.dumps({"instruction": "Count.", "output": "one two three"})
    path.write_text(f"{row}\n" * 40, encoding="utf-8")
    return path


def settings(tmp_path: Path, **flags: object) -> TrainSettings:
    known = {"data": str(tmp_path / "data.jsonl"), "exits": "2,4", "output": tmp_path / "a" / "out"}
    return load_train_settings({**known, **flags})


def described(sha256: str = "1" * 64) -> list[dict[str, str]]:
    return [{"reference": "data.jsonl", "sha256": sha256}]


def begin(tmp_path: Path, sha256: str = "1" * 64, **flags: object) -> None:
    with Run.open(settings(tmp_path, **flags)) as run:
        run.begin(described(sha256))


def test_a_run_that_is_not_begun_leaves_nothing_not_even_the_folders_above(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), Run.open(settings(tmp_path)) as run:
        (run.folder / "tensorboard").mkdir()
        raise ZeroDivisionError

    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_begun_stays_whatever_ends_it(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), Run.open(settings(tmp_path)) as run:
        run.begin(described())
        raise ZeroDivisionError

    assert [path.name for path in run.folder.iterdir()] == ["run.json"]


def test_a_second_run_on_the_same_output_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    with Run.open(settings(tmp_path)) as run:
        with pytest.raises(ConfigError, match="another process is training this --output"):
            begin(tmp_path)
        assert run.folder.exists()

    begin(tmp_path)


def test_a_lock_ends_with_the_process_that_has_it(tmp_path: Path) -> None:
    folder = settings(tmp_path).output.with_name("out.run")
    folder.mkdir(parents=True)
    code = (
        "import fcntl,os,sys; f=open(sys.argv[1],'ab'); fcntl.flock(f,fcntl.LOCK_EX);"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "lock")], check=False)
    assert (folder / "lock").exists()

    begin(tmp_path)


@pytest.mark.parametrize(
    "flags", [{"log_every": 3}, {"save_every": 3}, {"report_to": "none"}, {"max_time": "5m"}]
)
def test_flags_that_change_no_weight_may_differ(tmp_path: Path, flags: dict[str, Any]) -> None:
    begin(tmp_path)

    begin(tmp_path, **flags)


def test_another_flag_is_refused_with_both_values(tmp_path: Path) -> None:
    begin(tmp_path)

    with pytest.raises(ConfigError, match=r"with --seed 0, not 1"):
        begin(tmp_path, seed=1)


def test_another_number_of_processes_is_refused_once_there_are_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is of all of them. Data that were prepared by one are good for any number."""
    begin(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with Run.open(settings(tmp_path)) as run:
        run.check_base("ab" * 16)
        run.begin(described())

    with Run.open(settings(tmp_path)):
        pass
    monkeypatch.setenv("WORLD_SIZE", "4")
    with (
        pytest.raises(ConfigError, match="unfinished run of 8 processes, not 4"),
        Run.open(settings(tmp_path)),
    ):
        pass


def test_the_same_file_may_be_named_another_way(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    (tmp_path / "base").mkdir()
    begin(tmp_path, digest, data="data.jsonl:0.5", base="base")

    begin(tmp_path, data=f"./../{tmp_path.name}/data.jsonl:0.50", base=str(tmp_path / "base"))
    with pytest.raises(ConfigError, match="--data"):
        begin(tmp_path, data=f"{data}:0.6", base="base")
    with pytest.raises(ConfigError, match="--base"):
        begin(tmp_path, data="data.jsonl:0.5", base="elsewhere")
    data.write_text("other")
    with pytest.raises(ConfigError, match="--data"):
        begin(tmp_path, data=str(data), base="base")


def test_a_data_file_that_has_changed_is_refused_by_name_and_hash(tmp_path: Path) -> None:
    begin(tmp_path, "a" * 64)

    with Run.open(settings(tmp_path)) as run:
        run.check_data(described("a" * 64))
        with pytest.raises(ConfigError, match=r"--data data\.jsonl has changed .*aaaa.*now bbbb"):
            run.check_data(described("b" * 64))


def test_a_run_of_before_there_were_versions_goes_on_as_it_was(tmp_path: Path) -> None:
    record = plain_settings(settings(tmp_path, freeze_trunk=True))
    for added in ("trunk_cache", "trunk_cache_gb", "trunk_cache_dtype"):
        del record[added]
    folder = settings(tmp_path).output.with_name("out.run")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))

    with Run.open(settings(tmp_path, freeze_trunk=True)) as run:
        run.check_data(described())
        run.begin(described())

    assert run.decays_all
    assert json.loads((folder / "run.json").read_text()) == record
    with pytest.raises(ConfigError, match="--trunk-cache"):
        begin(tmp_path, freeze_trunk=True, trunk_cache=tmp_path / "c")


# Whole commands


def command(base: Path, data: Path, output: Path, **more: str) -> list[str]:
    flags = {"base": base, "data": data, "output": output, "exits": "2,4", "max_tokens": "600"}
    flags |= {"pack_length": "128", "max_length": "128", "dtype": "float32", "lora_rank": "2"}
    flags |= {"held_out": "0.1", "report_to": "none"} | more
    return [
        "train",
        *(part for n, v in flags.items() for part in (f"--{n}".replace("_", "-"), f"{v}")),
    ]


@pytest.mark.parametrize(
    "flags", [{"device": "cuda"}, {"max_length": "3"}, {"exits": "2,9"}, {"report_to": "nobody"}]
)
def test_a_command_refused_before_its_first_step_leaves_nothing(
    base: Path, data: Path, tmp_path: Path, flags: dict[str, str]
) -> None:
    if "device" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")

    assert main(command(base, data, tmp_path / "new" / "out", **flags)) == 2

    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_a_rank_that_does_not_fit_leaves_nothing_and_the_corrected_command_runs(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(base, data, tmp_path / "first")) == 0

    assert main(command(tmp_path / "first", data, tmp_path / "out", lora_rank="3")) == 2
    assert "--lora-rank 3 does not fit" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))

    assert main(command(tmp_path / "first", data, tmp_path / "out")) == 0


def test_a_changed_data_file_is_refused_by_the_command(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leased = command(base, data, tmp_path / "out", max_steps_per_run="2")
    assert main(leased) == 0
    kept = data.read_bytes()
    data.write_bytes(kept + kept)

    assert main(leased) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--data {data} has changed since the unfinished run" in line

    data.write_bytes(kept)
    moved = data.rename(tmp_path / "moved.jsonl")
    assert main(command(base, moved, tmp_path / "out", log_every="1")) == 0


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_changed_base_is_refused_by_the_command(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    own = tmp_path / "own"
    if name.startswith("adapter"):
        assert main(command(base, data, own)) == 0
    else:
        shutil.copytree(base, own)
    leased = command(own, data, tmp_path / "out", max_steps_per_run="2")
    assert main(leased) == 0
    kept = (own / name).read_bytes()
    tensors = {key: 1.01 * tensor for key, tensor in load_file(own / name).items()}
    save_file(tensors, own / name, metadata={"format": "pt"})

    assert main(leased) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--base {own} has changed since the unfinished run" in line

    (own / name).write_bytes(kept)
    assert main(command(own, data, tmp_path / "out")) == 0


def test_a_base_of_the_same_name_in_another_folder_is_another_one(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_tiny_checkpoint(tmp_path / "there" / "base", exits=None, tie_word_embeddings=False)
    monkeypatch.chdir(base.parent)
    leased = command(Path("base"), data, tmp_path / "out", max_steps_per_run="2")
    assert main(leased) == 0

    monkeypatch.chdir(other.parent)
    assert main(leased) == 2


def test_the_base_of_prepared_data_counts_from_the_first_step_on(
    base: Path, data: Path, tmp_path: Path
) -> None:
    begin(tmp_path)
    with Run.open(settings(tmp_path)) as run:
        run.check_base("a" * 64)
        run.begin(described())

    with Run.open(settings(tmp_path)) as run:
        run.check_base("a" * 64)
        with pytest.raises(ConfigError, match=r"--base .* has changed .*aaaa.*now bbbb"):
            run.check_base("b" * 64)


def test_a_disk_that_is_full_while_torch_writes_is_one_line_and_the_run_goes_on(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """The limit is the system's own: torch says no more than that a position is not as expected."""
    arguments = command(base, data, tmp_path / "out", save_every="2", lora_rank="8")
    # Adam's states are twice what is trained: the limit stops torch.save, not safetensors.
    limited = (
        "import resource, sys; from sortserve.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (350_000, 350_000));"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", limited, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "out.run/states cannot be written: the disk is full" in done.stderr.replace("\n", "")
    assert main(arguments) == 0


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.pt"])
def test_a_damaged_state_is_one_line_and_the_run_goes_on_from_the_one_before(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    leased = command(base, data, tmp_path / "out", save_every="1", max_steps_per_run="2")
    assert main(leased) == 0
    newest = max((tmp_path / "out.run" / "states").glob("checkpoint-*"))
    (newest / name).write_bytes((newest / name).read_bytes()[:200])

    assert main(leased) == 2

    assert "out.run/states is damaged (" in capsys.readouterr().err.splitlines()[-1]
    shutil.rmtree(newest)
    assert main(command(base, data, tmp_path / "out")) == 0


@pytest.mark.parametrize("content", ["", '{"version": 2', "[]"])
def test_a_damaged_record_of_a_run_is_one_line(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    begin(tmp_path / "b")
    folder = settings(tmp_path / "b").output.with_name("out.run")
    (folder / "run.json").write_text(content)

    assert main(command(base, data, tmp_path / "b" / "a" / "out")) == 2

    assert f"{folder}/run.json is damaged" in capsys.readouterr().err.splitlines()[-1]
