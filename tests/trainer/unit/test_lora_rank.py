"""A smaller rank for an adapter that is trained further: the nearest one, saved and served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sortserve.cli import main
from sortserve_trainer.model.adapter import shrink_pair
from support.tiny_models import make_tiny_checkpoint

ROWS = [{"instruction": f"Say {n}.", "output": f"I say {n} and {n + 1}."} for n in range(30)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def train(base: Path, data: Path, output: Path, *more: str) -> int:
    flags = f"train --base {base} --data {data} --output {output} --exits 2,4 --dtype float32"
    limits = "--pack-length 128 --max-length 128 --max-tokens 400 --held-out 0 --report-to none"
    return main([*flags.split(), *limits.split(), *more])


def sorted_checkpoint(tmp_path: Path, data: Path, rank: int) -> Path:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    output = tmp_path / "first"
    # An alpha that is not the rank: the scale must survive.
    assert train(base, data, output, "--lora-rank", f"{rank}", "--lora-alpha", f"{3 * rank}") == 0
    return output


def changes(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight."""
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    state = load_file(checkpoint / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    names = [name.removesuffix(".lora_A.weight") for name in state if "lora_A" in name]
    return {
        name: scale * state[name + ".lora_B.weight"] @ state[name + ".lora_A.weight"]
        for name in names
    }


def refusal(
    base: Path, data: Path, output: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """The last line of a run that is refused."""
    capsys.readouterr()
    assert train(base, data, output, *flags) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (6, 40), (40, 6)])
def test_the_pair_of_a_smaller_rank_is_the_nearest_there_is(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(8, columns), torch.randn(rows, 8)

    new_a, new_b = shrink_pair(a, b, 5)

    assert new_a.shape == (5, columns)
    assert new_b.shape == (rows, 5)
    lost = torch.linalg.matrix_norm(new_b @ new_a - b @ a)
    left_out = torch.linalg.svdvals(b @ a)[5:]
    torch.testing.assert_close(lost, left_out.norm(), rtol=1e-4, atol=1e-4)


def test_a_pair_keeps_its_product_where_the_weight_has_no_higher_rank() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(8, 40), torch.randn(3, 8)

    new_a, new_b = shrink_pair(a, b, 5)

    assert new_b.shape == (3, 5)
    torch.testing.assert_close(new_b @ new_a, b @ a)


def test_a_smaller_rank_starts_from_the_nearest_adapter_and_is_what_is_saved(
    data: Path, tmp_path: Path
) -> None:
    first = sorted_checkpoint(tmp_path, data, 6)
    nearly_still = ("--lora-rank", "4", "--learning-rate", "1e-9")

    assert train(first, data, tmp_path / "out", *nearly_still) == 0

    before, after = changes(first), changes(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    for name, whole in before.items():
        u, values, vt = torch.linalg.svd(whole, full_matrices=False)
        nearest = u[:, :4] * values[:4] @ vt[:4]
        torch.testing.assert_close(after[name], nearest, rtol=1e-3, atol=1e-6)


def test_a_run_with_a_smaller_rank_goes_on_where_it_was_stopped(data: Path, tmp_path: Path) -> None:
    first = sorted_checkpoint(tmp_path, data, 6)
    assert train(first, data, tmp_path / "whole", "--lora-rank", "4") == 0
    assert train(first, data, tmp_path / "cut", "--lora-rank", "4", "--max-steps-per-run", "1") == 0

    assert train(first, data, tmp_path / "cut", "--lora-rank", "4") == 0

    whole, resumed = changes(tmp_path / "whole"), changes(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--lora-rank", "7"], "and goes on: leave the flag out, or name a smaller one"),
        (["--lora-rank", "4", "--freeze-trunk"], "stays what it is with --freeze-trunk"),
    ],
)
def test_a_rank_that_the_adapter_cannot_have_is_refused(
    flags: list[str], reason: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted_checkpoint(tmp_path, data, 6)

    line = refusal(first, data, tmp_path / "out", flags, capsys)

    assert f"{flags[0]} {flags[1]} does not fit" in line
    assert reason in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--lora-alpha", "6"], "made with 18 and goes on so"),
        (["--lora-dropout", "0.5"], "made with 0 and goes on so"),
        (["--lora-targets", "q_proj,v_proj"], "made with down_proj,gate_proj,k_proj,o_proj,"),
    ],
)
def test_flags_that_an_adapter_does_not_take_up_are_refused(
    flags: list[str], reason: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted_checkpoint(tmp_path, data, 6)

    line = refusal(first, data, tmp_path / "out", flags, capsys)

    assert f"{flags[0]} does not fit" in line
    assert reason in line
    assert train(first, data, tmp_path / "out", "--lora-alpha", "18") == 0
