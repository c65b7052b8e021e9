"""Tensor parallelism over NCCL: the calls on one device, the tokens on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sortserve import LLM, Budget, SamplingParams
from sortserve.core.errors import ConfigError
from sortserve.engine.tensor_parallel.collectives import Group
from support.tiny_models import make_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

EXITS = (2, 4, 5, 6)
KINDS = {2: "layer", 4: "affine", 5: "mlp"}
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cuda", "kv_cache_memory": 8 << 20}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nccl_sums_and_gathers(dtype: torch.dtype, tmp_path: Path) -> None:
    group = Group(0, 1, torch.device("cuda", 0))
    group.meet(tmp_path)
    x = torch.arange(6, device="cuda", dtype=dtype).view(2, 3)

    with group.step():
        total = group.sum(x.clone())
        parts = group.gather(x.t())

    assert torch.equal(total, x)
    assert parts is not None
    assert [part.tolist() for part in parts] == [x.t().tolist()]
    assert group.num_calls == 2
    group.abort()


@pytest.mark.parametrize("variant", ["llama-untied", "qwen2-tied", "qwen3-tied"])
def test_two_devices_answer_as_one(variant: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device only")
    model = make_tiny_checkpoint(tmp_path / "m", variant, EXITS, KINDS)
    budgets = [Budget(exit_layer=exit_layer) for exit_layer in EXITS]
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    tokens = []
    for num_ranks in (1, 2):
        with LLM(str(model), tensor_parallel_size=num_ranks, **SETTINGS) as llm:
            results = llm.generate(["The sea is"] * len(EXITS), sampling, budget=budgets)
            tokens.append([result.outputs[0].token_ids for result in results])

    assert tokens[0] == tokens[1]


def test_more_ranks_than_devices_are_refused(tmp_path: Path) -> None:
    num_ranks = 4  # of four heads
    if torch.cuda.device_count() >= num_ranks:
        pytest.skip("there are as many devices")
    model = make_tiny_checkpoint(tmp_path / "m", "llama-tied")

    with pytest.raises(ConfigError, match="needs a CUDA device of its own"):
        LLM(str(model), tensor_parallel_size=num_ranks, **SETTINGS)
