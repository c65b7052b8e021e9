"""Ranks that divide a model give the logits of one process.

Here each rank is a thread with a gloo group of its own: ``tests/laws/test_tensor_parallel_laws.py``
has the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.lib.shapes import config_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sortserve.checkpoint.load import LoadedModel, load_share
from sortserve.checkpoint.shards import shard
from sortserve.core.errors import CheckpointError, ConfigError
from sortserve.engine.model_parts import make_decoder
from sortserve.engine.options import EngineOptions
from sortserve.engine.tensor_parallel.collectives import Group
from sortserve.model.attention import KVCache
from sortserve.model.config import ModelConfig
from sortserve.model.decoder import Decoder
from sortserve.model.local_shape import LocalShape, allowed_numbers_of_ranks
from support.batches import BLOCK_SIZE, Chunk, Pages, random_ids, run_chunks
from support.ouro import make_tiny_ouro
from support.tiny_models import make_tiny_checkpoint, write_sorted_json

CPU = torch.device("cpu")
EXITS = (2, 4, 5, 6)
KINDS = {2: "layer", 4: "head", 5: "mlp"}
TOLERANCE = 1e-5
"""Largest difference of two logits in fp32, relative to the largest logit: ranks add up the same
numbers in another order."""
LOADING: dict[str, Any] = {
    "exits": None,
    "dtype": "float32",
    "device": "cpu",
    "quantize": "none",
    "revision": None,
}


# ---- what a rank has ----


def configs() -> st.SearchStrategy[tuple[ModelConfig, int]]:
    """Decoders of all head ratios, and a number of ranks that divides them."""

    def make(kv_heads: int, ratio: int, head_dim: int, part: int, vocabulary: int) -> ModelConfig:
        return ModelConfig(
            family="llama",
            num_layers=1,
            hidden_size=8,
            intermediate_size=24 * part,
            num_heads=kv_heads * ratio,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=24 + vocabulary,
            rms_norm_eps=1e-5,
            max_position_embeddings=8,
            tie_word_embeddings=False,
        )

    config = st.builds(
        make,
        st.integers(1, 8),
        st.integers(1, 8),
        st.sampled_from((2, 6)),
        st.integers(1, 3),
        st.integers(0, 50),
    )
    return config.flatmap(
        lambda c: st.tuples(st.just(c), st.sampled_from(allowed_numbers_of_ranks(c)))
    )


@given(configs())
def test_all_ranks_together_have_everything_once(case: tuple[ModelConfig, int]) -> None:
    config, num_ranks = case
    shapes = [LocalShape.of(config, rank, num_ranks) for rank in range(num_ranks)]

    for name, size in (
        ("heads", config.num_heads),
        ("intermediate", config.intermediate_size),
        ("vocabulary", config.vocab_size),
    ):
        shares = [range(size)[getattr(shape, name)] for shape in shapes]
        assert [index for share in shares for index in share] == list(range(size))
        assert min(map(len, shares)) > 0
        assert name == "vocabulary" or len(set(map(len, shares))) == 1


@given(configs())
def test_a_rank_has_the_key_value_heads_that_its_query_heads_read(
    case: tuple[ModelConfig, int],
) -> None:
    config, num_ranks = case
    group = config.num_heads // config.num_kv_heads
    for rank in range(num_ranks):
        shape = LocalShape.of(config, rank, num_ranks)
        local = shape.config(config)
        kept = range(config.num_kv_heads)[shape.kv_heads]
        read = [head // group for head in range(config.num_heads)[shape.heads]]

        assert set(read) == set(kept)
        # In the narrower decoder a query head reads the very head that it reads in the whole one.
        local_group = local.num_heads // local.num_kv_heads
        assert read == [kept[head // local_group] for head in range(local.num_heads)]


@given(configs())
def test_the_matrices_of_all_ranks_are_those_of_the_model(case: tuple[ModelConfig, int]) -> None:
    config, num_ranks = case
    shapes = [LocalShape.of(config, rank, num_ranks) for rank in range(num_ranks)]

    def parts(name: str, *size: int) -> tuple[Tensor, list[Tensor]]:
        whole = torch.randn(size)
        return whole, [shard(f"model.layers.0.{name}", whole, config, shape) for shape in shapes]

    for name, width in (("self_attn.q_proj", config.q_size), ("mlp.up_proj", 24)):
        rows = width if "attn" in name else config.intermediate_size
        whole, shares = parts(f"{name}.weight", rows, 8)
        assert torch.equal(torch.cat(shares), whole)
    for name, columns in (
        ("self_attn.o_proj", config.q_size),
        ("mlp.down_proj", config.intermediate_size),
    ):
        whole, shares = parts(f"{name}.weight", 8, columns)
        assert torch.equal(torch.cat(shares, dim=1), whole)
        whole, shares = parts(f"{name}.bias", 8)
        assert torch.equal(torch.stack(shares).sum(0), whole)
    whole, shares = parts("input_layernorm.weight", 8)
    assert all(share is whole for share in shares)


def test_a_model_that_cannot_be_divided_is_refused_with_the_numbers_that_can() -> None:
    with pytest.raises(ConfigError) as refused:
        LocalShape.of(config_of("smollm2-135m"), 0, 2)

    assert str(refused.value) == (
        "--tensor-parallel-size=2: 9 query heads, 3 key/value heads and an MLP of 1536 cannot be "
        "divided among 2 ranks. Allowed for this model: 1, 3."
    )
    assert refused.value.param == "tensor-parallel-size"


# ---- what they compute ----


class Threads:
    """A model divided among threads."""

    def __init__(self, folder: Path, model: Path, num_ranks: int, **loading: Any) -> None:
        self.folder, self.model, self.num_ranks = folder, model, num_ranks
        self.loading = {**LOADING, **loading}
        self.pool = ThreadPoolExecutor(num_ranks)
        self.groups = [Group(rank, num_ranks, CPU) for rank in range(num_ranks)]

    def each(self, work: Callable[[int], Any]) -> list[Any]:
        return list(self.pool.map(work, range(self.num_ranks)))

    def load(self, rank: int) -> LoadedModel:
        return load_share(str(self.model), rank=rank, num_ranks=self.num_ranks, **self.loading)

    def decoders(self, backend: str) -> list[Decoder]:
        options = EngineOptions(backend=backend)
        self.each(lambda rank: self.groups[rank].meet(self.folder))
        models = [self.load(rank) for rank in range(self.num_ranks)]
        return [
            make_decoder(model, options, 256, group=group, release_weights=True).decoder
            for model, group in zip(models, self.groups, strict=True)
        ]

    def run(
        self, decoders: Sequence[Decoder], caches: Sequence[KVCache], chunks: Sequence[Chunk]
    ) -> Tensor:
        def step(rank: int) -> Tensor:
            with self.groups[rank].step():
                return run_chunks(decoders[rank], caches[rank], chunks)

        logits: Tensor = self.each(step)[0]
        return logits


def whole_decoder(model: Path, backend: str, **loading: Any) -> Decoder:
    loaded = load_share(str(model), rank=0, num_ranks=1, **{**LOADING, **loading})
    return make_decoder(loaded, EngineOptions(backend=backend), 256).decoder


def mixed_steps(num_slabs: int) -> list[list[Chunk]]:
    """Prompts, one of them in two chunks, then decoding, at every exit."""
    pages = Pages(200)
    prompts = [random_ids(n, seed=n) for n in (19, 11, 7, 23)]
    tables = [pages.table(num_slabs, 32) for _ in prompts]
    rows = list(zip(prompts, tables, (6, 5, 4, 2), strict=True))
    first = [Chunk(p[:9], 0, e, t, samples=len(p) <= 9) for p, t, e in rows]
    second = [Chunk(p[9:], 9, e, t) for p, t, e in rows if len(p) > 9]
    decode = [Chunk([17 + e], len(p), e, t) for p, t, e in rows]
    return [first, second, decode]


@pytest.mark.parametrize(
    ("variant", "num_ranks"),
    [
        ("llama-tied", 2),
        ("llama-tied", 4),
        ("llama-untied", 2),
        ("llama-bias", 2),
        ("llama-mqa", 2),
        ("llama-head-dim-10", 2),
        ("qwen2-untied", 2),
        ("qwen3-tied", 2),
        ("qwen3-bias", 4),
        ("ouro", 2),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_ranks_give_the_logits_of_one_process(
    variant: str, num_ranks: int, backend: str, tmp_path: Path
) -> None:
    """With each kind of exit module at some exit, and logits from two parts of the vocabulary."""
    model = tmp_path / "model"
    if variant == "ouro":
        make_tiny_ouro(model, num_hidden_layers=3, total_ut_steps=2, vocab_size=289)
        write_sorted_json(model, EXITS, {4: "head", 5: "mlp"})
    else:
        make_tiny_checkpoint(model, variant, EXITS, KINDS, vocab_size=289)
    whole = whole_decoder(model, backend)
    ranks = Threads(tmp_path, model, num_ranks)
    decoders = ranks.decoders(backend)
    cache = whole.allocate_kv_cache(200, BLOCK_SIZE)
    caches = [decoder.allocate_kv_cache(200, BLOCK_SIZE) for decoder in decoders]

    for chunks in mixed_steps(whole.num_slabs):
        expected = run_chunks(whole, cache, chunks)
        got = ranks.run(decoders, caches, chunks)

        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
    num_heads = max(1, whole.config.num_kv_heads // num_ranks)
    assert [c.pages.shape[3] for c in caches] == [num_heads] * num_ranks


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_ranks_in_bfloat16_are_as_close_as_its_digits(backend: str, tmp_path: Path) -> None:
    """Terms of a sum are rounded before they are added: 8 bits, through six layers."""
    model = make_tiny_checkpoint(tmp_path / "model", "llama-tied", EXITS, KINDS)
    whole = whole_decoder(model, "reference", dtype="float32")
    ranks = Threads(tmp_path, model, 2, dtype="bfloat16")
    decoders = ranks.decoders(backend)
    cache = whole.allocate_kv_cache(200, BLOCK_SIZE)
    caches = [decoder.allocate_kv_cache(200, BLOCK_SIZE) for decoder in decoders]

    for chunks in mixed_steps(whole.num_slabs):
        expected = run_chunks(whole, cache, chunks)
        got = ranks.run(decoders, caches, chunks)
        assert (got - expected).abs().max() <= 0.05 * expected.abs().max()


def test_weights_are_divided_first_and_made_smaller_then(tmp_path: Path) -> None:
    """Blocks of 32 inputs end where shares do here, so int8 is the same int8."""
    model = make_tiny_checkpoint(tmp_path / "model", "llama-tied", EXITS, intermediate_size=128)
    ranks = Threads(tmp_path, model, 2, quantize="int8")
    decoders = ranks.decoders("reference")
    whole = whole_decoder(model, "reference", quantize="int8")
    [chunks, *_] = mixed_steps(whole.num_slabs)

    expected = run_chunks(whole, whole.allocate_kv_cache(200, BLOCK_SIZE), chunks)
    caches = [decoder.allocate_kv_cache(200, BLOCK_SIZE) for decoder in decoders]
    got = ranks.run(decoders, caches, chunks)

    assert decoders[0].formats == {"int8": 25}
    assert (got - expected).abs().max() <= 1e-2 * expected.abs().max()


def test_a_checkpoint_that_is_stored_quantised_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from support.bnb_checkpoints import BNB_CONFIGS, make_quantised_checkpoint

    make_quantised_checkpoint(tmp_path / "model", **BNB_CONFIGS["nf4"])

    with pytest.raises(CheckpointError, match="cannot be divided among 2 ranks"):
        Threads(tmp_path, tmp_path / "model", 2).load(1)


def test_a_step_of_one_rank_alone_is_a_mistake_and_no_hang(tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", "llama-tied", EXITS)
    [decoder, _] = Threads(tmp_path, model, 2).decoders("reference")
    [chunks, *_] = mixed_steps(decoder.num_slabs)

    with pytest.raises(AssertionError, match="run a plan with the runner"):
        run_chunks(decoder, decoder.allocate_kv_cache(200, BLOCK_SIZE), chunks)


def test_a_rank_can_run_a_step_alone_to_see_what_it_takes(tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", "llama-tied", EXITS)
    ranks = Threads(tmp_path, model, 2)
    decoders = ranks.decoders("reference")
    [chunks, *_] = mixed_steps(decoders[0].num_slabs)

    def run_alone(rank: int) -> Tensor:
        with ranks.groups[rank].alone():
            cache = decoders[rank].allocate_kv_cache(200, BLOCK_SIZE)
            return run_chunks(decoders[rank], cache, chunks)

    logits = [run_alone(rank) for rank in range(2)]

    num_rows = sum(chunk.samples for chunk in chunks)
    assert [list(each.shape) for each in logits] == [[num_rows, 288], [num_rows, 144]]
