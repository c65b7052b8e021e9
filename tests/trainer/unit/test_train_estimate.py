"""What a run needs is known before it begins, from the shape of its base alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sortserve.checkpoint.exit_table import exit_table
from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.hf import load_hf_config
from sortserve.checkpoint.sorted_json import SortedInfo
from sortserve.cli import main
from sortserve.model.config import ModelConfig
from sortserve_trainer.model.load import load_for_training
from sortserve_trainer.run.estimate import estimate, estimate_text
from sortserve_trainer.run.settings import TrainSettings
from support.tiny_models import make_tiny_checkpoint

LLAMA_2_13B = ModelConfig(
    family="llama",
    num_layers=40,
    hidden_size=5120,
    intermediate_size=13824,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    vocab_size=32000,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
EXITS = (12, 16, 20, 24, 28, 32, 36, 40)


def settings(**flags: object) -> TrainSettings:
    return TrainSettings(
        data=("none.jsonl",),
        output="out",  # type: ignore[arg-type]
        exits=EXITS[:-1],
        device="cpu",
        **flags,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("flags", [{"method": "soft+kd"}, {"method": "soft"}], ids=["lora", "all"])
def test_parameters_are_those_of_the_model_that_is_trained(
    tmp_path: Path, flags: dict[str, str]
) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    own = settings(**flags, base=str(base), lora_rank=None).model_copy(update={"exits": (2, 4)})
    if own.trains_adapter:
        own = own.model_copy(update={"lora_rank": 4})
    loaded = load_for_training(own, own.resolved)

    found = estimate(own, loaded.config, loaded.model.exits)

    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    assert found.num_trained == trained


def test_soft_of_llama_2_13b_wants_eight_cards_of_80_gib() -> None:
    plain = settings(method="soft", gradient_checkpointing=True)

    found = estimate(plain, LLAMA_2_13B, EXITS)

    assert found.num_parameters == pytest.approx(13.0e9, rel=0.01)
    assert found.num_trained == found.num_parameters
    # Sixteen bytes a parameter: 194 GiB, more than four cards hold.
    assert found.bytes_per_card(4) > 48 * 2**30
    assert found.bytes_per_card(8) < 70 * 2**30
    # 8 N a token with recomputation, and six for each exit's head.
    assert found.flops_per_token == pytest.approx(8 * 12.7e9 + 6 * 8 * 164e6, rel=0.02)


def test_less_is_trained_for_less_and_recomputation_trades_time_for_memory() -> None:
    whole = estimate(settings(method="soft"), LLAMA_2_13B, EXITS)
    lora = estimate(settings(method="soft", lora_rank=16), LLAMA_2_13B, EXITS)
    recomputed = estimate(
        settings(method="soft", lora_rank=16, gradient_checkpointing=True), LLAMA_2_13B, EXITS
    )

    assert lora.weight_bytes < whole.weight_bytes / 5
    assert lora.flops_per_token < whole.flops_per_token
    assert recomputed.activation_bytes < lora.activation_bytes / 3
    assert recomputed.flops_per_token > lora.flops_per_token
    assert lora.tokens_per_s(1e15, 2) == pytest.approx(2 * lora.tokens_per_s(1e15, 1))


def test_lora_layers_keep_their_merged_weights_for_the_backward_pass() -> None:
    """Whole on each card, though FSDP shares out the base: as much as that has in all."""
    lora = {"method": "soft", "lora_rank": 16}
    merged, plain, recomputed, some = (
        estimate(settings(**lora, **more), LLAMA_2_13B, EXITS).activation_bytes
        for more in (
            {},
            {"lora_dropout": 0.1},  # peft's own layers
            {"gradient_checkpointing": True},
            {"lora_targets": ("q_proj", "v_proj")},
        )
    )
    all_weights = estimate(
        settings(method="soft", gradient_checkpointing=True), LLAMA_2_13B, EXITS
    ).activation_bytes

    assert merged - plain == 2 * 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    assert recomputed - all_weights == (merged - plain) / 40
    assert some - plain == 2 * 40 * 2 * 5120**2


def test_an_exit_costs_its_share_of_the_layers_and_the_head() -> None:
    found = estimate(settings(method="soft"), replace(LLAMA_2_13B, vocab_size=1), EXITS)

    assert found.exit_costs[20] == pytest.approx(0.5, abs=0.001)
    assert found.exit_costs[40] == 1.0
    assert "20: 50%" in estimate_text(found, EXITS)


def test_an_exit_costs_what_its_own_kind_of_module_costs() -> None:
    found = estimate(settings(exit_modules="20=layer,24=none"), LLAMA_2_13B, EXITS)
    plain = estimate(settings(exit_modules="none"), LLAMA_2_13B, EXITS)

    layer = plain.exit_costs[24] - plain.exit_costs[20]
    assert found.exit_costs[20] - plain.exit_costs[20] == pytest.approx(layer / 4, rel=0.1)
    assert 0 < found.exit_costs[28] - plain.exit_costs[28] < layer / 16  # affine, the default


def test_costs_of_exits_are_those_that_the_server_will_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that go deeper leave keys and values in the layers of the exits that they pass."""
    kinds = {1: "layer", 2: "layer", 3: "affine", 4: "head", 5: "mlp"}
    folder = make_tiny_checkpoint(tmp_path / "sorted", exits=(1, 2, 3, 4, 5, 6), exit_kinds=kinds)
    arguments = ["train", "--dry-run", "--base", str(folder), "--data", "none.jsonl"]
    assert main([*arguments, "--exits", "1,2,3,4,5", "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out

    config = read_model_config(load_hf_config(folder))
    table = exit_table(config, SortedInfo.read(folder), (1, 2, 3, 4, 5, 6))

    for info in table.exits:
        assert f"{info.exit_layer}: {info.compute:.0%}" in told


def test_a_dry_run_needs_a_config_alone_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    for path in base.iterdir():
        if path.suffix == ".safetensors" or path.name.startswith("tokenizer"):
            path.unlink()
    arguments = ["train", "--dry-run", "--base", str(base), "--data", "nowhere.jsonl"]
    arguments += ["--exits", "2,4", "--lora-rank", "4", "--output", str(tmp_path / "out")]

    assert main(arguments) == 0

    text = capsys.readouterr().out
    assert "trained" in text
    assert "tokens/s (H100)" in text
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_dry_run_over_a_sorted_base_counts_the_adapter_and_modules_that_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "Say it.", "output": "it"}\n' * 9)
    common = ["train", "--data", str(data), "--exits", "2,4", "--held-out", "0"]
    common += ["--report-to", "none", "--pack-length", "96", "--max-length", "96"]
    made = [*common, "--base", str(base), "--output", str(tmp_path / "first")]
    made += ["--lora-rank", "3", "--exit-modules", "2=layer"]
    assert main(made) == 0

    further = [*common, "--base", str(tmp_path / "first"), "--output", str(tmp_path / "out")]
    assert main([*further, "--dry-run"]) == 0
    alike = [*common, "--base", str(base), "--output", str(tmp_path / "out"), "--lora-rank", "3"]
    told = capsys.readouterr().out
    assert main([*alike, "--exit-modules", "2=layer", "--dry-run"]) == 0

    assert told == capsys.readouterr().out
    assert main([*further, "--lora-rank", "2", "--exit-modules", "4=mlp", "--dry-run"]) == 0
    assert told != capsys.readouterr().out
