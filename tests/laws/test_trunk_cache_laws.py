"""Laws of training from a cache of the trunk's states: as without it, killed or not (fp32)."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sortserve.core.errors import ConfigError
from sortserve_trainer.model import trunk_cache
from sortserve_trainer.model.sorted_model import SortedModel
from sortserve_trainer.model.trunk_cache import Stream, TrunkCache
from sortserve_trainer.run import cached_trunk
from sortserve_trainer.run.settings import load_train_settings
from sortserve_trainer.run.train import train
from support import training_runs
from support.tiny_models import make_tiny_checkpoint
from support.training_runs import assert_equal, spawn

EXACT = {"trunk_cache_dtype": "float32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("cache") / "base", exits=None)


def data_beside(base: Path) -> Path:
    """Rows of which one in five was generated, and goes around in circles."""
    rows: list[dict[str, Any]] = [
        {"instruction": f"Say {word} {i % 4 + 1} times.", "output": " ".join([word] * (i % 4 + 1))}
        | ({"finish_reason": "stop"} if i % 5 == 0 else {})
        for i, word in enumerate(["red", "blue", "green", "black"] * 15)
    ]
    path = base.parent / "generated.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(base: Path, output: Path, **overrides: object) -> dict[str, object]:
    """A short run of modules alone."""
    own = {"data": str(data_beside(base)), "held_out": 0.05}
    own |= {"freeze_trunk": True, "unlikelihood": 0.5}
    return training_runs.flags(base, output, **{**own, **overrides})


def run(base: Path, output: Path, **overrides: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The modules that a run ends with, and its losses on held-out rows."""
    train(load_train_settings(flags(base, output, **overrides)))
    recipe = json.loads((output / "sorted.json").read_text())["recipe"]
    return load_file(output / "exit_modules.safetensors"), recipe["held_out_loss"]


@pytest.mark.parametrize(
    ("kind", "vocab_sample"),
    [
        ("affine", 0),
        ("layer", 120),
        pytest.param("affine", 120, marks=pytest.mark.slow),
        pytest.param("layer", 0, marks=pytest.mark.slow),
    ],
)
def test_modules_trained_from_a_float32_cache_are_those_trained_beside_the_trunk(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, vocab_sample: int
) -> None:
    # All columns: then the sample is the same one, not only one that is as good.
    monkeypatch.setattr(cached_trunk, "NUM_LIKELY", 288)
    options = {"exit_modules": kind, "vocab_sample": vocab_sample, **EXACT}

    beside, beside_losses = run(base, tmp_path / "beside", **options)
    cached, cached_losses = run(base, tmp_path / "cached", trunk_cache=tmp_path / "c", **options)

    for name, tensor in beside.items():
        torch.testing.assert_close(cached[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    if not vocab_sample:
        assert_equal(cached, beside)
    assert cached_losses == pytest.approx(beside_losses, abs=2e-5)


def test_a_bfloat16_cache_gives_the_same_losses_to_two_thousandths(
    base: Path, tmp_path: Path
) -> None:
    _, beside = run(base, tmp_path / "beside")
    _, cached = run(base, tmp_path / "cached", trunk_cache=tmp_path / "c")

    assert cached == pytest.approx(beside, abs=2e-3)


def test_a_trunk_with_an_adapter_is_forgotten_and_saved_as_it_was(
    base: Path, tmp_path: Path
) -> None:
    first = {"freeze_trunk": False, "lora_rank": 4, "unlikelihood": 0.0}
    run(base, tmp_path / "first", **first)

    beside, _ = run(tmp_path / "first", tmp_path / "beside", vocab_sample=0, **EXACT)
    cached, _ = run(
        tmp_path / "first",
        tmp_path / "cached",
        vocab_sample=0,
        trunk_cache=tmp_path / "c",
        **EXACT,
    )

    assert_equal(cached, beside)
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "cached")
    )
    assert_equal(before, after)


def test_epochs_and_other_runs_find_what_is_there_and_ask_the_trunk_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.jsonl"
    rows = data_beside(base).read_text().splitlines(keepends=True)
    short.write_text("".join(rows[:16]))
    cache = {"trunk_cache": tmp_path / "c", "max_tokens": None, "data": str(short)}
    run(base, tmp_path / "first", epochs=2, **cache)
    (folder,) = (tmp_path / "c").iterdir()
    size = (folder / "full.bin").stat().st_size
    asked = []
    states = SortedModel.trunk_states

    def counted(*arguments: Any) -> Any:
        asked.append(1)
        return states(*arguments)

    monkeypatch.setattr(SortedModel, "trunk_states", counted)

    run(base, tmp_path / "second", epochs=1, seed=5, pack_length=200, **cache)

    assert (folder / "full.bin").stat().st_size == size
    num_warm_start_packs = 12
    assert len(asked) <= num_warm_start_packs


