"""What bitsandbytes has quantised is served as transformers computes it, at every exit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.core.errors import ConfigError
from sortserve.model.decoder import Decoder
from sortserve_trainer.model.load import load_for_evaluation
from sortserve_trainer.run.export import export_submodel
from support.batches import BLOCK_SIZE, Chunk, Pages, random_ids, run_chunks
from support.bnb_checkpoints import (
    BNB_CONFIGS,
    load_quantised_hf,
    make_quantised_checkpoint,
    needs_bitsandbytes,
)
from support.reference import reference_forward
from support.tiny_models import EXIT_KINDS, hf_logits, load_hf, read_exit_module, write_sorted_json

pytestmark = needs_bitsandbytes

EXITS = (1, 2, 4, 5, 6)
KINDS = dict(zip(EXITS[:-1], EXIT_KINDS, strict=True))
IDS = random_ids(40, seed=3)
FORMATS = {
    "nf4": {"nf4": 24, "plain": 1},
    "nf4-nested": {"nf4": 24, "plain": 1},
    "fp4": {"fp4": 24, "plain": 1},
    "int8": {"int8-bnb": 24, "plain": 1},
    "mixed": {"nf4": 12, "nf4+plain": 6, "plain": 7},
    "int8-mixed": {"int8-bnb": 18, "int8-bnb+plain": 6, "plain": 1},
}
CASES = [
    *(("llama-tied", kind) for kind in BNB_CONFIGS),
    ("llama-untied", "nf4"),
    ("llama-bias", "mixed"),
    ("llama-bias", "int8"),
    ("llama-head-dim-10", "nf4"),  # rows that end amid a block
    ("qwen3-untied", "nf4-nested"),
]


def load(folder: Path, **options: Any) -> LoadedCheckpoint:
    return load_checkpoint(str(folder), dtype="float32", device="cpu", **options)


def served_logits(checkpoint: LoadedCheckpoint) -> torch.Tensor:
    """Of the last token of IDS at each exit, deepest first."""
    decoder = Decoder(checkpoint.config, checkpoint.weights, exits=EXITS, max_model_len=64)
    pages, cache = Pages(200), decoder.allocate_kv_cache(200, BLOCK_SIZE)
    chunks = [Chunk(IDS, 0, e, pages.table(e, len(IDS))) for e in EXITS[::-1]]
    return run_chunks(decoder, cache, chunks)


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_served_logits_are_those_of_transformers_and_of_the_dequantised_matrices(
    variant: str, kind: str, tmp_path: Path
) -> None:
    folder = make_quantised_checkpoint(tmp_path / "own", variant, EXITS, KINDS, **BNB_CONFIGS[kind])
    checkpoint, model = load(folder), load_quantised_hf(folder)

    served_RV = served_logits(checkpoint)

    assert checkpoint.weights.formats == FORMATS[kind]
    for exit_layer, logits_V in zip(EXITS[::-1], served_RV, strict=True):
        module = read_exit_module(folder, exit_layer)
        theirs_V = hf_logits(model, IDS, exit_layer, module)[-1]
        config, weights = checkpoint.config, checkpoint.weights
        dequantised_V = reference_forward(config, weights, IDS, exit_layer)[-1]
        torch.testing.assert_close(logits_V, theirs_V, atol=2e-4, rtol=0)
        torch.testing.assert_close(logits_V, dequantised_V, atol=2e-4, rtol=0)


def test_names_may_lack_their_prefix(tmp_path: Path) -> None:
    folder = make_quantised_checkpoint(tmp_path / "own", exits=EXITS, **BNB_CONFIGS["nf4-nested"])
    before = served_logits(load(folder))
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )

    assert torch.equal(served_logits(load(folder)), before)


def test_quantised_at_load_is_quantised_by_transformers(tmp_path: Path) -> None:
    folder = make_quantised_checkpoint(tmp_path / "own", "llama-tied", **BNB_CONFIGS["nf4"])
    plain = make_tiny(tmp_path / "plain")

    ours, theirs = load(plain, quantize="nf4").weights, load(folder).weights

    for own, their in zip(ours.layers, theirs.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            a, b = getattr(own, name), getattr(their, name)
            assert a.format == b.format
            assert torch.equal(a.values, b.values)
            assert torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("quantize", ["nf4", "int8-bnb"])
def test_the_engine_computes_what_the_matrices_quantised_at_load_stand_for(
    quantize: str, tmp_path: Path
) -> None:
    checkpoint = load(make_tiny(tmp_path), quantize=quantize)

    served_RV = served_logits(checkpoint)

    assert checkpoint.weights.formats == {quantize: 25}
    for exit_layer, logits_V in zip(EXITS[::-1], served_RV, strict=True):
        dequantised_TV = reference_forward(checkpoint.config, checkpoint.weights, IDS, exit_layer)
        torch.testing.assert_close(logits_V, dequantised_TV[-1], atol=2e-4, rtol=0)


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    folder = make_quantised_checkpoint(tmp_path / "own", **BNB_CONFIGS["int8"])

    with pytest.raises(ConfigError, match="--quantize='nf4': own is quantised already") as caught:
        load(folder, quantize="nf4")

    assert caught.value.param == "quantize"


@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_an_adapter_is_merged_into_the_matrices_that_a_quantised_base_stands_for(
    kind: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    make_quantised_checkpoint(tmp_path / "base", exits=None, **BNB_CONFIGS[kind])
    adapted = get_peft_model(
        load_quantised_hf(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    write_sorted_json(tmp_path / "own", EXITS)

    checkpoint = load(tmp_path / "own")

    assert checkpoint.weights.formats == {"plain": 25}
    assert load(tmp_path / "own", quantize="nf4").weights.formats == {"nf4": 25}
    theirs_TV = hf_logits(adapted.get_base_model(), IDS)
    torch.testing.assert_close(served_logits(checkpoint)[0], theirs_TV[-1], atol=5e-4, rtol=0)


def test_an_exit_is_exported_as_the_plain_matrices_it_stands_for(tmp_path: Path) -> None:
    folder = make_quantised_checkpoint(tmp_path / "own", exits=EXITS, **BNB_CONFIGS["mixed"])

    export_submodel(str(folder), exit_layer=4, output=tmp_path / "out")

    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    theirs_TV = hf_logits(load_quantised_hf(folder), IDS, 4)
    torch.testing.assert_close(
        hf_logits(load_hf(tmp_path / "out"), IDS), theirs_TV, atol=2e-4, rtol=0
    )


def test_it_is_evaluated_by_the_matrices_it_stands_for(tmp_path: Path) -> None:
    folder = make_quantised_checkpoint(tmp_path / "own", exits=EXITS, **BNB_CONFIGS["nf4"])

    loaded = load_for_evaluation(str(folder), dtype="float32", device="cpu")

    theirs_TV = hf_logits(load_quantised_hf(folder), IDS)
    ours_TV = hf_logits(loaded.model.base, IDS)
    torch.testing.assert_close(ours_TV, theirs_TV, atol=2e-4, rtol=0)


def make_tiny(folder: Path) -> Path:
    from support.tiny_models import make_tiny_checkpoint

    return make_tiny_checkpoint(folder, "llama-tied", exits=EXITS, exit_kinds=KINDS)
