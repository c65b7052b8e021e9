"""How much memory the KV cache takes, and the engine that settings become."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from sortserve.cli import main
from sortserve.core.errors import ConfigError
from sortserve.cost.cache import read_samples, write_samples
from sortserve.cost.model import RowShape, StepShape
from sortserve.engine import threads
from sortserve.engine.assemble import start_threads
from sortserve.engine.cores import allowed_cpus
from sortserve.engine.memory import available_memory_bytes, num_kv_pages
from sortserve.process.build import build
from sortserve.process.config import load_settings
from support.tiny_models import NUM_LAYERS, make_tiny_checkpoint


def test_pages_fill_the_memory() -> None:
    num_pages = num_kv_pages(memory_bytes=1050, page_bytes=10, pages_per_seq=20, max_num_seqs=1000)

    assert num_pages == 105


def test_no_more_pages_are_made_than_could_ever_be_used() -> None:
    num_pages = num_kv_pages(memory_bytes=10**9, page_bytes=10, pages_per_seq=20, max_num_seqs=3)

    assert num_pages == 60


def test_memory_for_less_than_one_full_sequence_is_refused_with_the_size_it_needs() -> None:
    with pytest.raises(ConfigError, match="give --kv-cache-memory=20MiB or more") as caught:
        num_kv_pages(memory_bytes=19 << 20, page_bytes=1 << 20, pages_per_seq=20, max_num_seqs=3)

    assert caught.value.param == "kv-cache-memory"


def test_the_machine_has_some_memory_but_not_all_of_the_world() -> None:
    assert 2**20 < available_memory_bytes(torch.device("cpu")) < 2**50


def test_settings_reach_the_parts_they_are_for(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 4, 6))
    flags = {"block_size": 8, "max_model_len": 64, "max_num_seqs": 3, "calibrate": False}

    serving = build(load_settings({"model": str(checkpoint), "served_model_name": "tiny", **flags}))

    assert serving.worker.exits.layers == (2, 4, NUM_LAYERS)
    assert serving.worker.max_model_len == 64
    assert serving.cache.slab_size == 2
    assert serving.cache.num_pages == 3 * (64 // 8) * (NUM_LAYERS // 2)
    text = serving.metrics.render()[0].decode()
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    (info,) = (s for s in samples if s.name == "sortserve_cache_config_info")
    assert info.labels["model_name"] == "tiny"
    # Gateways multiply the two: the tokens that fit, all at full depth.
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"]) == ("8", str(3 * (64 // 8)))


def test_a_calibrated_server_can_estimate_and_the_next_start_takes_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("sortserve.cost.calibration.MAX_MEDIAN_ERROR", math.inf)  # a busy machine
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 6))

    small = {"max_model_len": 64, "max_num_seqs": 4, "backend": "reference"}
    settings = load_settings({"model": str(checkpoint), **small})
    for start in ("first", "second"):
        serving = build(settings)
        serving.worker.start(serving.prepare)
        estimate = serving.worker.estimate(2, 8, 8)
        serving.worker.stop()

        assert estimate is not None, start
        assert estimate.e2e_s > 0
        assert len(list((tmp_path / "cache" / "calibration").iterdir())) == 1


Step = tuple[StepShape, float]


def steps(*num_tokens: int, seconds: Callable[[StepShape], float]) -> list[Step]:
    """Steps of two depths and so many tokens, as if they had been timed."""
    shapes = [
        StepShape.of([RowShape(layers, n, n, samples=True)])
        for layers in (2, 6)
        for n in num_tokens
    ]
    return [(shape, seconds(shape)) for shape in shapes]


def steady(shape: StepShape) -> float:
    return 1e-3 + 1e-4 * shape.num_layers + 1e-5 * shape.layer_tokens


def wild(shape: StepShape) -> float:
    return 0.001 if shape.num_tokens % 2 else 1.0


@pytest.mark.parametrize(
    ("found", "num_attempts", "is_kept"),
    [
        (steps(1, 8, 64, 128, seconds=steady), 1, True),
        (steps(1, 8, seconds=steady), 2, False),
        (steps(64, 128, seconds=steady), 2, False),
        (steps(1, 2, 3, 4, 63, 64, 65, 66, seconds=wild), 2, False),
    ],
    ids=["good", "no large step", "no small step", "noise"],
)
def test_a_calibration_that_cannot_be_believed_is_made_again_and_never_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    found: list[Step],
    num_attempts: int,
    is_kept: bool,
) -> None:
    attempts = []

    def timed(*args: Any, **kwargs: Any) -> list[Step]:
        attempts.append(1)
        return found

    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("sortserve.engine.calibrator.calibrate", timed)
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 6))
    small = {"max_num_seqs": 4, "backend": "reference"}
    serving = build(load_settings({"model": str(checkpoint), **small}))

    serving.worker.start(serving.prepare)
    estimate = serving.worker.estimate(6, 100, 8)
    serving.worker.stop()

    assert len(attempts) == num_attempts
    assert len(list(tmp_path.glob("cache/calibration/*.json"))) == is_kept
    assert ("predicted with caution" in caplog.text) is not is_kept
    assert estimate is not None
    assert estimate.ttft_s > 0


def test_a_kept_calibration_that_lacks_a_regime_is_not_used_but_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    good, bad = (steps(*n, seconds=steady) for n in ((1, 8, 64, 128), (1, 8)))
    monkeypatch.setattr("sortserve.engine.calibrator.calibrate", lambda *args, **kwargs: good)
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 6))
    small = {"max_num_seqs": 4, "backend": "reference"}
    serving = build(load_settings({"model": str(checkpoint), **small}))
    serving.measure()
    (kept,) = tmp_path.glob("cache/calibration/*.json")
    write_samples(kept, bad, {})

    serving.worker.start(serving.prepare)
    serving.worker.stop()

    assert read_samples(kept) == good


def test_a_context_longer_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(6,))

    with pytest.raises(ConfigError, match=r"--max-model-len=257 is more than .*at most 256"):
        build(load_settings({"model": str(checkpoint), "max_model_len": 257}))


# Values that no machine has, or only just.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama-tied", exits=(2, 4, 6))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"kv_cache_memory": "1PiB", "max_num_seqs": 2**31 - 1}, "but there are only"),
        ({"kv_cache_memory": "1"}, "--kv-cache-memory"),
        ({"block_size": 2**31 - 1}, "--kv-cache-memory"),
        ({"max_model_len": 2**31 - 1}, "--max-model-len=2147483647 is more"),
        ({"exits": "99"}, "must lie in 1..6"),
        ({"exits": "4,2"}, "must ascend"),
        ({"backend": "x"}, "--backend='x' is not one of auto, reference, triton, flashinfer, cpu."),
        ({"backend": ""}, "--backend='' is not one of auto, reference, triton, flashinfer, cpu."),
        ({"quantize": "x"}, "--quantize='x' is not one of none"),
        ({"default_budget": '{"exit_layer": 3}'}, "budget.exit_layer=3 is not an exit"),
        ({"default_budget": '{"min_exit_layer": 9}'}, "--default-budget="),
        ({"quantize": ""}, "--quantize='' is not one of none"),
    ],
)
def test_what_does_not_fit_the_machine_or_the_checkpoint_is_said_before_it_is_taken(
    tiny: Path, flags: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]

    assert main(["serve", str(tiny), "--port=0", "--log-level=error", *arguments]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    "flags",
    [
        {"max_model_len": 2, "block_size": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 2**31 - 1, "max_num_queued_tokens": 1},
        {"block_size": 7, "seed": -(2**63), "overload_delay": 0},
        {"block_size": 100_000},
        {"kv_cache_memory": "1PiB"},
    ],
)
def test_extreme_settings_that_fit_are_served_with(tiny: Path, flags: dict[str, Any]) -> None:
    serving = build(load_settings({"model": str(tiny), "calibrate": False, **flags}))

    assert serving.cache.num_pages >= 1
    assert serving.cache.num_bytes < 8 << 30


@pytest.fixture(name="threads")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_no_more_threads_are_started_than_there_are_cores(
    caplog: pytest.LogCaptureFixture,
) -> None:
    start_threads(1024)

    assert torch.get_num_threads() == len(allowed_cpus())
    assert "--num-threads=1024" in caplog.text

    start_threads(1)

    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("threads")
def test_unless_told_no_more_threads_are_started_than_can_run_at_full_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(6)
    for usable, expected in [(8, 6), (4, 4), (1, 1)]:
        monkeypatch.setattr(threads, "num_usable_cores", lambda usable=usable: usable)
        start_threads(None)
        assert torch.get_num_threads() == expected


def test_what_every_auto_became_is_known(tiny: Path) -> None:
    serving = build(load_settings({"model": str(tiny), "calibrate": False, "num_threads": 1}))

    auto = {"dtype", "quantization", "backend", "isa", "threads"}
    assert set(serving.computed_in) == {*auto, "failed_backends"}
    assert serving.computed_in["failed_backends"] == "none"
    assert serving.computed_in["threads"] == "1"
    assert serving.computed_in["backend"] in {"cpu", "reference"}
    is_native = serving.computed_in["backend"] == "cpu"
    assert (serving.computed_in["isa"] != "none") == is_native
