"""``sortserve export``: what is in the folder, and what is refused (law 11 is in tests/laws)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sortserve.cli import main
from sortserve_trainer.run.export import export_submodel
from support.tiny_models import hf_logits, load_hf, make_tiny_checkpoint, read_exit_module

EXITS = (1, 2, 3, 6)
KINDS = {1: "norm", 2: "mlp", 3: "affine"}
IDS = list(range(40, 60))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "tiny", exits=EXITS, exit_kinds=KINDS)


def run(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake is answered with."""
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("sortserve: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("sortserve: error: ").rstrip("\n")


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / name).read_text())
    return document


# what is in the folder


def test_the_folder_has_all_that_other_programs_look_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "LICENSE").write_text("Apache License")
    out = tmp_path / "out"

    assert run(model, "--exit", 1, "--output", out) == 0

    assert capsys.readouterr().out.startswith(f"{out}/: exit 1 of {model}, ")
    assert {path.name for path in out.iterdir()} == {
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "exit 1 of 6" in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny"]


def test_the_config_is_that_of_a_shallower_model(model: Path, tmp_path: Path) -> None:
    before = read(model)

    config = read(export_submodel(str(model), 1, tmp_path / "out"))

    assert config["num_hidden_layers"] == 1
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    for name in ("hidden_size", "rope_parameters", "vocab_size", "tie_word_embeddings"):
        assert config[name] == before[name]


def test_an_mlp_module_is_one_more_layer_whose_attention_adds_nothing(
    model: Path, tmp_path: Path
) -> None:
    out = export_submodel(str(model), 2, tmp_path / "out")

    tensors, module = load_file(out / "model.safetensors"), read_exit_module(model, 2)
    assert read(out)["num_hidden_layers"] == 3
    assert not tensors["model.layers.2.self_attn.o_proj.weight"].any()
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(tensors[f"model.layers.2.mlp.{name}.weight"], module[f"{name}.weight"])
    norm = tensors["model.layers.2.post_attention_layernorm.weight"]
    assert torch.equal(norm, module["mlp_norm.weight"])
    assert torch.equal(tensors["model.norm.weight"], module["norm.weight"])


@pytest.mark.parametrize("variant", ["llama-tied", "llama-untied", "llama-bias"])
def test_an_affine_module_of_a_llama_is_one_more_layer_whose_mlp_is_linear(
    tmp_path: Path, variant: str
) -> None:
    model = make_tiny_checkpoint(tmp_path / "tiny", variant, EXITS, KINDS)

    out = export_submodel(str(model), 3, tmp_path / "out")

    assert (read(out)["num_hidden_layers"], read(out)["mlp_bias"]) == (4, True)
    expected = hf_logits(load_hf(model), IDS, 3, read_exit_module(model, 3))
    torch.testing.assert_close(hf_logits(load_hf(out), IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_written_once(model: Path, tmp_path: Path) -> None:
    untied = make_tiny_checkpoint(tmp_path / "untied", "llama-untied", exits=EXITS)

    tied = load_file(export_submodel(str(model), 1, tmp_path / "a") / "model.safetensors")
    whole = load_file(export_submodel(str(untied), 1, tmp_path / "b") / "model.safetensors")

    assert "lm_head.weight" not in tied
    assert "lm_head.weight" in whole


@pytest.mark.parametrize("exit_layer", [2, 5])
def test_the_kinds_of_layers_are_cut_with_the_layers(tmp_path: Path, exit_layer: int) -> None:
    types = ["full_attention", "sliding_attention"] * 3
    folder = make_tiny_checkpoint(
        tmp_path / "qwen",
        "qwen3-tied",
        exits=(2, 5, 6),
        exit_kinds={2: "mlp"},
        use_sliding_window=True,
        sliding_window=64,
        max_window_layers=6,
        layer_types=types,
    )

    config = read(export_submodel(str(folder), exit_layer, tmp_path / "out"))

    num_layers = config["num_hidden_layers"]
    assert num_layers == (3 if exit_layer == 2 else 5)
    assert config["layer_types"] == types[:num_layers]
    assert config["max_window_layers"] == num_layers


def test_weights_are_rounded_only_if_asked(model: Path, tmp_path: Path) -> None:
    out = export_submodel(str(model), 6, tmp_path / "out", dtype="bfloat16")

    own, rounded = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert read(out)["dtype"] == "bfloat16"
    assert all(torch.equal(rounded[name], own[name].bfloat16()) for name in own)


def test_a_large_model_is_written_in_several_files_and_loads_the_same(
    model: Path, tmp_path: Path
) -> None:
    out = export_submodel(str(model), 2, tmp_path / "out", max_shard_bytes=100_000)

    files = set(read(out, "model.safetensors.index.json")["weight_map"].values())
    assert len(files) > 2
    assert files == {path.name for path in out.glob("*.safetensors")}
    expected = hf_logits(load_hf(model), IDS, 2, read_exit_module(model, 2))
    torch.testing.assert_close(hf_logits(load_hf(out), IDS), expected)


def test_the_chat_template_and_the_end_of_a_text_are_kept(model: Path, tmp_path: Path) -> None:
    out = export_submodel(str(model), 1, tmp_path / "out")

    before, after = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "Hi"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)
    assert read(out, "generation_config.json")["eos_token_id"] == 2


def test_sampling_defaults_of_the_model_are_kept_and_every_end_token(
    model: Path, tmp_path: Path
) -> None:
    (model / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "do_sample": True, "eos_token_id": [0]})
    )

    generation = read(export_submodel(str(model), 1, tmp_path / "out"), "generation_config.json")

    assert (generation["temperature"], generation["do_sample"]) == (0.6, True)
    assert generation["eos_token_id"] == [0, 2]  # its own, and the tokenizer's


