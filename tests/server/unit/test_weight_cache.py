"""Weights as they are served are kept between starts: the same bits, and never others'."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sortserve.checkpoint import load as checkpoint_module
from sortserve.checkpoint import weight_cache
from sortserve.checkpoint.adapter import merge_adapter
from sortserve.checkpoint.load import (
    LoadedCheckpoint,
    LoadedModel,
    load_checkpoint,
    load_share,
)
from sortserve.checkpoint.quantize import QUANTIZERS, Quantizer
from sortserve.core.errors import ConfigError
from sortserve.model.backends import choose_backend
from sortserve.model.backends.kernels import cpu_isa
from sortserve.model.decoder import Decoder
from sortserve.model.weight import Weight
from support.tiny_gguf import write_tiny_gguf
from support.tiny_models import make_tiny_checkpoint, tiny_hf_model
from support.toy_quantizer import ToyFormat, quantize_toy

RANK = 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cpu_isa()  # so that the kernels are not compiled for this folder
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def merges(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The adapters that were merged, in order."""
    merged: list[Path] = []
    merge = merge_adapter

    def counted(folder: Path, base: Path) -> Any:
        merged.append(folder)
        return merge(folder, base)

    monkeypatch.setattr(checkpoint_module, "merge_adapter", counted)
    return merged


def toy(restore: bool) -> Quantizer:
    def restored(values: Tensor, scales: Tensor | None, shape: tuple[int, int]) -> Weight:
        assert tuple(values.shape) == shape
        return Weight(values, scales, ToyFormat())

    return Quantizer(make=quantize_toy, restore=restored if restore else None)


