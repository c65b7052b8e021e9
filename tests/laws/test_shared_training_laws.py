"""Laws of runs that several processes share: they learn what one process learns (fp32, gloo)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sortserve.checkpoint.sorted_json import SortedInfo
from support.tiny_models import make_tiny_checkpoint
from support.training_runs import assert_close, assert_equal, run, run_two

FSDP_ON_A_CPU = """
import accelerate.state
from accelerate.utils import DistributedType

init = accelerate.state.AcceleratorState.__init__

def init_as_on_accelerators(self, *given, **named):
    if not accelerate.state.AcceleratorState._shared_state:
        accelerate.state.PartialState(cpu=True)
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    init(self, *given, **named)

accelerate.state.AcceleratorState.__init__ = init_as_on_accelerators

import torch.distributed.fsdp
fully_shard = torch.distributed.fsdp.fully_shard

def fully_shard_and_tell(module, **named):
    print("sharded", type(module).__name__, flush=True)
    return fully_shard(module, **named)

torch.distributed.fsdp.fully_shard = fully_shard_and_tell

"""
"""accelerate offers FSDP to accelerators alone: it is told that each of these processes has one."""
MERGED_AT_ONCE = """
from sortserve_trainer.model import lora
lora.weight_budget = lambda _: 1 << 30

"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
"""As `accelerate launch --use_fsdp --fsdp_version 2` sets them."""
IN_PIECES = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
"""Each process keeps its own share of a state: what FSDP 2 does unless it is told otherwise."""
SAME_BATCH: dict[str, Any] = {"vocab_sample": 0}
"""Columns are drawn by batch, and one process has other batches than two."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("training") / "base", exits=None)


@pytest.mark.parametrize("method", ["soft+kd", pytest.param("soft", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_learns_from_the_same_global_batch(
    base: Path, tmp_path: Path, method: str
) -> None:
    one = run(base, tmp_path / "one", batch_size=2, method=method, **SAME_BATCH)
    two = run_two(base, tmp_path / "two", batch_size=1, method=method, **SAME_BATCH)

    assert_close(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "sft"}, {"exits_per_step": 1}], ids=str)
def test_so_they_do_where_steps_leave_exit_modules_out(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    first = tmp_path / "first"
    run(base, first)
    one = run(first, tmp_path / "one", batch_size=2, **options, **SAME_BATCH)
    two = run_two(first, tmp_path / "two", batch_size=1, **options, **SAME_BATCH)

    assert_close(one, two)


@pytest.mark.parametrize(
    ("method", "lora_rank"), [("soft", 0), pytest.param("soft+kd", 4, marks=pytest.mark.slow)]
)
def test_so_they_do_where_each_holds_a_share_of_the_weights(
    base: Path, tmp_path: Path, method: str, lora_rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"method": method, "lora_rank": lora_rank, **SAME_BATCH}
    one = run(base, tmp_path / "one", batch_size=2, **options)
    sharded: dict[str, Any] = {"before": FSDP_ON_A_CPU, "environment": FSDP}
    two = run_two(base, tmp_path / "two", batch_size=1, **sharded, **options)

    assert_close(one, two)
    told = re.findall("sharded (\\w+)", capfd.readouterr().out)
    assert sorted(told) == sorted(2 * (6 * ["LlamaDecoderLayer"] + ["SortedModel"]))


def held_out_loss(checkpoint: Path) -> dict[str, float]:
    info = SortedInfo.read(checkpoint)
    assert info is not None
    found: dict[str, float] = info.recipe["held_out_loss"]
    return found


def test_processes_that_share_weights_evaluate_packs_that_they_cannot_share_evenly(
    base: Path, tmp_path: Path
) -> None:
    """One that had a pass less would leave the other waiting for its weights.

    A GPU would merge an adapter at once; the first evaluation has it whole, and no step has.
    """
    options: dict[str, Any] = {"lora_rank": 4, "held_out": 0.1, "eval_every": 2, **SAME_BATCH}
    one = run(base, tmp_path / "one", batch_size=2, **options)
    sharded: dict[str, Any] = {"before": FSDP_ON_A_CPU + MERGED_AT_ONCE, "environment": FSDP}
    two = run_two(base, tmp_path / "two", batch_size=1, **sharded, **options)

    assert_close(one, two)
    assert held_out_loss(tmp_path / "one") == pytest.approx(held_out_loss(tmp_path / "two"), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("states", [{}, IN_PIECES], ids=["whole states", "states in pieces"])
def test_a_sharded_run_that_is_stopped_and_goes_on_ends_at_the_same_weights(
    base: Path, tmp_path: Path, states: dict[str, str]
) -> None:
    options: dict[str, Any] = {
        **{"method": "soft", "lora_rank": 0, "batch_size": 1},
        **{"before": FSDP_ON_A_CPU, "environment": {**FSDP, **states}},
        **SAME_BATCH,
    }
    whole = run_two(base, tmp_path / "whole", **options)

    run_two(base, tmp_path / "parts", max_steps_per_run=2, **options)
    assert_equal(run_two(base, tmp_path / "parts", **options), whole)


@pytest.mark.slow
def test_a_shared_run_with_a_mean_over_a_shrunk_adapter_goes_on_to_the_same_weights(
    base: Path, tmp_path: Path
) -> None:
    """What a run keeps beside its weights (the mean, evaluations) is in its states, too."""
    first = tmp_path / "first"
    run(base, first, lora_rank=6, exit_modules="2=layer")
    options: dict[str, Any] = {
        **{"lora_rank": 3, "average": 0.6, "load_best_model_at_end": True},
        **{"held_out": 0.1, "eval_every": 2, "batch_size": 1},
        **SAME_BATCH,
    }
    whole = run_two(first, tmp_path / "whole", **options)

    run_two(first, tmp_path / "parts", max_steps_per_run=2, **options)
    run_two(first, tmp_path / "parts", max_steps_per_run=2, **options)
    assert_equal(run_two(first, tmp_path / "parts", **options), whole)
