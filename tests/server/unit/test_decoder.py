"""The decoder against transformers and against a plain forward pass, whole, mixed and in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sortserve.model.attention import KVCache
from sortserve.model.backends import choose_backend
from sortserve.model.config import ModelConfig
from sortserve.model.decoder import Decoder
from sortserve.model.exit_module import Affine, GatedMlp, OwnNorm
from sortserve.model.weight import Weight
from sortserve.model.weights import ExitModuleWeights, LayerWeights, ModelWeights
from support.batches import BLOCK_SIZE, Chunk, Pages, make_batch, random_ids, run_chunks
from support.reference import reference_forward
from support.tiny_models import hf_logits, tiny_hf_model

EXITS = (2, 4, 6)
BACKENDS = ("reference", "auto")


def from_hf(model: Any) -> tuple[ModelConfig, ModelWeights]:
    """A transformers model's weights, fused as the decoder wants them."""
    hf = model.config
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    state = model.state_dict()

    def cat(layer: int, names: Sequence[str], suffix: str) -> Tensor | None:
        keys = [f"model.layers.{layer}.{name}.{suffix}" for name in names]
        return torch.cat([state[key] for key in keys]) if keys[0] in state else None

    def weight(layer: int, *names: str) -> Tensor:
        tensor = cat(layer, names, "weight")
        assert tensor is not None
        return tensor

    def matrix(layer: int, *names: str) -> Weight:
        return Weight.plain(weight(layer, *names))

    qkv = [f"self_attn.{x}_proj" for x in "qkv"]
    gate_up = ["mlp.gate_proj", "mlp.up_proj"]
    layers = [
        LayerWeights(
            input_norm=weight(i, "input_layernorm"),
            qkv=matrix(i, *qkv),
            qkv_bias=cat(i, qkv, "bias"),
            q_norm=cat(i, ["self_attn.q_norm"], "weight"),
            k_norm=cat(i, ["self_attn.k_norm"], "weight"),
            o=matrix(i, "self_attn.o_proj"),
            o_bias=cat(i, ["self_attn.o_proj"], "bias"),
            post_attention_norm=weight(i, "post_attention_layernorm"),
            gate_up=matrix(i, *gate_up),
            gate_up_bias=cat(i, gate_up, "bias"),
            down=matrix(i, "mlp.down_proj"),
            down_bias=cat(i, ["mlp.down_proj"], "bias"),
        )
        for i in range(hf.num_hidden_layers)
    ]
    rotary = model.model.rotary_emb
    weights = ModelWeights(
        embed=state["model.embed_tokens.weight"],
        layers=layers,
        final_norm=state["model.norm.weight"],
        lm_head=Weight.plain(state["lm_head.weight"]),
        inv_freq=rotary.inv_freq,
        rope_attention_scaling=rotary.attention_scaling,
    )
    config = ModelConfig(
        family=hf.model_type,
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=hf.vocab_size,
        rms_norm_eps=hf.rms_norm_eps,
        max_position_embeddings=hf.max_position_embeddings,
        tie_word_embeddings=hf.tie_word_embeddings,
        qk_norm=hf.model_type == "qwen3",
    )
    return config, weights


