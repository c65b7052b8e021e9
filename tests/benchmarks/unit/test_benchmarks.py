"""The benchmarks' own parsers and statistics: a wrong ruler measures nothing."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks.lib.common import environment, metric_total, percentile, summarise
from benchmarks.lib.floors import Machine, ModelCost, Work, figure, speedups
from benchmarks.lib.http_parse import ResponseParser
from benchmarks.lib.neighbours import Neighbours
from benchmarks.lib.workload import (
    ExitMix,
    PromptMaker,
    RequestMaker,
    RequestSpec,
    fixed_arrivals,
    load_trace,
    poisson_arrivals,
)
from benchmarks.serving import parse_arguments

from sortserve.model.config import ModelConfig
from sortserve.model.exit_module import Affine
from sortserve.model.weight import Weight
from sortserve.model.weights import ExitModuleWeights, LayerWeights, ModelWeights

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Name: v\r\n\r\n"
    b"5\r\nhello\r\n7;ext=1\r\n, world\r\n0\r\n\r\n"
)


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


# Statistics


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        pytest.param([7.0], 0.99, 7.0, id="one-value-is-every-percentile"),
        pytest.param([3.0, 1.0, 2.0], 0.5, 2.0, id="order-does-not-matter"),
        pytest.param([0.0, 10.0], 0.9, 9.0, id="linear-between-neighbours"),
        pytest.param([1.0, 2.0, 3.0, 4.0], 1.0, 4.0, id="all-is-the-maximum"),
    ],
)
def test_percentile(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == pytest.approx(expected)


def test_metrics_are_summed_over_their_labels() -> None:
    text = 'a_b{x="1"} 2.0\na_b{x="2"} 3.0\na_bc 7\nd 1\n'

    assert metric_total(text, "a_b") == 5.0
    assert metric_total(text, "missing") is None


def test_no_values_have_no_summary() -> None:
    assert summarise([]) is None
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_environment_is_plain_json() -> None:
    described = json.loads(json.dumps(environment()))

    assert described["cpu"]
    assert described["num_cores"] >= 1


# Parsers


def test_a_chunked_response_is_the_same_however_it_is_cut() -> None:
    for size in range(1, len(CHUNKED) + 1):
        parser = ResponseParser()

        body = b"".join(parser.feed(piece) for piece in in_pieces(CHUNKED, size))

        assert (parser.status, body, parser.complete) == (200, b"hello, world", True)
        assert parser.headers["x-name"] == "v"


def test_a_body_of_known_length_ends_there() -> None:
    parser = ResponseParser()

    body = parser.feed(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 3\r\n\r\nab")

    assert (body, parser.complete) == (b"ab", False)
    assert parser.feed(b"c") == b"c"
    assert parser.complete


def test_a_body_of_unknown_length_ends_with_the_connection() -> None:
    parser = ResponseParser()

    body = parser.feed(b"HTTP/1.1 200 OK\r\n\r\nabc")
    assert not parser.complete
    parser.feed_eof()

    assert (body, parser.complete) == (b"abc", True)


def test_an_interim_response_is_skipped() -> None:
    parser = ResponseParser()

    parser.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")

    assert (parser.status, parser.complete) == (204, True)


# Workload


def test_the_exit_mix_is_spread_evenly_over_clients() -> None:
    assert ExitMix.parse("9:0.5,30:0.5").spread(4) == [9, 30, 9, 30]
    assert ExitMix.parse("9:3,30:1").spread(8).count(9) == 6
    assert ExitMix().spread(2) == [None, None]


@pytest.mark.parametrize("text", ["", "nine", "9:x", "9:0", "9:-1", "0:1", "9:nan"])
def test_a_bad_exit_mix_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - int's, float's or our own message
        ExitMix.parse(text)


def test_drawn_exits_follow_the_shares() -> None:
    rng = random.Random(0)

    drawn = [ExitMix.parse("9:0.9,30:0.1").draw(rng) for _ in range(500)]

    assert 400 < drawn.count(9) < 490  # 450 +- 6.7; six standard deviations


def test_prompts_have_exact_lengths_and_differ_after_the_shared_prefix() -> None:
    prompts = PromptMaker(random.Random(0), vocab_size=32000, shared_prefix=8)

    first, second = prompts.make(64), prompts.make(64)

    assert len(first) == len(second) == 64
    assert first[:8] == second[:8]
    assert first[8:] != second[8:]
    assert len(prompts.make(4)) == 4


def test_a_request_asks_for_its_exit_and_its_full_length() -> None:
    prompts = PromptMaker(random.Random(0), vocab_size=200)
    maker = RequestMaker(
        model="m", prompts=prompts, budget={"latency_ms": 5}, extra_body={"top_k": 1}
    )

    body = json.loads(maker.make(RequestSpec(num_prompt_tokens=3, num_output_tokens=7), 9))

    assert body["budget"] == {"latency_ms": 5, "exit_layer": 9}
    assert (body["max_tokens"], body["ignore_eos"], body["top_k"]) == (7, True, 1)
    assert all(100 <= token_id < 200 for token_id in body["prompt"])


def test_poisson_arrivals_come_at_their_rate() -> None:
    times = list(itertools.islice(poisson_arrivals(4.0, random.Random(0)), 2001))

    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.15)  # standard deviation 2.2 %


def test_fixed_arrivals_do_not_drift() -> None:
    assert list(itertools.islice(fixed_arrivals(10), 4)) == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_trace_starts_at_zero_and_is_scaled_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"t": 10, "prompt_tokens": 500, "output_tokens": 3}\n\n'
        '{"t": 14, "prompt_tokens": 20, "output_tokens": 900}\n'
        '{"t": 15, "prompt_tokens": 1, "output_tokens": 1}\n'
    )

    specs = load_trace(path, num_requests=2, speed=2.0, max_prompt_tokens=100, max_output_tokens=50)

    assert specs == [
        RequestSpec(due_s=0.0, num_prompt_tokens=100, num_output_tokens=3),
        RequestSpec(due_s=2.0, num_prompt_tokens=20, num_output_tokens=50),
    ]


def test_a_bad_trace_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"t": 1, "prompt_tokens": 5, "output_tokens": 3}\n{"t": 2}\n')

    with pytest.raises(ValueError, match=r"trace\.jsonl:2 is not a trace line"):
        load_trace(path)


def test_a_load_without_an_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--num-clients", "2"])
    assert "--num-requests or --duration" in capsys.readouterr().err


# Floors


def tiny_cost(*, affine_exit: int | None = None) -> ModelCost:
    """Two layers, hidden 8, 2 query heads and 1 key/value head of 4, intermediate 16, fp32."""
    config = ModelConfig(
        family="llama",
        num_layers=2,
        hidden_size=8,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=10,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )

    def zeros(*shape: int) -> Weight:
        return Weight.plain(torch.zeros(shape))

    embed = torch.zeros(10, 8)
    layer = LayerWeights(
        input_norm=torch.zeros(8),
        qkv=zeros(16, 8),
        o=zeros(8, 8),
        post_attention_norm=torch.zeros(8),
        gate_up=zeros(32, 8),
        down=zeros(8, 16),
    )
    module = ExitModuleWeights(
        kind=Affine,
        tensors={"norm.weight": torch.zeros(8), "affine.weight": torch.zeros(8, 8)},
    )
    return ModelCost(
        config,
        ModelWeights(
            embed=embed,
            layers=[layer, layer],
            final_norm=torch.zeros(8),
            lm_head=Weight.plain(embed),
            inv_freq=torch.zeros(2),
            exit_modules={} if affine_exit is None else {affine_exit: module},
        ),
    )


LAYER_PARAMETERS = 16 * 8 + 8 * 8 + 32 * 8 + 8 * 16
HEAD_PARAMETERS = 10 * 8


def test_a_decode_step_reads_its_weights_once_and_every_rows_cache() -> None:
    work = tiny_cost().decode(1, num_rows=3, context_len=5)

    assert work.num_bytes == 4 * (LAYER_PARAMETERS + 2 * 8 + HEAD_PARAMETERS + 3 * 5 * 2 * 4)
    assert work.num_flops == 3 * 2 * (LAYER_PARAMETERS + HEAD_PARAMETERS) + 3 * 5 * 4 * 8


def test_an_exit_module_is_counted_at_its_exit_only() -> None:
    cost = tiny_cost(affine_exit=1)
    plain = tiny_cost()

    extra = cost.decode(1, num_rows=1, context_len=1).num_flops
    assert extra - plain.decode(1, num_rows=1, context_len=1).num_flops == 2 * 8 * 8
    assert cost.decode(2, num_rows=1, context_len=1) == plain.decode(2, num_rows=1, context_len=1)


def test_a_prefill_passes_the_head_once() -> None:
    work = tiny_cost().prefill(2, num_tokens=4)

    pairs = 1 + 2 + 3 + 4
    assert work.num_flops == 2 * (4 * 2 * LAYER_PARAMETERS + HEAD_PARAMETERS + pairs * 4 * 8)


def test_a_figure_stands_beside_the_larger_floor() -> None:
    machine = Machine(copy_bytes_per_s=50.0, read_bytes_per_s=100.0, gemm_flops_per_s=1000.0)

    at = figure(2.0, num_tokens=8, work=Work(num_bytes=100, num_flops=500), machine=machine)

    assert at["memory_floor_ms"] == 1000
    assert at["compute_floor_ms"] == 500
    assert at["percent_of_floor"] == 50
    assert at["tokens_per_s"] == 4


def test_the_ideal_speedup_is_the_ratio_of_the_floors() -> None:
    machine = Machine(copy_bytes_per_s=1.0, read_bytes_per_s=1.0, gemm_flops_per_s=1.0)
    shallow = figure(0.5, num_tokens=1, work=Work(0.25, 0.0), machine=machine)
    full = figure(2.0, num_tokens=1, work=Work(1.25, 0.0), machine=machine)

    assert speedups({9: shallow, 30: full})[9] == {
        "ideal": 5.0,
        "measured": 4.0,
        "share_of_ideal": 0.8,
    }


def test_neighbours_keep_as_many_cores_busy_as_asked() -> None:
    with Neighbours("spin", 1.5) as neighbours:
        assert neighbours.shares == [1.0, 0.5]
        assert all(process.poll() is None for process in neighbours.processes)
    assert all(process.poll() is not None for process in neighbours.processes)
