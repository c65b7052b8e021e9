"""The C++ kernels, every instance of them, agree with plain torch; without them it is used."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from sortserve.core.errors import ConfigError
from sortserve.model.backend import Target
from sortserve.model.backends import choose_backend
from sortserve.model.backends.cpu import backend as cpu_backend
from sortserve.model.backends.cpu.arena import Arena
from sortserve.model.backends.cpu.backend import CpuBackend
from sortserve.model.backends.cpu.library import NativeLibrary
from sortserve.model.backends.cpu.linear import NativeLinear, Output
from sortserve.model.backends.cpu.ops import NativeOps
from sortserve.model.backends.reference.ops import ReferenceOps
from sortserve.model.config import ModelConfig
from sortserve.model.decoder import Decoder
from sortserve.model.weight import Weight
from sortserve.model.weights import LayerWeights, ModelWeights
from support.batches import Chunk, Pages, random_ids, run_chunks
from support.native import INSTANCES, force_isa

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    family="qwen3",
    num_layers=4,
    hidden_size=64,
    intermediate_size=100,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=50,
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    qk_norm=True,
)


@pytest.fixture(name="library", params=list(INSTANCES))
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeLibrary:
    return force_isa(request.param, monkeypatch)


def make_native(library: NativeLibrary, dtype: torch.dtype = torch.float32) -> CpuBackend:
    return CpuBackend(Target(CONFIG, dtype, CPU), library)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_where_there_are_no_kernels_plain_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "load_native", lambda: None)
    assert make_decoder(torch.bfloat16).backend.name == "reference"
    with pytest.raises(ConfigError, match="--backend=cpu cannot be used for bfloat16"):
        make_decoder(torch.bfloat16, backend="cpu")


# ---- norms and gates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 37), (200, 576)])
def test_native_norms_and_gates_equal_plain_torch(
    library: NativeLibrary, rows: int, width: int, dtype: torch.dtype
) -> None:
    fast, plain, tolerance = NativeOps(library), ReferenceOps(), DTYPES[dtype]
    h, delta = random(rows, width, dtype=dtype), random(rows, width, seed=1, dtype=dtype)
    weight, expected_h = random(width, seed=2, dtype=dtype), h.clone()
    before = library.calls.copy()
    torch.testing.assert_close(
        fast.rms_norm(h, weight, 1e-5),
        plain.rms_norm(h, weight, 1e-5),
        rtol=tolerance,
        atol=tolerance,
    )
    expected = plain.add_rms_norm(expected_h, delta, weight, 1e-5)
    torch.testing.assert_close(
        fast.add_rms_norm(h, delta, weight, 1e-5), expected, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(h, expected_h, rtol=tolerance, atol=tolerance)
    both = random(rows, 2 * width, seed=3, dtype=dtype) * 30  # far into both tails of silu
    torch.testing.assert_close(
        fast.silu_and_mul(both), plain.silu_and_mul(both), rtol=tolerance, atol=tolerance
    )
    assert library.calls - before == {"add_rms_norm": 2, "silu_and_mul": 1}


def test_tensors_that_the_kernels_cannot_take_go_to_plain_torch(library: NativeLibrary) -> None:
    before = library.calls.copy()
    x = random(4, 6, dtype=torch.float64)
    y = NativeOps(library).rms_norm(x, torch.ones(6, dtype=torch.float64), 1e-5)
    torch.testing.assert_close(y, ReferenceOps().rms_norm(x, torch.ones(6).double(), 1e-5))
    assert library.calls == before


# ---- linear layers


SHAPES = [(32, 64), (70, 36), (8, 2), (18, 7), (576, 576)]
"""(outputs, inputs)"""


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 12, 13, 32, 100])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_native_fp32_layers_equal_plain_torch(
    library: NativeLibrary, num_tokens: int, num_outputs: int, num_inputs: int
) -> None:
    backend = make_native(library)
    x, bias = random(num_tokens, num_inputs), random(num_outputs, seed=2)
    weight_OI = random(num_outputs, num_inputs, seed=1) / num_inputs**0.5
    weight, exact = Weight.plain(weight_OI), linear(x, weight_OI)
    gate, up = (exact + bias).chunk(2, dim=-1)
    calls = library.calls["linear_fp32"]

    for got, expected in [
        (backend.linear(weight)(x), exact),
        (backend.linear(weight, bias)(x), exact + bias),
        (backend.gated(weight, bias)(x), silu(gate) * up),
        (backend.head(weight)(x), exact),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert library.calls["linear_fp32"] == calls + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [*SHAPES, (33, 5)])
def test_a_packed_matrix_gives_back_the_rows_that_it_was_made_of(
    library: NativeLibrary, num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> None:
    weight_OI = random(num_outputs, num_inputs, dtype=dtype)
    packed = NativeLinear(library, Arena(), Weight.plain(weight_OI), None, Output.FP32, dtype)
    outputs = torch.tensor([num_outputs - 1, 0, 3, 3, num_outputs // 2])

    assert torch.equal(packed.rows(outputs), weight_OI[outputs])
    assert packed.rows(outputs[:0]).shape == (0, num_inputs)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_token_gets_the_same_fp32_bits_at_any_place_among_any_number_of_tokens(
    library: NativeLibrary, num_outputs: int, num_inputs: int
) -> None:
    backend = make_native(library)
    x = random(100, num_inputs) * 10
    weight_OI = random(num_outputs, num_inputs, seed=1)
    weight = Weight.plain(weight_OI)
    for op in (
        backend.linear(weight, weight_OI[:, 0]),
        backend.gated(weight),
        backend.head(weight),
    ):
        alone = torch.cat([op(x[t : t + 1]) for t in range(100)])
        for count in (*range(2, 28), 100):
            assert torch.equal(op(x[:count]), alone[:count])
            assert torch.equal(op(x[-count:]), alone[-count:])


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 12, 13, 32, 100])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_native_bf16_layers_equal_plain_torch(
    library: NativeLibrary, num_tokens: int, num_outputs: int, num_inputs: int
) -> None:
    backend = make_native(library, torch.bfloat16)
    x = random(num_tokens, num_inputs, dtype=torch.bfloat16)
    weight_OI = (random(num_outputs, num_inputs, seed=1) / num_inputs**0.5).bfloat16()
    weight, bias = Weight.plain(weight_OI), random(num_outputs, seed=2, dtype=torch.bfloat16)
    exact = linear(x.float(), weight_OI.float())
    exact_biased = exact + bias.float()
    gate, up = exact_biased.chunk(2, dim=-1)

    assert_bf16_close(backend.linear(weight)(x), exact)
    assert_bf16_close(backend.linear(weight, bias)(x), exact_biased)
    assert_bf16_close(backend.gated(weight, bias)(x), silu(gate) * up)
    logits = backend.head(weight)(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)


def assert_bf16_close(got: Tensor, exact: Tensor) -> None:
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_token_gets_the_same_bf16_bits_at_any_place_among_any_number_of_tokens(
    library: NativeLibrary, num_outputs: int, num_inputs: int
) -> None:
    backend = make_native(library, torch.bfloat16)
    x = random(100, num_inputs, seed=1, dtype=torch.bfloat16)
    weight_OI = random(num_outputs, num_inputs, dtype=torch.bfloat16)
    weight = Weight.plain(weight_OI)
    for op in (
        backend.linear(weight, weight_OI[:, 0]),
        backend.gated(weight),
        backend.head(weight),
    ):
        alone = torch.cat([op(x[t : t + 1]) for t in range(100)])
        for count in (*range(2, 28), 100):
            assert torch.equal(op(x[:count]), alone[:count])
            assert torch.equal(op(x[-count:]), alone[-count:])


def test_a_token_of_odd_width_takes_nothing_from_the_one_behind_it(library: NativeLibrary) -> None:
    op = make_native(library, torch.bfloat16).linear(
        Weight.plain(random(8, 7, dtype=torch.bfloat16))
    )
    x = random(2, 7, seed=1, dtype=torch.bfloat16)
    expected = op(x[:1])
    x[1] = math.nan
    assert torch.equal(op(x)[:1], expected)


def test_fp16_products_are_left_to_plain_torch(library: NativeLibrary) -> None:
    before = library.calls.copy()
    op = make_native(library, torch.float16).linear(Weight.plain(random(8, 6).half()))
    torch.testing.assert_close(
        op(random(3, 6, seed=1).half()), linear(random(3, 6, seed=1).half(), random(8, 6).half())
    )
    assert library.calls == before


# ---- the decoder on top of them


def make_decoder(
    dtype: torch.dtype,
    *,
    release_weights: bool = False,
    backend: str = "auto",
) -> Decoder:
    weights = random_weights(CONFIG, dtype)
    decoder = Decoder(
        CONFIG,
        weights,
        exits=(2, 4),
        max_model_len=256,
        release_weights=release_weights,
        backend=choose_backend(CONFIG, dtype, CPU, backend),
    )
    matrices = [weights.lm_head] + [m for w in weights.layers for m in (w.qkv, w.gate_up, w.down)]
    assert all((matrix.nbytes == 0) == release_weights for matrix in matrices)
    return decoder


def random_weights(config: ModelConfig, dtype: torch.dtype) -> ModelWeights:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).div(math.sqrt(columns)).to(dtype)

    def weight(rows: int, columns: int) -> Weight:
        return Weight.plain(matrix(rows, columns))

    def norm(width: int) -> Tensor:
        return (1 + 0.2 * torch.randn(width, generator=generator)).to(dtype)

    hidden, mlp = config.hidden_size, config.intermediate_size
    layers = [
        LayerWeights(
            input_norm=norm(hidden),
            qkv=weight(config.q_size + 2 * config.kv_size, hidden),
            q_norm=norm(config.head_dim),
            k_norm=norm(config.head_dim),
            o=weight(hidden, config.q_size),
            post_attention_norm=norm(hidden),
            gate_up=weight(2 * mlp, hidden),
            down=weight(hidden, mlp),
        )
        for _ in range(config.num_layers)
    ]
    half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return ModelWeights(
        embed=matrix(config.vocab_size, hidden),
        layers=layers,
        final_norm=norm(hidden),
        lm_head=weight(config.vocab_size, hidden),
        inv_freq=10_000.0**-half,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_that_is_embedding_and_head_is_in_memory_once(
    library: NativeLibrary, dtype: torch.dtype
) -> None:
    del library  # the kernels are there
    weights = random_weights(CONFIG, dtype)
    weights.lm_head = Weight.plain(weights.embed)
    matrix, rows = weakref.ref(weights.embed), weights.embed.clone()
    decoder = Decoder(
        CONFIG,
        weights,
        exits=(2, 4),
        max_model_len=256,
        release_weights=True,
        backend=choose_backend(CONFIG, dtype, CPU, "cpu"),
    )

    assert matrix() is None
    tokens = torch.tensor([3, 0, CONFIG.vocab_size - 1, 3])
    assert torch.equal(decoder.embed(tokens)[0], rows[tokens])


ROWS = [(4, 0, 30), (4, 40, 1), (4, 9, 5), (2, 0, 11), (2, 21, 1)]
"""(exit, tokens cached before the step, tokens in the step)"""


def run_rows(decoder: Decoder, rows: list[tuple[int, int, int]], seeds: list[int]) -> Tensor:
    """The logits of one step over ``rows``, whose cached tokens ran in steps of their own."""
    cache, pages = decoder.allocate_kv_cache(256, 8), Pages(256)
    chunks = []
    for (exit_layer, start, count), seed in zip(rows, seeds, strict=True):
        ids = [i % 50 for i in random_ids(start + count, seed)]
        table = pages.table(decoder.slabs.count(exit_layer), start + count)
        if start:
            run_chunks(decoder, cache, [Chunk(ids[:start], 0, exit_layer, table, samples=False)])
        chunks.append(Chunk(ids[start:], start, exit_layer, table))
    return run_chunks(decoder, cache, chunks)


def test_fused_layers_equal_single_operations_and_run_in_one_call_a_segment(
    library: NativeLibrary,
) -> None:
    fused = make_decoder(torch.bfloat16, backend="cpu", release_weights=True)
    plain = make_decoder(torch.bfloat16, backend="reference")
    seeds = list(range(len(ROWS)))
    before = library.calls.copy()
    got = run_rows(fused, ROWS, seeds)
    calls = library.calls - before
    # The mixed step has two segments; each of the three rows with a past ran one step before.
    assert calls["layers"] == 2 + 3
    assert calls["attention"] == 0
    expected = run_rows(plain, ROWS, seeds)
    assert library.calls["layers"] == before["layers"] + 5
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.08)


def test_in_bf16_a_row_gets_the_same_bits_alone_and_in_a_mixed_batch(
    library: NativeLibrary,
) -> None:
    del library  # the kernels are there
    decoder = make_decoder(torch.bfloat16, backend="cpu")
    seeds = list(range(len(ROWS)))
    mixed = run_rows(decoder, ROWS, seeds)
    for index, row in enumerate(ROWS):
        assert torch.equal(run_rows(decoder, [row], [index])[0], mixed[index])
