"""The C++ kernels: built once, fall back when they cannot be built, and agree with plain torch."""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from sortserve.core.errors import ConfigError
from sortserve.core.user_cache import user_cache_dir
from sortserve.model.backend import Target
from sortserve.model.backends import choose_backend
from sortserve.model.backends.cpu import backend as cpu_backend
from sortserve.model.backends.cpu import library as native
from sortserve.model.backends.cpu.backend import CpuBackend
from sortserve.model.backends.cpu.library import (
    BuildError,
    NativeLibrary,
    build_library,
    load_native,
)
from sortserve.model.backends.cpu.linear import NativeLinear
from sortserve.model.backends.cpu.ops import NativeOps
from sortserve.model.backends.reference.ops import ReferenceOps
from sortserve.model.config import ModelConfig
from sortserve.model.decoder import Decoder
from sortserve.model.weight import Weight
from sortserve.model.weights import LayerWeights, ModelWeights
from support.batches import Chunk, Pages, random_ids, run_chunks

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


@pytest.fixture(name="library")
def _library() -> NativeLibrary:
    library = load_native()
    if library is None:
        pytest.skip("no C++ compiler")
    return library


@pytest.fixture(name="bf16_library")
def _bf16_library(library: NativeLibrary) -> NativeLibrary:
    if not library.has_bf16_kernels:
        pytest.skip("no AVX-512 BF16")
    return library


def make_native(library: NativeLibrary, dtype: torch.dtype = torch.float32) -> CpuBackend:
    return CpuBackend(Target(CONFIG, dtype, CPU), library)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- building