def random_exit_modules(config: ModelConfig) -> dict[int, ExitModuleWeights]:
    """Exit 2 an affine module, exit 4 an MLP, the last exit an own norm."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    d, f = config.hidden_size, config.intermediate_size
    norms = [1 + 0.2 * torch.randn(d, generator=generator) for _ in range(4)]
    return {
        2: ExitModuleWeights(
            kind=Affine, tensors={"norm.weight": norms[0], "affine.weight": noise(d, d)}
        ),
        4: ExitModuleWeights(
            kind=GatedMlp,
            tensors={
                "norm.weight": norms[1],
                "mlp_norm.weight": norms[2],
                "gate_proj.weight": noise(f, d),
                "up_proj.weight": noise(f, d),
                "down_proj.weight": noise(d, f),
            },
        ),
        6: ExitModuleWeights(kind=OwnNorm, tensors={"norm.weight": norms[3]}),
    }


def make_decoder(
    variant: str = "llama-tied", *, backend: str = "auto", modules: bool = False
) -> tuple[Decoder, ModelConfig, ModelWeights]:
    config, weights = from_hf(tiny_hf_model(variant))
    if modules:
        weights.exit_modules = random_exit_modules(config)
    decoder = Decoder(
        config,
        weights,
        exits=EXITS,
        max_model_len=256,
        backend=choose_backend(config, weights.dtype, weights.device, backend),
    )
    return decoder, config, weights


def run_chunked(
    decoder: Decoder,
    cache: KVCache,
    pages: Pages,
    ids: list[int],
    exit_layer: int,
    sizes: list[int],
) -> Tensor:
    """The last token's logits after running ``ids`` in chunks of ``sizes``, alone."""
    table = pages.table(decoder.slabs.count(exit_layer), len(ids))
    start = 0
    for size in sizes:
        last = run_chunks(
            decoder, cache, [Chunk(ids[start : start + size], start, exit_layer, table)]
        )
        start += size
    assert start == len(ids)
    return last


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "variant",
    [
        "llama-tied",
        "llama-bias",
        "llama-mha",
        "llama-mqa",
        "llama-head-dim-10",
        "llama-head-dim-24",
        "llama-rope-yarn",
        "qwen2-untied",
        "qwen3-bias",
    ],
)
def test_every_exit_gives_the_logits_of_transformers(variant: str, backend: str) -> None:
    model = tiny_hf_model(variant)
    decoder, _, _ = make_decoder(variant, backend=backend)
    cache, pages = decoder.allocate_kv_cache(64, BLOCK_SIZE), Pages(64)
    ids = random_ids(21, seed=3)
    for exit_layer in EXITS:
        expected = hf_logits(model, ids, num_layers=exit_layer)[-1]
        table = pages.table(exit_layer // 2, len(ids))
        whole = run_chunks(decoder, cache, [Chunk(ids, 0, exit_layer, table)])
        torch.testing.assert_close(whole[0], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_modules_stand_between_trunk_and_head(backend: str) -> None:
    decoder, config, weights = make_decoder(modules=True, backend=backend)
    cache, pages = decoder.allocate_kv_cache(64, BLOCK_SIZE), Pages(64)
    ids = random_ids(9, seed=4)
    for exit_layer in EXITS:
        expected = reference_forward(config, weights, ids, exit_layer)[-1]
        table = pages.table(exit_layer // 2, len(ids))
        got = run_chunks(decoder, cache, [Chunk(ids, 0, exit_layer, table)])
        torch.testing.assert_close(got[0], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunked_prefill_and_decode_equal_the_whole_prompt(backend: str) -> None:
    decoder, _, _ = make_decoder("qwen3-tied", backend=backend)
    cache, pages = decoder.allocate_kv_cache(128, BLOCK_SIZE), Pages(128)
    ids = random_ids(40, seed=5)
    whole = run_chunked(decoder, cache, pages, ids, 6, [40])
    for sizes in ([1] * 40, [7, 1, 20, 12], [8, 32], [39, 1]):
        chunked = run_chunked(decoder, cache, pages, ids, 6, sizes)
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_mixed_depths_equal_each_row_alone(backend: str) -> None:
    decoder, _, _ = make_decoder(modules=True, backend=backend)
    cache, pages = decoder.allocate_kv_cache(256, BLOCK_SIZE), Pages(256)
    # (exit, tokens already in the cache, tokens in the mixed step, samples)
    rows = [(6, 0, 13, True), (6, 17, 1, True), (4, 5, 9, False), (4, 30, 1, True), (2, 3, 2, True)]
    chunks, expected = [], []
    for seed, (exit_layer, start, count, samples) in enumerate(rows):
        ids = random_ids(start + count, seed)
        if samples:
            expected.append(run_chunked(decoder, cache, pages, ids, exit_layer, [start + count]))
        table = pages.table(decoder.slabs.count(exit_layer), len(ids))
        if start:
            run_chunks(decoder, cache, [Chunk(ids[:start], 0, exit_layer, table, samples=False)])
        chunks.append(Chunk(ids[start:], start, exit_layer, table, samples))
    mixed = run_chunks(decoder, cache, chunks)
    torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_pages_held_before_does_not_matter_not_even_nan(backend: str) -> None:
    """Keys and values that were not finite are left to the next owner of their pages."""
    decoder, _, _ = make_decoder("qwen3-tied", backend=backend)
    got = []
    for stale in (0.0, torch.nan):
        cache, pages = decoder.allocate_kv_cache(64, BLOCK_SIZE), Pages(64)
        cache.pages.fill_(stale)
        rows = []
        for exit_layer, count in [(6, 19), (4, 8), (2, 1)]:
            table, ids = pages.table(exit_layer // 2, count + 1), random_ids(count + 1, count)
            run_chunks(decoder, cache, [Chunk(ids[:count], 0, exit_layer, table, samples=False)])
            rows.append(Chunk(ids[count:], count, exit_layer, table))
        got.append(run_chunks(decoder, cache, rows))
    assert torch.equal(*got)


def test_a_shallow_row_writes_only_the_pages_of_its_slabs() -> None:
    decoder, _, _ = make_decoder()
    cache, pages = decoder.allocate_kv_cache(32, BLOCK_SIZE), Pages(32)
    table = pages.table(1, 10)
    run_chunks(decoder, cache, [Chunk(random_ids(10, 0), 0, 2, table)])
    written = cache.pages.abs().sum(dim=(0, 1, 3, 4, 5)).nonzero().flatten().tolist()
    assert written == sorted(table.flatten().tolist())


def test_a_step_in_which_no_row_samples_returns_no_hidden_state() -> None:
    decoder, config, _ = make_decoder()
    cache, pages = decoder.allocate_kv_cache(8, BLOCK_SIZE), Pages(8)
    chunk = Chunk(random_ids(4, 0), 0, 4, pages.table(2, 4), samples=False)
    h_RD = decoder.forward(make_batch([chunk], decoder.num_slabs), cache)
    assert h_RD.shape == (0, config.hidden_size)


def test_slabs_follow_from_the_exits() -> None:
    config, weights = from_hf(tiny_hf_model())
    for exits, slab_size, num_slabs in [((2, 4, 6), 2, 3), ((3, 6), 3, 2), ((6,), 6, 1)]:
        decoder = Decoder(config, weights, exits=exits, max_model_len=64)
        assert (decoder.slab_size, decoder.num_slabs) == (slab_size, num_slabs)
        cache = decoder.allocate_kv_cache(5, BLOCK_SIZE)
        page_bytes = KVCache.page_bytes(config, slab_size, BLOCK_SIZE, decoder.dtype)
        assert cache.pages.nbytes == 5 * page_bytes