@pytest.mark.slow
def test_another_trunk_exit_or_module_has_a_cache_of_its_own(base: Path, tmp_path: Path) -> None:
    root = tmp_path / "c"
    other = make_tiny_checkpoint(tmp_path / "other", "qwen3-untied", exits=None)
    options = {"trunk_cache": root, "max_tokens": 200, "held_out": 0}

    run(base, tmp_path / "1", **options)
    run(base, tmp_path / "2", **options, exits="2,5")
    run(base, tmp_path / "3", **options, exit_modules="layer")
    run(base, tmp_path / "4", **options, **EXACT)
    run(other, tmp_path / "5", **options)
    run(base, tmp_path / "6", **options, exit_modules="mlp")  # reads what affine reads

    assert len(list(root.iterdir())) == 5


def test_a_run_whose_cache_fails_half_way_and_that_is_stopped_ends_at_the_same_modules(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, losses = run(base, tmp_path / "undisturbed", trunk_cache=tmp_path / "a")
    calls = []
    states = SortedModel.trunk_states

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return states(*arguments)

    options = {"trunk_cache": tmp_path / "b"}
    with monkeypatch.context() as patch:
        patch.setattr(SortedModel, "trunk_states", fails)
        patch.setattr(trunk_cache, "COMMIT_BYTES", 1)
        with pytest.raises(ConfigError, match=r"-cache .* cannot be written: No space left"):
            run(base, tmp_path / "out", **options)
    assert not (tmp_path / "out.run").exists()
    (index,) = (tmp_path / "b").glob("*/index.bin")
    assert index.stat().st_size

    run(base, tmp_path / "out", **options, max_steps_per_run=3)
    resumed, resumed_losses = run(base, tmp_path / "out", **options)

    assert_equal(resumed, undisturbed)
    assert resumed_losses == losses


@pytest.mark.slow
def test_a_run_with_a_cache_that_is_killed_at_any_moment_ends_at_the_same_modules(
    base: Path, tmp_path: Path
) -> None:
    options: dict[str, object] = {"save_every": 2, "max_tokens": 3000, "exit_modules": "layer"}
    undisturbed, _ = run(base, tmp_path / "undisturbed", trunk_cache=tmp_path / "a", **options)
    options["trunk_cache"] = tmp_path / "b"

    killed = tmp_path / "killed"
    assert not kill_at("b/*/index.bin", base, killed, options)
    kill_at("killed.run/states/checkpoint-*/complete", base, killed, options)
    resumed, _ = run(base, killed, **options)

    assert_equal(resumed, undisturbed)


def kill_at(pattern: str, base: Path, output: Path, options: dict[str, object]) -> bool:
    """Kill a run once a file is there; returns whether its cache was whole by then."""
    process = spawn(flags(base, output, **options))
    while not list(output.parent.glob(pattern)):
        assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return any(len(path.read_bytes()) for path in output.parent.glob("b/*/index.bin"))


def test_a_bound_too_small_refuses_the_run_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--trunk-cache-gb 1e-05: the trunk's states of"):
        run(base, tmp_path / "out", trunk_cache=tmp_path / "c", trunk_cache_gb=1e-5)

    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "flag",
    [
        {"report_to": "nobody"},
        {"batch_size": 1000},
        {"metric_for_best_model": "accuracy"},
    ],
    ids=lambda flag: next(iter(flag)),
)
def test_a_run_that_is_refused_asks_the_trunk_nothing(
    base: Path, tmp_path: Path, flag: dict[str, object]
) -> None:
    with pytest.raises(ConfigError):
        run(base, tmp_path / "out", trunk_cache=tmp_path / "cache", **flag)

    assert list(tmp_path.iterdir()) == []


def test_the_cache_says_what_it_is_of(base: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "out", trunk_cache=tmp_path / "c")

    (folder,) = (tmp_path / "c").iterdir()
    about = json.loads((folder / "about.json").read_text())
    streams = tuple(
        Stream(name, width, getattr(torch, dtype.removeprefix("torch.")), of == "tokens")
        for name, width, dtype, of in about["streams"]
    )
    TrunkCache(folder, streams).check_invariants()
    assert about["format"] == 1