def make_adapter(folder: Path, base: Path, *, seed: int = 0) -> Path:
    """An adapter that changes two matrices of the first layer."""
    folder.mkdir(exist_ok=True)
    names = ["q_proj", "down_proj"]
    document = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK}
    (folder / "adapter_config.json").write_text(json.dumps({**document, "target_modules": names}))
    generator = torch.Generator().manual_seed(seed)
    config = tiny_hf_model().config
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tensors = {}
    for layer in range(layers):
        for name, num_in in (("self_attn.q_proj", hidden), ("mlp.down_proj", mlp)):
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, num_in, generator=generator)
            tensors[f"{at}.lora_B.weight"] = torch.randn(hidden, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(params=["folder", "gguf"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "gguf":
        base = write_tiny_gguf(tmp_path / "base.gguf", tiny_hf_model())
    else:
        base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    return make_adapter(tmp_path / "adapter", base)


@pytest.fixture
def folder_adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", make_tiny_checkpoint(tmp_path / "base", exits=None))


def load(path: Path, dtype: str = "bfloat16", quantize: str = "none") -> LoadedCheckpoint:
    return load_checkpoint(str(path), dtype=dtype, device="cpu", quantize=quantize)


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("weights-*"))


def assert_equal(a: LoadedModel, b: LoadedModel) -> None:
    """Every tensor of the two, bit for bit."""
    assert a.config == b.config
    pairs = [(a.weights.embed, b.weights.embed), (a.weights.final_norm, b.weights.final_norm)]
    pairs += [(a.weights.inv_freq, b.weights.inv_freq)]
    for x, y in zip([a.weights, *a.weights.layers], [b.weights, *b.weights.layers], strict=True):
        assert vars(x).keys() == vars(y).keys()
        for name, value in vars(x).items():
            other = vars(y)[name]
            if isinstance(value, Weight):
                assert value.format.name == other.format.name
                assert value.shape == other.shape
                pairs.append((value.values, other.values))
                pairs.append((value.dequantize(torch.float32), other.dequantize(torch.float32)))
                assert (value.scales is None) == (other.scales is None)
                if value.scales is not None:
                    pairs.append((value.scales, other.scales))
            elif isinstance(value, Tensor):
                pairs.append((value, other))
            elif name not in ("layers", "exit_modules"):
                assert value == other
    for first, second in pairs:
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_each_rank_keeps_its_own_share(
    folder_adapter: Path, quantize: str, cache: Path, merges: list[Path]
) -> None:
    """The head of this model is a part of the embedding: a file has either once."""

    def load_all() -> list[LoadedModel]:
        arguments = {"exits": None, "dtype": "float32", "device": "cpu", "revision": None}
        return [
            load_share(str(folder_adapter), rank=rank, num_ranks=2, quantize=quantize, **arguments)
            for rank in range(2)
        ]

    cold, warm = load_all(), load_all()

    for first, second in zip(cold, warm, strict=True):
        assert_equal(first, second)
    assert not torch.equal(cold[0].weights.layers[0].o.values, cold[1].weights.layers[0].o.values)
    assert len(kept(cache)) == 2
    assert len(merges) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_warm_start_has_the_bits_of_a_cold_one_and_merges_nothing(
    adapter: Path, dtype: str, merges: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = load(adapter, dtype)
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it is an error now

    warm = load(adapter, dtype)

    assert_equal(cold, warm)
    assert len(merges) == 1
    assert (warm.weights.lm_head.values is warm.weights.embed) == (
        cold.weights.lm_head.values is cold.weights.embed
    )


@pytest.mark.parametrize("name", ["toy", *QUANTIZERS])
def test_quantised_weights_are_kept_as_they_are(
    folder_adapter: Path,
    merges: list[Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    if name == "toy":
        monkeypatch.setitem(QUANTIZERS, "toy", toy(restore=True))
    elif (library := QUANTIZERS[name].library) is not None:
        pytest.importorskip(library)
    plain, cold = load(folder_adapter), load(folder_adapter, quantize=name)

    warm = load(folder_adapter, quantize=name)

    assert warm.weights.formats == cold.weights.formats != plain.weights.formats
    assert_equal(cold, warm)
    assert len(merges) == len(kept(cache)) == 2


def test_a_quantiser_that_cannot_restore_makes_weights_at_every_start(
    folder_adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "toy", toy(restore=False))

    assert_equal(load(folder_adapter, quantize="toy"), load(folder_adapter, quantize="toy"))

    assert kept(cache) == []


def test_a_quantised_folder_is_kept_and_a_plain_one_is_not(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "toy", toy(restore=True))
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)

    load(base)
    assert kept(cache) == []
    assert_equal(load(base, quantize="toy"), load(base, quantize="toy"))

    assert len(kept(cache)) == 1


def test_each_dtype_and_each_content_has_weights_of_its_own(
    folder_adapter: Path, merges: list[Path], cache: Path
) -> None:
    load(folder_adapter, "bfloat16")
    load(folder_adapter, "float32")
    other = make_adapter(folder_adapter, folder_adapter.parent / "base", seed=1)

    changed = load(other, "float32")

    assert len(merges) == len(kept(cache)) == 3
    shutil.rmtree(cache)
    assert_equal(load(other, "float32"), changed)


def test_a_changed_base_gets_new_weights(folder_adapter: Path, merges: list[Path]) -> None:
    load(folder_adapter)
    weights = folder_adapter.parent / "base" / "model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})

    load(folder_adapter)

    assert len(merges) == 2


def test_exits_do_not_matter_to_the_weights(folder_adapter: Path, merges: list[Path]) -> None:
    for exits in ((2,), (3,), None):
        load_checkpoint(str(folder_adapter), dtype="bfloat16", device="cpu", exits=exits)

    assert len(merges) == 1


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def let_others_write(path: Path) -> None:
    path.chmod(0o666)


def link_elsewhere(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def rename(path: Path) -> None:
    content = path.read_bytes()
    path.rename(path.with_name(f"{path.name[:40]}-{'0' * 32}.safetensors"))
    assert content


@pytest.mark.parametrize(
    "damage", [flip_a_bit, cut, empty, Path.unlink, let_others_write, link_elsewhere, rename]
)
def test_weights_that_are_not_what_was_written_are_made_again(
    folder_adapter: Path, merges: list[Path], cache: Path, damage: Callable[[Path], None]
) -> None:
    cold = load(folder_adapter)
    [path] = kept(cache)
    damage(path)

    assert_equal(cold, load(folder_adapter))
    assert len(merges) == 2
    assert_equal(cold, load(folder_adapter))
    assert len(merges) == 2
    assert kept(cache) == [path]


def test_of_two_servers_that_start_at_once_both_work_and_one_keeps_what_it_made(
    folder_adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[LoadedCheckpoint] = []

    def merge_while_another_starts(folder: Path, base: Path) -> Any:
        monkeypatch.setattr(checkpoint_module, "merge_adapter", merge_adapter)
        others.append(load(folder_adapter))  # it finds nothing either, and is done before us
        return merge_adapter(folder, base)

    monkeypatch.setattr(checkpoint_module, "merge_adapter", merge_while_another_starts)
    one = load(folder_adapter)

    [other] = others
    assert_equal(one, other)
    assert len(kept(cache)) == 1
    assert_equal(one, load(folder_adapter))


def test_a_base_that_is_damaged_harms_only_who_needs_it(
    tmp_path: Path, merges: list[Path], cache: Path
) -> None:
    base = write_tiny_gguf(tmp_path / "base.gguf", tiny_hf_model())
    adapter = make_adapter(tmp_path / "adapter", base)
    cold = load(adapter)
    [converted] = cache.glob("base-*")
    flip_a_bit(converted / "model.safetensors")

    assert_equal(cold, load(adapter))
    kept(cache)[0].unlink()
    assert_equal(cold, load(adapter))

    assert len(merges) == 2


def test_a_full_disk_costs_the_next_start_its_time_and_nothing_else(
    folder_adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weight_cache, "save_file", full)
    with caplog.at_level(logging.WARNING, logger="sortserve"):
        load(folder_adapter)

    assert "No space left on device" in caplog.text
    assert [path for path in cache.iterdir() if path.name.startswith((".", "weights"))] == []


def test_a_cache_that_is_too_small_keeps_nothing(
    folder_adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_SIZE", "10KiB")

    load(folder_adapter)

    assert kept(cache) == []
    assert "do not fit" in caplog.text


def test_a_size_of_the_cache_that_is_none_is_refused_by_name(
    folder_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_SIZE", "plenty")

    with pytest.raises(ConfigError, match="SORTSERVE_CACHE_SIZE='plenty'"):
        load(folder_adapter)


def test_weights_outlive_the_file_that_they_are_mapped_from(
    folder_adapter: Path, cache: Path
) -> None:
    cold = load(folder_adapter)
    warm = load(folder_adapter)
    kept(cache)[0].unlink()

    assert_equal(cold, warm)


def test_a_decoder_of_mapped_weights_leaves_no_view_of_the_file(folder_adapter: Path) -> None:
    load(folder_adapter, "float32")
    of_others = _mappings()
    warm = load(folder_adapter, "float32")
    backend = choose_backend(warm.config, torch.float32, torch.device("cpu"))
    assert _mappings() - of_others

    decoder = Decoder(
        warm.config,
        warm.weights,
        exits=warm.exits.layers,
        max_model_len=64,
        backend=backend,
        release_weights=True,
    )

    assert decoder.backend.name == "reference" or not _mappings() - of_others


def _mappings() -> set[str]:
    """Of kept weights, in this process: those of other tests may still be alive."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line for line in maps if "weights-" in line}
