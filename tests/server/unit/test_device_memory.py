"""What a GPU's KV cache gets: arithmetic on plain values, and starts on a fake device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.checkpoint import load as checkpoint_module
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.cli import main
from sortserve.core.errors import ConfigError
from sortserve.core.plan import StepPlan
from sortserve.core.slabs import Slabs
from sortserve.engine import model_parts as parts_module
from sortserve.engine.assemble import EngineOptions, EngineParts, assemble
from sortserve.engine.peak import largest_steps, num_pages_of_largest_steps
from sortserve.engine.runner import ModelRunner
from sortserve.model.device_memory import MemoryUse, device_memory, gib
from support.tiny_models import make_tiny_checkpoint

GIB, MIB = 2**30, 2**20


def use(**values: int | float) -> MemoryUse:
    defaults = {
        "total": 80 * GIB,
        "free": 70 * GIB,
        "weights": 9 * GIB,
        "largest_step": 2 * GIB,
        "utilization": 0.9,
    }
    return MemoryUse(**{**defaults, **values})  # type: ignore[arg-type]


# ---- arithmetic


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param({}, 70 * GIB - 8 * GIB - 2 * GIB, id="all but reserve and step"),
        pytest.param({"utilization": 1.0}, 68 * GIB, id="nothing is kept free"),
        pytest.param({"free": 40 * GIB}, 30 * GIB, id="other programs take of it"),
        pytest.param({"largest_step": 0}, 62 * GIB, id="a step that takes nothing"),
        pytest.param({"free": 9 * GIB}, -1 * GIB, id="less than nothing is left"),
    ],
)
def test_the_kv_cache_gets_what_weights_and_the_largest_step_leave(
    values: dict[str, int | float], expected: int
) -> None:
    assert abs(use(**values).kv_cache - expected) <= 1


def test_the_numbers_fit_one_line() -> None:
    assert str(use()) == (
        "of 80.0 GiB on the GPU 70.0 are free beside the weights (9.0), the largest step takes 2.0 "
        "and --gpu-memory-utilization=0.9 keeps 8.0 free"
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0.0"), (GIB, "1.0"), (5 * MIB, "0.005"), (-GIB, "-1.0")]
)
def test_small_sizes_keep_their_digits(num_bytes: int, text: str) -> None:
    assert gib(num_bytes) == text


@pytest.mark.parametrize("value", [-0.1, 1.5, "a", None])
def test_a_share_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
        EngineOptions(gpu_memory_utilization=value)  # type: ignore[arg-type]


def test_a_cpu_has_no_memory_of_its_own() -> None:
    assert device_memory(torch.device("cpu")) is None


# ---- the largest steps


def tokens_of(plan: StepPlan) -> list[int]:
    return [row.num_tokens for row in plan.rows]


def steps(**limits: int) -> list[StepPlan]:
    defaults = {"max_model_len": 100, "max_num_batched_tokens": 250, "max_num_seqs": 8}
    return largest_steps(depth=6, slabs=Slabs(2), block_size=16, **{**defaults, **limits})


def test_one_step_is_of_prompts_and_one_of_tokens() -> None:
    prefill, decode = steps()

    assert tokens_of(prefill) == [100, 100, 50]
    assert tokens_of(decode) == [1] * 8
    assert {row.context_len for row in decode.rows} == {100}
    assert all(row.sampling is not None for plan in (prefill, decode) for row in plan.rows)
    assert all(row.exit_layer == 6 for plan in (prefill, decode) for row in plan.rows)


def test_no_step_is_over_a_limit() -> None:
    prefill, decode = steps(max_num_seqs=2)
    assert tokens_of(prefill) == [100, 100]
    assert tokens_of(decode) == [1, 1]

    _, decode = steps(max_num_batched_tokens=3, max_num_seqs=8)
    assert tokens_of(decode) == [1, 1, 1]


@pytest.mark.parametrize("max_model_len", [2, 17, 100, 5000])
@pytest.mark.parametrize("max_num_batched_tokens", [1, 16, 700, 3000])
def test_their_pages_are_there(max_model_len: int, max_num_batched_tokens: int) -> None:
    limits = {"max_model_len": max_model_len, "max_num_batched_tokens": max_num_batched_tokens}
    num_pages = num_pages_of_largest_steps(**limits, block_size=16)

    for plan in steps(**limits):
        for row in plan.rows:
            assert row.block_table_SB.max() < num_pages
            assert row.block_table_SB.shape == (3, -(-row.context_len // 16))


# ---- a start


@dataclass
class FakeMemory:
    """A device with so much memory, of which steps take what they are said to take."""

    total: int = 64 * MIB
    free: int = 40 * MIB
    step: int = 8 * MIB
    ran: list[str] = field(default_factory=list)

    def total_bytes(self) -> int:
        return self.total

    def free_bytes(self) -> int:
        return self.free

    def peak_of(self, run: Callable[[], object]) -> int:
        run()
        self.ran.append("largest step")
        return self.step


@pytest.fixture(name="checkpoint", scope="module")
def _checkpoint(tmp_path_factory: pytest.TempPathFactory) -> LoadedCheckpoint:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama-tied", exits=(2, 4, 6))
    return load_checkpoint(str(folder), dtype="float32", device="cpu")


def start(
    checkpoint: LoadedCheckpoint,
    memory: FakeMemory,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> EngineParts:
    monkeypatch.setattr(parts_module, "device_memory", lambda device: memory)
    return assemble(checkpoint, EngineOptions(**{"max_num_seqs": 10_000, **options}))


def test_the_pool_is_what_the_largest_step_leaves(
    checkpoint: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory()

    parts = start(checkpoint, memory, monkeypatch, max_num_batched_tokens=64, max_model_len=32)

    assert memory.ran == ["largest step"]
    left = 40 * MIB - 8 * MIB - (64 * MIB - int(0.9 * 64 * MIB))
    assert left - parts.cache.page_bytes < parts.cache.num_bytes <= left


def test_a_cache_of_a_size_that_was_asked_for_needs_no_measurement(
    checkpoint: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory()

    parts = start(checkpoint, memory, monkeypatch, kv_cache_memory=2 * MIB, max_model_len=32)

    assert memory.ran == []
    assert parts.cache.num_bytes <= 2 * MIB


def test_no_room_for_one_sequence_is_one_line_with_all_numbers(
    checkpoint: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        start(checkpoint, FakeMemory(free=14 * MIB), monkeypatch, max_num_batched_tokens=64)

    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("the KV cache does not fit: of 0.062 GiB on the GPU 0.014 are free")
    assert "the largest step takes 0.008" in message
    for flag in ("max-model-len", "max-num-batched-tokens", "gpu-memory-utilization", "quantize"):
        assert f"--{flag}" in message


def out_of_memory(*arguments: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual")


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [
        (parts_module, "Decoder", "what the backend makes of the weights did not fit the GPU"),
        (ModelRunner, "execute", "the largest step did not fit the GPU"),
        (parts_module, "ModelRunner", "the KV cache (0.0"),
    ],
)
def test_memory_that_runs_out_is_one_line_that_says_of_what(
    owner: object,
    name: str,
    message: str,
    checkpoint: LoadedCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, out_of_memory)

    with pytest.raises(ConfigError) as caught:
        start(checkpoint, FakeMemory(), monkeypatch, max_num_batched_tokens=64)

    assert str(caught.value).startswith(message)
    assert "of whose 0.062 GiB 0.039 were free. Give" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_end_the_command_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_checkpoint(tmp_path, "llama-tied")
    monkeypatch.setattr(checkpoint_module, "device_memory", lambda device: FakeMemory())
    monkeypatch.setattr(checkpoint_module, "load_weights", out_of_memory)

    code = main(["profile", str(folder), "--device", "cpu", "--dtype", "float32"])

    assert code == 2
    line = capsys.readouterr().err
    assert "the weights (0.001 GiB) did not fit the GPU, of whose 0.062 GiB 0.039" in line
    assert "--quantize int8 or nf4" in line


def test_weights_know_their_size(checkpoint: LoadedCheckpoint) -> None:
    """The head is the embedding: it counts once."""
    weights = checkpoint.weights
    layer = weights.layers[0]
    matrices = sum(m.nbytes for m in (layer.qkv, layer.o, layer.gate_up, layer.down))
    norms = layer.input_norm.nbytes + layer.post_attention_norm.nbytes
    rest = weights.embed.nbytes + weights.final_norm.nbytes + weights.inv_freq.nbytes

    assert weights.nbytes == rest + 6 * (matrices + norms)
