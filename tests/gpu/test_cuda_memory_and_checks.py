"""On a CUDA device: backends pass their check, the pool fits, int8 weights, the offline engine.

Needs none of the HTTP server's libraries.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.errors import ConfigError
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.assemble import EngineOptions, assemble
from sortserve.engine.backend_check import largest_difference
from sortserve.engine.backend_choice import choose_checked_backend
from sortserve.llm.llm import LLM
from sortserve.model.backend import Target, Unusable
from sortserve.model.backends import BACKENDS, REFERENCE, choose_backend
from sortserve.model.device_memory import device_memory
from sortserve.model.quantization import multiply_weight_only, quantize_int8
from support.tiny_models import make_tiny_checkpoint
from support.wrong_backends import WRONG

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

FAMILIES = ("llama-tied", "llama-head-dim-24", "llama-mqa", "qwen3-untied")
DTYPES = ("float32", "bfloat16", "float16")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_checkpoint(
        folder, "llama-tied", exits=(2, 4, 6), exit_kinds={2: "mlp", 4: "layer"}
    )


def load(folder: Path, dtype: str = "float32", **options: Any) -> LoadedCheckpoint:
    return load_checkpoint(str(folder), dtype=dtype, device="cuda", **options)


@pytest.mark.parametrize("block_size", [8, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_that_works_here_is_right(
    family: str, dtype: str, block_size: int, tmp_path: Path
) -> None:
    make_tiny_checkpoint(tmp_path, family, exits=(2, 4, 6), exit_kinds={2: "mlp", 4: "affine"})
    checkpoint = load(tmp_path, dtype)
    config, weights = checkpoint.config, checkpoint.weights
    target = Target(config, weights.dtype, weights.device)
    reference = choose_backend(config, weights.dtype, weights.device, REFERENCE)

    found = {
        name: largest_difference(backend, reference, config, weights, block_size=block_size)
        for name, make in BACKENDS.items()
        if not isinstance(backend := make(target), Unusable)
    }

    assert {name: str(each) for name, each in found.items() if not each.is_tolerable} == {}


def test_a_backend_that_is_wrong_here_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(BACKENDS, "wrong", WRONG["norm"])
    checkpoint = load(folder)

    choice = choose_checked_backend(checkpoint.config, checkpoint.weights, block_size=16)

    assert choice.failed == ("wrong",)
    assert any(record.levelno == logging.WARNING for record in caplog.records)


def test_the_pool_leaves_what_it_should(folder: Path) -> None:
    """Sequences are so many that memory is the limit; a small part of it."""
    memory = device_memory(torch.device("cuda"))
    assert memory is not None
    in_use = 1 - memory.free_bytes() / memory.total_bytes()
    options = EngineOptions(
        max_num_seqs=1_000_000,
        max_num_batched_tokens=256,
        gpu_memory_utilization=in_use + 0.02,
        enforce_eager=True,  # recorded graphs take of what is kept free
    )

    parts = assemble(load(folder), options)

    used = 1 - memory.free_bytes() / memory.total_bytes()
    assert in_use + 0.015 < used <= in_use + 0.021  # what the allocator rounds up
    assert parts.cache.num_pages > 0


def test_no_room_is_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the KV cache does not fit: of .* GiB on the GPU"):
        assemble(load(folder), EngineOptions(gpu_memory_utilization=1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_weights_are_multiplied_as_on_a_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(96, 160, generator=generator)
    x = torch.randn(7, 160, generator=generator).to(dtype)

    there = multiply_weight_only(x.cuda(), quantize_int8(matrix.cuda()), None).cpu()

    here = multiply_weight_only(x.float(), quantize_int8(matrix), None)
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (there.float() - here).norm() < limit * here.norm()


def test_int8_is_served(folder: Path) -> None:
    with LLM(folder, device="cuda", dtype="bfloat16", quantize="int8", max_model_len=64) as llm:
        (result,) = llm.generate([40, 41, 42], GREEDY)

    assert len(result.outputs[0].token_ids) == 12


def test_an_offline_engine_answers_as_on_a_cpu(folder: Path) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        with LLM(folder, device=device, dtype="float32", max_model_len=64) as llm:
            results = llm.generate([[40, 41, 42], [50] * 20], GREEDY)
            answers.append([result.outputs[0].token_ids for result in results])

    assert answers[0] == answers[1]
