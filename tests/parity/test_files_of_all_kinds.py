"""What a checkpoint's files hold is served as transformers serves it, or is refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from sortserve.checkpoint.families import read_model_config
from sortserve.checkpoint.hf import quiet
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.errors import CheckpointError
from sortserve_trainer.run.export import export_submodel
from support.reference import reference_forward
from support.tiny_models import hf_logits, load_hf, make_tiny_checkpoint

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
IDS = [(7 * position) % 250 + 3 for position in range(40)]
Tensors = dict[str, Tensor]


def load(folder: Path) -> LoadedCheckpoint:
    return load_checkpoint(str(folder), dtype="float32", device="cpu")


def edit_tensors(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file(edit({name: tensor.clone() for name, tensor in load_file(path).items()}), path)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def assert_equal(folder: Path, ids: list[int] | None = None) -> LoadedCheckpoint:
    """The folder's logits at every position are those of transformers."""
    checkpoint = load(folder)
    ids = IDS if ids is None else ids
    ours_TV = reference_forward(
        checkpoint.config, checkpoint.weights, ids, checkpoint.config.num_layers
    )
    torch.testing.assert_close(ours_TV, hf_logits(load_hf(folder), ids), atol=1e-4, rtol=0)
    return checkpoint


# The head


def other_head(tensors: Tensors) -> Tensors:
    return {**tensors, HEAD: tensors[EMBED].flip(0).contiguous()}


def same_head(tensors: Tensors) -> Tensors:
    return {**tensors, HEAD: tensors[EMBED].clone()}


def head_alone(tensors: Tensors) -> Tensors:
    return {HEAD if name == EMBED else name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("edit", "tied"), [(other_head, False), (same_head, True), (head_alone, True)]
)
@pytest.mark.parametrize("variant", ["llama-tied", "qwen3-tied"])
def test_a_tied_config_is_tied_unless_the_files_hold_a_head_of_its_own(
    edit: Callable[[Tensors], Tensors], tied: bool, variant: str, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path, variant)
    edit_tensors(folder, edit)

    checkpoint = assert_equal(folder)

    hf = load_hf(folder)
    assert (hf.lm_head.weight is hf.model.embed_tokens.weight) is tied
    assert (checkpoint.weights.lm_head.values is checkpoint.weights.embed) is tied
    assert checkpoint.config.tie_word_embeddings is tied
    assert checkpoint.exits[6].num_parameters == sum(p.numel() for p in hf.parameters())