def make_compiler(tmp_path: Path, body: str) -> str:
    """A compiler that prints its version and otherwise runs ``body``, the output path in $out."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo 1.0\nfor out; do :; done\n' + body
    )
    compiler.chmod(0o755)
    return str(compiler)


def test_a_second_build_takes_the_library_from_the_cache(tmp_path: Path) -> None:
    compiler = make_compiler(tmp_path, 'echo run >> "$0.log"; echo library > "$out"\n')
    cache = tmp_path / "cache"
    library = build_library(cache, compiler)
    assert build_library(cache, compiler) == library
    assert library.read_text() == "library\n"
    assert list(cache.iterdir()) == [library]
    assert (tmp_path / "compiler.log").read_text() == "run\n"


def test_a_compiler_that_fails_is_a_build_error_and_leaves_nothing(tmp_path: Path) -> None:
    compiler = make_compiler(tmp_path, "echo 'x.cpp:1: error: out of ideas' >&2\nexit 1\n")
    cache = tmp_path / "cache"
    with pytest.raises(BuildError, match="out of ideas"):
        build_library(cache, compiler)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_no_library_is_a_build_error(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_text("nonsense")
    with pytest.raises(BuildError, match=r"cannot load .*kernels\.so"):
        NativeLibrary(path)


def test_without_a_compiler_the_message_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"g\+\+"):
        build_library(tmp_path)


def test_when_the_build_fails_plain_torch_is_used_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Path:
        raise BuildError("no compiler today")

    monkeypatch.setattr(native, "build_library", fail)
    load_native.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="sortserve"):
            decoder = make_decoder(torch.bfloat16)
            make_decoder(torch.bfloat16)
        assert [
            r.getMessage() for r in caplog.records if "no compiler today" in r.getMessage()
        ] == ["native CPU kernels are off, plain torch is used: no compiler today"]
        assert decoder.backend.name == "reference"
        with pytest.raises(ConfigError, match="--backend=cpu cannot be used for bfloat16"):
            make_decoder(torch.bfloat16, backend="cpu")
    finally:
        load_native.cache_clear()


def test_the_cache_folder_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SORTSERVE_CACHE_DIR", str(tmp_path / "ours"))
    assert user_cache_dir() == tmp_path / "ours"
    monkeypatch.delenv("SORTSERVE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / "sortserve"


@pytest.mark.slow
@pytest.mark.parametrize("march", ["haswell", "x86-64"])
def test_kernels_for_older_cpus_agree_with_those_for_this_one(
    library: NativeLibrary, tmp_path: Path, march: str
) -> None:
    """AVX2, and neither AVX nor fused multiply-add, on a machine that may have AVX-512."""
    if torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"} or not shutil.which("g++"):
        pytest.skip("needs an x86 CPU with AVX2, and g++")
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" -march={march}\n')
    compiler.chmod(0o755)
    older = NativeLibrary(build_library(tmp_path / "cache", str(compiler)))
    x, weight = random(40, 96), Weight.plain(random(70, 96, seed=1))
    for gated in (False, True):
        ours, theirs = (
            backend.gated(weight) if gated else backend.linear(weight)
            for backend in (make_native(lib) for lib in (library, older))
        )
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-4)
        for count in (1, 2, 5, 6, 7, 13):
            assert torch.equal(theirs(x[:count]), theirs(x)[:count])

    with pytest.MonkeyPatch.context() as patch:
        decoders = []
        for lib in (library, older):
            patch.setattr(cpu_backend, "load_native", lambda lib=lib: lib)
            decoders.append(make_decoder(torch.float32))
    expected, logits = (run_rows(decoder, ROWS, list(range(5))) for decoder in decoders)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for index, row in enumerate(ROWS):
        assert torch.equal(run_rows(decoders[1], [row], [index])[0], logits[index])


def test_the_kernels_join_the_openmp_runtime_that_torch_has_loaded(library: NativeLibrary) -> None:
    del library
    path = native._loaded_openmp()
    assert path is not None
    assert os.path.realpath(path).startswith(os.path.realpath(Path(torch.__file__).parents[1]))


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
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [s for s in SHAPES if s[1] % 2 == 0])
def test_native_bf16_layers_equal_plain_torch(
    bf16_library: NativeLibrary, num_tokens: int, num_outputs: int, num_inputs: int
) -> None:
    backend = make_native(bf16_library, torch.bfloat16)
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


def test_a_token_gets_the_same_bf16_bits_whatever_tokens_are_beside_it(
    bf16_library: NativeLibrary,
) -> None:
    weight = Weight.plain(random(96, 128, dtype=torch.bfloat16))
    op = make_native(bf16_library, torch.bfloat16).linear(weight)
    x = random(40, 128, seed=1, dtype=torch.bfloat16)
    together = op(x)
    for count in (1, 5, 12, 13, 39):
        assert torch.equal(op(x[:count]), together[:count])


def test_weights_of_odd_width_go_to_the_fallback(bf16_library: NativeLibrary) -> None:
    backend = make_native(bf16_library, torch.bfloat16)
    weight = Weight.plain(random(8, 5, dtype=torch.bfloat16))
    for op in (backend.linear(weight), backend.gated(weight), backend.head(weight)):
        assert not isinstance(op, NativeLinear)


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


ROWS = [(4, 0, 30), (4, 40, 1), (4, 9, 5), (2, 0, 11), (2, 21, 1)]
"""(exit, tokens cached before the step, tokens in the step)"""


def run_rows(decoder: Decoder, rows: list[tuple[int, int, int]], seeds: list[int]) -> Tensor:
    """The logits of one step over ``rows``, whose cached tokens ran in steps of their own."""
    cache, pages = decoder.allocate_kv_cache(256, 8), Pages(256)
    chunks = []
    for (exit_layer, start, count), seed in zip(rows, seeds, strict=True):
        ids = [i % 50 for i in random_ids(start + count, seed)]
        table = pages.table(exit_layer // decoder.slab_size, start + count)
        if start:
            run_chunks(decoder, cache, [Chunk(ids[:start], 0, exit_layer, table, samples=False)])
        chunks.append(Chunk(ids[start:], start, exit_layer, table))
    return run_chunks(decoder, cache, chunks)


def test_fused_layers_equal_single_operations_and_run_in_one_call_a_segment(
    bf16_library: NativeLibrary,
) -> None:
    fused = make_decoder(torch.bfloat16, backend="cpu", release_weights=True)
    plain = make_decoder(torch.bfloat16, backend="reference")
    seeds = list(range(len(ROWS)))
    before = bf16_library.calls.copy()
    got = run_rows(fused, ROWS, seeds)
    calls = bf16_library.calls - before
    # The mixed step has two segments; each of the three rows with a past ran one step before.
    assert calls["layers"] == 2 + 3
    assert calls["attention"] == 0
    expected = run_rows(plain, ROWS, seeds)
    assert bf16_library.calls["layers"] == before["layers"] + 5
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.08)


def test_in_bf16_a_row_gets_the_same_bits_alone_and_in_a_mixed_batch(
    bf16_library: NativeLibrary,
) -> None:
    del bf16_library  # the kernels are there
    decoder = make_decoder(torch.bfloat16, backend="cpu")
    seeds = list(range(len(ROWS)))
    mixed = run_rows(decoder, ROWS, seeds)
    for index, row in enumerate(ROWS):
        assert torch.equal(run_rows(decoder, [row], [index])[0], mixed[index])
