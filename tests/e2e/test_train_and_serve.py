"""From data in the repository to a sorted checkpoint that is measured and served, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sortserve import LLM, Budget, SamplingParams
from sortserve.checkpoint.sorted_json import SortedInfo
from sortserve.cli import main
from sortserve_trainer.model.load import load_for_evaluation
from support.tiny_models import make_tiny_checkpoint

DEMO = Path(__file__).parents[2] / "examples" / "data"
EXITS = (2, 4, 6)


def losses(folder: Path, *more: str) -> dict[int, float]:
    """Held-out loss per exit, by ``sortserve eval``."""
    output = folder.parent / f"{folder.name}-report"
    arguments = ["eval", str(folder), "--data", str(DEMO / "demo-dev.jsonl"), "--no-base"]
    assert main([*arguments, "--dtype", "float32", "--output", str(output), *more]) == 0
    report = json.loads((output / "report.json").read_text())
    return {at["exit_layer"]: at["metrics"]["loss"] for at in report["exits"]}


def train(base: Path, output: Path, *more: str) -> None:
    arguments = f"--base {base} --output {output} --data {DEMO / 'demo.jsonl'} --exits 2,4"
    quick = "--max-tokens 60000 --pack-length 512 --max-length 256 --dtype float32"
    quiet = "--held-out 0 --report-to none --save-every 1000"
    assert main(["train", *f"{arguments} {quick} {quiet}".split(), *more]) == 0


def test_a_trained_checkpoint_is_better_at_every_exit_and_serves_them_all(tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    trained = tmp_path / "trained"
    before = losses(base, "--exits", "2,4")

    train(base, trained, "--lora-rank", "0", "--learning-rate", "3e-3")

    after = losses(trained)
    assert set(after) == set(EXITS)
    for exit_layer in EXITS:
        assert after[exit_layer] < 0.5 * before[exit_layer]
    info = SortedInfo.read(trained)
    assert info is not None
    scores = [info.quality[exit_layer]["score"] for exit_layer in EXITS]
    assert scores[-1] == 1.0
    assert all(0 < score <= 1 for score in scores)

    hello = [{"role": "user", "content": "Hello"}]
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    with LLM(trained, dtype="float32", max_model_len=128) as llm:
        for exit_layer in EXITS:
            (result,) = llm.chat(hello, greedy, budget=Budget(exit_layer=exit_layer))
            assert result.outputs[0].tokens_by_exit.keys() == {exit_layer}


def test_heads_trained_over_frozen_blocks_improve_the_exits_and_leave_the_full_depth(
    tmp_path: Path,
) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    sft, ict = tmp_path / "sft", tmp_path / "ict"
    same = ("--learning-rate", "2e-3", "--max-tokens", "20000")

    train(base, sft, "--method", "sft", *same)
    train(base, ict, "--method", "sft+ict", *same)

    alone, with_heads = losses(sft, "--exits", "2,4"), losses(ict)
    assert with_heads[6] == pytest.approx(alone[6], abs=1e-5)
    assert with_heads[2] < alone[2] - 0.5
    assert with_heads[4] < alone[4] - 0.5
    info = SortedInfo.read(ict)
    assert info is not None
    assert info.exit_modules == {2: "head", 4: "head"}
    assert_served_as_evaluated(ict)


def assert_served_as_evaluated(folder: Path) -> None:
    """At every exit the server's log-probabilities are those that ``sortserve eval`` sums."""
    prompt = list(range(30, 60))
    model = load_for_evaluation(str(folder), dtype="float32", device="cpu").model
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    with LLM(folder, dtype="float32", max_model_len=128) as llm:
        for exit_layer in EXITS:
            (result,) = llm.generate([prompt], greedy, budget=Budget(exit_layer=exit_layer))
            served = result.outputs[0].logprobs
            assert served is not None
            ids = [*prompt, *result.outputs[0].token_ids]
            states = model.exit_states(
                torch.tensor([ids]), torch.arange(len(ids))[None], [len(ids)], (exit_layer,)
            )
            logits_TV = states[exit_layer] @ model.head(exit_layer).T
            expected_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
            assert [token.token_id for token in served] == expected_TV.argmax(-1).tolist()
            best = expected_TV.max(-1).values.tolist()
            assert [token.logprob for token in served] == pytest.approx(best, abs=1e-4)


def test_qlora_trains_an_adapter_over_a_base_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = make_tiny_checkpoint(
        tmp_path / "base", exits=None, hidden_size=128, intermediate_size=256, head_dim=32
    )
    before = losses(base, "--exits", "2,4")

    train(
        base,
        tmp_path / "qlora",
        *("--quantize", "nf4", "--lora-rank", "8", "--learning-rate", "5e-3"),
        *("--max-tokens", "20000"),
    )

    after = losses(tmp_path / "qlora")
    for exit_layer in EXITS:
        assert after[exit_layer] < before[exit_layer] - 1.0