def test_a_head_that_differs_only_in_its_dtype_is_the_embedding(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    edit_tensors(folder, lambda t: {**t, EMBED: t[EMBED].half(), HEAD: t[EMBED].half().float()})

    assert assert_equal(folder).config.tie_word_embeddings


def test_a_head_of_another_shape_is_refused_though_the_config_is_tied(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    edit_tensors(folder, lambda t: {**t, HEAD: torch.zeros(100, 64)})

    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[100, 64\]"):
        load(folder)


def test_an_adapter_over_a_base_with_a_head_of_its_own_keeps_that_head(tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    edit_tensors(base, other_head)
    adapted = make_adapter(tmp_path / "adapter", load_hf(base), r=4, target_modules=["q_proj"])

    checkpoint = load(tmp_path / "adapter")

    ours_TV = reference_forward(checkpoint.config, checkpoint.weights, IDS, 6)
    torch.testing.assert_close(ours_TV, hf_logits(adapted, IDS), atol=1e-4, rtol=0)


def test_an_exported_exit_keeps_a_head_of_its_own(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", exits=(4, 6))
    edit_tensors(folder, other_head)

    exported = export_submodel(str(folder), 4, tmp_path / "exported")

    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(
        hf_logits(load_hf(exported), IDS), hf_logits(load_hf(folder), IDS, 4), atol=1e-5, rtol=0
    )


# Names and shards


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("variant", ["llama-tied", "llama-untied", "qwen2-tied", "qwen3-bias"])
def test_the_prefix_of_the_base_model_may_be_missing(variant: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, variant)
    edit_tensors(folder, without_prefix)

    assert_equal(folder)


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    edit_tensors(folder, lambda t: {**t, "norm.weight": t[NORM] + 1})

    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is there twice"):
        load(folder)


@pytest.mark.parametrize(
    ("variant", "name", "shape"),
    [
        ("llama-tied", "model.layers.0.self_attn.q_proj.bias", (64,)),
        ("llama-tied", "model.layers.0.mlp.up_proj.bias", (96,)),
        ("mistral", "model.layers.0.self_attn.o_proj.bias", (64,)),
        ("qwen2-tied", "model.layers.0.self_attn.o_proj.bias", (64,)),
        ("llama-tied", "model.layers.0.self_attn.q_norm.weight", (16,)),
        ("llama-tied", "lm_head.bias", (288,)),
        ("llama-tied", "model.layers.6.input_layernorm.weight", (64,)),
        ("llama-tied", "something.else", (3, 3)),
    ],
)
def test_tensors_the_architecture_has_no_place_for_are_ignored_with_a_warning(
    variant: str,
    name: str,
    shape: tuple[int, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = make_tiny_checkpoint(tmp_path, variant)
    edit_tensors(folder, lambda t: {**t, name: torch.ones(shape)})

    with caplog.at_level(logging.WARNING, logger="sortserve"):
        assert_equal(folder)

    warnings = [r for r in caplog.records if r.name.startswith("sortserve")]
    assert [name in record.getMessage() for record in warnings] == [True]


@pytest.mark.parametrize("variant", ["mistral", "qwen2-tied"])
def test_switches_a_family_does_not_know_change_nothing(variant: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, variant)
    edit_config(folder, attention_bias=True, mlp_bias=True)

    assert_equal(folder)


def shard(folder: Path, place: Callable[[str], str], shards: Mapping[str, list[str]]) -> None:
    """Split the weights: ``shards``: a tensor's files; ``place``: the one the index names."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    for file in sorted({file for files in shards.values() for file in files}):
        save_file({n: t for n, t in tensors.items() if file in shards[n]}, folder / file)
    index = {"metadata": {}, "weight_map": {name: place(name) for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


A, B = "model-1.safetensors", "model-2.safetensors"


def tensor_names(folder: Path) -> list[str]:
    return list(load_file(folder / "model.safetensors"))


def test_an_index_that_names_the_wrong_shard_still_finds_the_tensor(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    shard(
        folder,
        lambda n: B if n == NORM else A,
        {n: [B] for n in tensor_names(folder)[:3]} | {n: [A] for n in tensor_names(folder)[3:]},
    )

    assert_equal(folder)


def test_of_a_tensor_in_two_shards_the_last_counts(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    shard(folder, lambda n: A if n == EMBED else B, {n: [A, B] for n in tensor_names(folder)})
    tensors = load_file(folder / A)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / A)

    assert_equal(folder)


def test_one_file_of_weights_goes_before_an_index(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    whole = load_file(folder / "model.safetensors")
    shard(folder, lambda n: A, {n: [A] for n in whole})
    save_file({**whole, NORM: whole[NORM].flip(0).contiguous()}, folder / "model.safetensors")

    assert_equal(folder)


@pytest.mark.parametrize(
    "name", [3, None, ["a"], "", "..", "../other/model.safetensors", "/etc/passwd", "model.bin"]
)
def test_an_index_that_leaves_the_folder_is_refused(name: Any, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {NORM: name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=r"index\.json.*weight_map\.model\.norm\.weight"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_a_tensor_that_is_no_plain_float_is_refused_by_name(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    edit_tensors(folder, lambda t: {**t, NORM: t[NORM].to(dtype)})

    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight in model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_dtype_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    edit_tensors(folder, lambda t: {name: tensor.to(dtype) for name, tensor in t.items()})

    assert_equal(folder)


# How far a rotary embedding reaches


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 1e4, **parameters}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
REACH: dict[str, tuple[dict[str, Any], int]] = {
    "default": (rope("default"), 64),
    "yarn": (rope("yarn", factor=4.0, original_max_position_embeddings=64), 256),
    "yarn-of-the-whole": (rope("yarn", factor=4.0), 256),
    "yarn-stretched-before": (rope("yarn", factor=4.0, original_max_position_embeddings=16), 64),
    "yarn-beyond": (rope("yarn", factor=4.0, original_max_position_embeddings=48), 192),
    "yarn-implied": (rope("yarn", factor=None, original_max_position_embeddings=16), 64),
    "yarn-fraction": (rope("yarn", factor=1.7, original_max_position_embeddings=50), 85),
    "linear": (rope("linear", factor=4.0), 256),
    "linear-integer": (rope("linear", factor=2), 128),
    "llama3": (rope("llama3", factor=4.0, **LLAMA3), 64),
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("parameters", "length"), REACH.values(), ids=REACH)
def test_the_context_is_as_long_as_the_scaling_makes_it(
    family: str, parameters: dict[str, Any], length: int
) -> None:
    hf_config = CONFIG_MAPPING[family](
        max_position_embeddings=64, rope_parameters=dict(parameters), sliding_window=None
    )

    assert read_model_config(hf_config).max_position_embeddings == length


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_the_older_spelling_of_a_scaling_stretches_the_context_too(
    spelling: str, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path, "qwen2-tied", max_position_embeddings=64)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    scaling = {spelling: "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    path.write_text(json.dumps({**config, "rope_theta": 1e4, "rope_scaling": scaling}))

    assert assert_equal(folder, IDS * 5).max_model_len == 256


@pytest.mark.parametrize("kind", ["yarn", "yarn-beyond", "yarn-fraction", "linear", "llama3"])
def test_beyond_the_original_length_the_logits_are_those_of_transformers(
    kind: str, tmp_path: Path
) -> None:
    parameters, length = REACH[kind]
    folder = make_tiny_checkpoint(tmp_path, max_position_embeddings=64, rope_parameters=parameters)

    assert assert_equal(folder, (IDS * 7)[:length]).max_model_len == length


def test_a_sliding_window_caps_a_stretched_context(tmp_path: Path) -> None:
    parameters = rope("yarn", factor=4.0, original_max_position_embeddings=64)
    folder = make_tiny_checkpoint(
        tmp_path, "mistral-sliding", max_position_embeddings=64, rope_parameters=parameters
    )

    assert load(folder).max_model_len == 128


@pytest.mark.parametrize(("sliding", "length"), [(0, 256), (2, 32), (6, 32)])
def test_a_mistral_slides_in_the_layers_its_config_names(
    sliding: int, length: int, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "mistral-sliding", exits=None)
    types = ["sliding_attention"] * sliding + ["full_attention"] * (6 - sliding)
    edit_config(folder, layer_types=types, sliding_window=32)

    checkpoint = assert_equal(folder, (IDS * 7)[:length])

    assert checkpoint.max_model_len == length
    assert checkpoint.config.family == "mistral"
    assert_equal(export_submodel(str(folder), 6, tmp_path / "exported"), IDS[:32])


# Adapters


def make_adapter(folder: Path, model: Any, **options: Any) -> Any:
    """A random adapter over ``../base``; returns transformers' model with it applied."""
    import peft

    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.1 * noise
    with quiet():  # peft takes the bias of lora-bias for a matrix
        adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "base_model_name_or_path": "../base"}))
    return adapted.eval().get_base_model()


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.(0|3)\.(self_attn|mlp)\.(q|up)_proj"},
    "excluded": {"target_modules": ["q_proj"], "exclude_modules": r".*\.[24]\..*"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "r": 2},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "ranks": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.[01]\..*q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "layers": {
        "target_modules": ["o_proj"],
        "layers_to_transform": [1, 5],
        "layers_pattern": "layers",
    },
    "saved-modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "bias-all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias-lora-only": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["q_proj"], "lora_bias": True},
}


OFTEN_USED = ("lora", "expression", "rslora", "dora", "ranks", "saved-modules")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=() if name in OFTEN_USED else pytest.mark.slow)
        for name, options in ADAPTERS.items()
    ],
)
def test_an_adapter_merged_is_the_adapter_applied(options: dict[str, Any], tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", "qwen2-untied", exits=None)
    adapted = make_adapter(tmp_path / "adapter", load_hf(base), **{"r": 4, **options})

    checkpoint = load(tmp_path / "adapter")

    ours_TV = reference_forward(checkpoint.config, checkpoint.weights, IDS, 6)
    theirs_TV = hf_logits(adapted, IDS)
    torch.testing.assert_close(ours_TV, theirs_TV, atol=2e-4, rtol=0)
    assert (theirs_TV - hf_logits(load_hf(base), IDS)).abs().max() > 0.01, "the adapter is idle"