def test_a_plain_folder_can_be_cut_at_any_layer_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_tiny_checkpoint(tmp_path / "plain", exits=None)

    out = export_submodel(str(plain), 5, tmp_path / "out")

    torch.testing.assert_close(hf_logits(load_hf(out), IDS), hf_logits(load_hf(plain), IDS, 5))
    assert "Exit 5 is untrained" in caplog.text


def test_an_empty_folder_may_be_written_into(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    assert run(model, "--exit", 1, "--output", out) == 0
    assert (out / "config.json").is_file()


# what is refused


def test_an_affine_module_is_refused_with_the_reason_and_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_checkpoint(tmp_path / "tiny", "qwen3-tied", EXITS, KINDS)

    error = refused(capsys, model, "--exit", 3, "--output", tmp_path / "out")

    assert "--exit 3 of tiny has an affine module" in error
    assert "has no place in a plain qwen3 model" in error
    assert "--exit 6" in error
    assert not (tmp_path / "out").exists()


def test_an_affine_module_does_not_fit_float16(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    error = refused(capsys, model, "--exit", 3, "--dtype", "float16", "--output", out)

    assert error.startswith("--dtype float16 is too small for the affine module of exit 3")
    assert not out.exists()


def test_the_full_depth_of_a_model_with_affine_modules_is_exported(
    model: Path, tmp_path: Path
) -> None:
    assert run(model, "--exit", 6, "--output", tmp_path / "out") == 0


def test_an_exit_that_is_none_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, model, "--exit", 4, "--output", tmp_path / "out")

    assert error == "--exit 4 is not an exit of tiny: choose one of 1, 2, 3, 6."


@pytest.mark.parametrize("exit_layer", [0, 7, -1])
def test_a_layer_that_a_plain_model_does_not_have_is_refused(
    tmp_path: Path, exit_layer: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_tiny_checkpoint(tmp_path / "plain", exits=None)

    error = refused(capsys, plain, f"--exit={exit_layer}", "--output", tmp_path / "out")

    assert error == f"--exit {exit_layer} is not a layer of plain: choose one from 1 to 6."


def test_a_folder_that_is_not_empty_is_refused_and_left_as_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")

    error = refused(capsys, model, "--exit", 1, "--output", out)

    assert f"--output {out} is a folder that is not empty" in error
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "full",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_full_disk_leaves_nothing_that_could_be_taken_for_a_checkpoint(
    model: Path,
    tmp_path: Path,
    full: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def save_file(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise full

    monkeypatch.setattr("sortserve_trainer.run.export.save_file", save_file)

    error = refused(capsys, model, "--exit", 1, "--output", tmp_path / "out")

    assert f"--output {tmp_path / 'out'} cannot be written: " in error
    assert "No space left on device" in error
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_interrupt_leaves_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sortserve_trainer.run.export.save_file", interrupt)

    assert run(model, "--exit", 1, "--output", tmp_path / "out") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("missing", ["--exit", "--output"])
def test_flags_that_must_be_given_are_named(
    model: Path, tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--exit": "1", "--output": str(tmp_path / "out")}
    del flags[missing]

    assert missing in refused(capsys, model, *(part for flag in flags.items() for part in flag))


def test_a_model_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, tmp_path / "nowhere", "--exit", 1, "--output", tmp_path / "out")

    assert "nowhere does not exist" in error


def test_damaged_exit_modules_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "exit_modules.safetensors").write_bytes(b"half")

    error = refused(capsys, model, "--exit", 1, "--output", tmp_path / "out")

    assert "exit_modules.safetensors is truncated" in error
    assert not (tmp_path / "out").exists()
