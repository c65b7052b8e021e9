"""The comparison with other servers, as far as no other server is needed for it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks.lib.loadgen import RequestRecord, Run
from benchmarks.lib.server_process import ServerStartError
from benchmarks.peers.__main__ import parse_arguments
from benchmarks.peers.catalogue import (
    CONFIGURATIONS,
    WITHOUT_AVX512,
    Configuration,
    Launch,
    Where,
    choose,
)
from benchmarks.peers.floor import Ceiling, ModelSize, Rates, ceiling, model_size, read_rates
from benchmarks.peers.install import InstallError, Step, cmake_flags, num_bytes, plan, run_steps
from benchmarks.peers.journal import Journal
from benchmarks.peers.layout import Layout
from benchmarks.peers.measure import figures, num_requests, read_run
from benchmarks.peers.openvino_load import Load
from benchmarks.peers.process_facts import avx512_threads, memory_bytes, parse_elapsed_ms
from benchmarks.peers.run import take_turns
from benchmarks.peers.table import Measured, Row, print_rows, summarise_rows


def where(tmp_path: Path, isa: str = "native") -> Where:
    return Where(Layout(tmp_path), port=8123, isa=isa, num_threads=2)


# Names and command lines


def test_a_name_is_a_configuration_a_peer_or_all() -> None:
    assert [c.name for c in choose(["llamacpp-q8_0"])] == ["llamacpp-q8_0"]
    assert [c.name for c in choose(["openvino"])] == ["openvino-fp16", "openvino-int8"]
    assert len(choose(["all"])) == len(CONFIGURATIONS)


def test_the_order_is_the_tables_and_nobody_comes_twice() -> None:
    names = [c.name for c in choose(["vllm", "sortserve-bf16", "vllm-bf16"])]

    assert names == ["sortserve-bf16", "vllm-bf16"]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'ollama' is unknown; choose from .*vllm-bf16"):
        choose(["ollama"])
    with pytest.raises(SystemExit):
        parse_arguments(["run", "--peers", "ollama"])


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_a_server_gets_its_port_and_its_threads(name: str, tmp_path: Path) -> None:
    configuration = CONFIGURATIONS[name]
    launch = configuration.launch(where(tmp_path))
    words = list(launch.command)

    assert launch.forced_by is None
    if not configuration.in_process:
        assert words[words.index("--port") + 1] == "8123"
    threads = launch.env.get("VLLM_CPU_OMP_THREADS_BIND")
    assert threads == "0-1" or "2" in [words[i + 1] for i, w in enumerate(words) if "threads" in w]


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_avx2_is_forced_on_every_peer_in_its_own_way(name: str, tmp_path: Path) -> None:
    launch = CONFIGURATIONS[name].launch(where(tmp_path, "avx2"))

    assert launch.forced_by
    assert launch.env["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert "-AVX512F" in launch.env["GLIBC_TUNABLES"]


def test_avx2_means_for_us_our_own_variable(tmp_path: Path) -> None:
    launch = CONFIGURATIONS["sortserve-bf16"].launch(where(tmp_path, "avx2"))

    assert launch.env["SORTSERVE_CPU_ISA"] == "avx2"


def test_avx2_means_for_llamacpp_another_build(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    program = CONFIGURATIONS["llamacpp-bf16"].launch(where(tmp_path, "avx2")).command[0]

    assert Path(program).parent == layout.llama_bin("avx2") != layout.llama_bin("native")
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF", "-DGGML_AVX2=ON"} < set(cmake_flags("avx2"))
    assert "-DGGML_NATIVE=ON" in cmake_flags("native")


def test_vllm_does_without_the_allocator_that_is_not_there(tmp_path: Path) -> None:
    vllm = CONFIGURATIONS["vllm-bf16"].launch
    assert vllm(where(tmp_path)).env["LD_PRELOAD"] == ""

    library = Layout(tmp_path).tcmalloc
    library.parent.mkdir(parents=True)
    library.touch()
    assert vllm(where(tmp_path)).env["LD_PRELOAD"] == str(library.resolve())


def test_vllm_is_told_of_no_avx512_by_torch(tmp_path: Path) -> None:
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "__init__.py").write_text("from torch import cpu")
    (folder / "cpu.py").write_text(
        "def get_capabilities():\n"
        "    return {'avx2': True, 'avx512_f': True, 'amx_tile': True, 'cpu_name': 'x'}\n"
    )
    program = "import torch; print(torch.cpu.get_capabilities())"
    env = os.environ | {"PYTHONPATH": f"{WITHOUT_AVX512}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)

    assert done.stdout.strip() == str(
        {"avx2": True, "avx512_f": False, "amx_tile": False, "cpu_name": "x"}
    ), done.stderr


# Set-up


def test_each_peer_has_an_environment_of_its_own_and_all_have_the_same_model(
    tmp_path: Path,
) -> None:
    steps = {step.name: step for step in plan(Layout(tmp_path), ["vllm", "openvino", "llamacpp"])}

    assert {"model", "vllm-venv", "openvino-venv", "llamacpp-native", "llamacpp-avx2"} <= set(steps)
    assert steps["vllm-venv"].folders != steps["openvino-venv"].folders
    assert steps["openvino-int8"].inputs == steps["llamacpp-q4_1"].inputs
    assert next(iter(steps)) == "model"


def scripted_step(name: str, calls: list[str], *, fails: bool = False, **inputs: Any) -> Step:
    def run(log: Path) -> None:
        calls.append(name)
        if fails:
            raise InstallError("the compiler said no")

    return Step(name, inputs, [], run)


def test_what_is_done_is_not_done_again_unless_its_inputs_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, calls = Layout(tmp_path), list[str]()
    for version in (1, 1, 2):
        assert run_steps(layout, [scripted_step("a-venv", calls, version=version)])

    assert calls == ["a-venv", "a-venv"]
    assert "a-venv: was there" in capsys.readouterr().out


def test_a_peer_that_cannot_be_set_up_does_not_keep_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = list[str]()
    steps = [
        scripted_step("a-venv", calls, fails=True),
        scripted_step("a-weights", calls),
        scripted_step("b-venv", calls),
    ]

    assert not run_steps(Layout(tmp_path), steps)
    assert calls == ["a-venv", "b-venv"]
    assert "a-venv: failed: the compiler said no" in capsys.readouterr().err
    assert not Layout(tmp_path).stamp("a-venv").exists()


def test_disk_use_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to("folder/file")

    assert num_bytes(tmp_path) == 1000
    assert num_bytes(tmp_path / "missing") == 0


# Floors


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_counted_once_whether_tied_or_not(tmp_path: Path, tied: bool) -> None:
    shapes = {
        "model.embed_tokens.weight": [100, 8],
        "model.layers.0.mlp.up_proj.weight": [16, 8],
        "model.norm.weight": [8],
    }
    shapes |= {} if tied else {"lm_head.weight": [100, 8]}
    header = json.dumps({"__metadata__": {}} | {n: {"shape": s} for n, s in shapes.items()})
    data = struct.pack("<Q", len(header)) + header.encode()
    (tmp_path / "model.safetensors").write_bytes(data)

    assert model_size(tmp_path) == ModelSize(num_trunk=128, num_head=800)


def bounded(num_clients: int) -> Ceiling:
    """10 weights of 2 bytes, 20 bytes a second, 100 products of 2 FLOPs a second."""
    return ceiling(
        Rates(20.0, {16: 200.0}),
        ModelSize(num_trunk=9, num_head=1),
        bits_per_weight=16,
        bits=16,
        num_clients=num_clients,
        prompt_tokens=11,
        output_tokens=3,
    )


def test_few_clients_are_bounded_by_memory() -> None:
    # The prompt: 11 * 9 + 1 = 100 products take 1 s. Two steps read 20 bytes each, 1 s.
    assert bounded(1) == Ceiling(1000.0, 100.0, tokens_per_s=1.0)


def test_many_clients_are_bounded_by_arithmetic() -> None:
    # 20 clients: the prompts take 20 s, two steps 20 * 10 products, 2 s each.
    assert bounded(20) == Ceiling(1000.0, 2000.0, tokens_per_s=2.5)


def test_rates_are_read_from_the_last_line() -> None:
    text = 'a warning\n{"bytes_per_s": 3.0, "flops_per_s": {"16": 5.0, "8": 6.0}}\n'

    assert read_rates(text) == Rates(3.0, {16: 5.0, 8: 6.0})


# Loads


@pytest.mark.parametrize(("num_clients", "expected"), [(1, 3), (8, 24), (32, 64)])
def test_every_client_sends_a_few_requests(num_clients: int, expected: int) -> None:
    assert num_requests(num_clients) == expected


def record(times_s: Sequence[float], **more: Any) -> RequestRecord:
    return RequestRecord(
        exit_layer=None,
        due_s=0.0,
        sent_s=0.0,
        chunk_times_s=list(times_s),
        num_output_tokens=len(times_s),
        status=200,
        **more,
    )


def test_answers_that_were_cut_count_for_throughput_and_not_for_times() -> None:
    run = Run(
        records=[record([1.0, 2.0, 4.0]), record([9.0], cut=True)],
        started_s=0.0,
        ended_s=10.0,
        cpu_s=0.5,
    )

    found = figures(run)

    assert found["output_tokens_per_s"] == pytest.approx(0.4)
    assert found["ttft_p50_ms"] == 1000.0
    assert found["tpot_p50_ms"] == 1500.0
    assert (found["num_finished"], found["num_cut"]) == (1, 1)


def test_nothing_answered_has_no_times() -> None:
    run = Run(records=[record([], error="gone")], started_s=0.0, ended_s=1.0, cpu_s=0.0)

    found = figures(run)

    assert (found["ttft_p50_ms"], found["output_tokens_per_s"]) == (None, 0.0)
    assert found["errors"] == ["gone"]


@pytest.mark.parametrize("line", ["", "Segmentation fault", "{}", '{"records": [{"x": 1}]}'])
def test_a_process_that_prints_no_load_is_an_error(line: str) -> None:
    with pytest.raises(ServerStartError, match="printed no load"):
        read_run(line)


class ScriptedPipeline:
    """OpenVINO's pipeline as far as the load knows it: one token a step for every request."""

    def __init__(self) -> None:
        self.handles: list[ScriptedHandle] = []
        self.most_at_once = 0

    def add_request(self, number: int, prompt: Any, config: Any) -> ScriptedHandle:
        assert number == len(self.handles)
        self.handles.append(ScriptedHandle(config.max_new_tokens))
        return self.handles[-1]

    def step(self) -> None:
        running = [handle for handle in self.handles if handle.left]
        self.most_at_once = max(self.most_at_once, len(running))
        for handle in running:
            handle.left -= 1
            handle.unread.append(7)

    def has_non_finished_requests(self) -> bool:
        return any(handle.left for handle in self.handles)


class ScriptedHandle:
    def __init__(self, num_tokens: int) -> None:
        self.left = num_tokens
        self.unread: list[int] = []

    def can_read(self) -> bool:
        return bool(self.unread)

    def read(self) -> dict[int, Any]:
        tokens, self.unread = self.unread, []
        return {0: argparse.Namespace(generated_ids=tokens)}

    def stop(self) -> None:
        self.left = 0


def scripted_modules() -> tuple[Any, Any, Any]:
    genai = argparse.Namespace(GenerationConfig=argparse.Namespace)
    openvino = argparse.Namespace(Tensor=list)
    numpy = argparse.Namespace(array=lambda ids, dtype: ids, int64=None)
    return genai, openvino, numpy


def wanted(**changes: Any) -> dict[str, Any]:
    plain = {"num_clients": 2, "num_requests": 5, "prompt_tokens": 4, "output_tokens": 3}
    return plain | {"max_seconds": 60.0, "seed": 1, "vocab_size": 200} | changes


def test_the_load_in_process_keeps_every_client_busy_until_all_is_sent() -> None:
    pipeline = ScriptedPipeline()

    run = read_run(json.dumps(Load(pipeline, scripted_modules(), wanted()).run()))

    assert pipeline.most_at_once == 2
    assert [r.num_output_tokens for r in run.records] == [3] * 5
    assert all(r.ok and len(r.chunk_times_s) == 3 for r in run.records)


def test_the_load_in_process_is_cut_when_its_time_is_up() -> None:
    pipeline = ScriptedPipeline()

    run = read_run(json.dumps(Load(pipeline, scripted_modules(), wanted(max_seconds=0.0)).run()))

    assert [r.cut for r in run.records] == [True, True]
    assert not pipeline.has_non_finished_requests()


# What the kernel tells


def write_process(proc: Path, pid: int, parent: int, kib: int, elapsed_ms: Sequence[int]) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    for thread, elapsed in enumerate(elapsed_ms):
        (folder / "task" / str(pid + thread)).mkdir(parents=True)
        status = folder / "task" / str(pid + thread) / "arch_status"
        status.write_text(f"AVX512_elapsed_ms:\t{elapsed}\n")
    (folder / "stat").write_text(f"{pid} (a (name) b) S {parent} 1 1")
    (folder / "smaps_rollup").write_text(f"Rss: 999 kB\nPss:      {kib} kB\nPss_Dirty: 1 kB\n")


def test_a_server_is_itself_and_all_below_it(tmp_path: Path) -> None:
    write_process(tmp_path, 100, 1, 10, [-1, 40])
    write_process(tmp_path, 200, 100, 20, [50, 9000])
    write_process(tmp_path, 300, 200, 30, [-1])
    write_process(tmp_path, 400, 1, 40, [5])

    assert memory_bytes(100, tmp_path) == 60 * 1024
    assert avx512_threads(100, 100.0, tmp_path) == 2


def test_a_kernel_that_does_not_tell_is_no_proof(tmp_path: Path) -> None:
    write_process(tmp_path, 100, 1, 10, [])

    assert avx512_threads(100, 100.0, tmp_path) is None
    assert parse_elapsed_ms("") is None


# The journal and the table


def measured(
    name: str, tokens_per_s: float, *, num_clients: int = 1, turn: int = 0, **more: Any
) -> Measured:
    return Measured(
        configuration=name,
        num_clients=num_clients,
        turn=turn,
        figures={"output_tokens_per_s": tokens_per_s} | more,
    )


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"commit": "a"}).add(measured("vllm-bf16", 5.0))
    with path.open("a") as file:
        file.write('{"circumstances": {"comm')

    again = Journal(path, {"commit": "a"})

    assert again.has("vllm-bf16", 1, 0)
    assert not again.has("vllm-bf16", 1, 1)
    assert again.measured == [measured("vllm-bf16", 5.0)]


def test_what_was_measured_of_another_commit_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"commit": "a"}).add(measured("vllm-bf16", 5.0))

    assert Journal(path, {"commit": "b"}).measured == []
    assert Journal(path, {"commit": "a"}, fresh=True).measured == []


def test_a_row_is_the_median_of_its_turns_beside_the_best_with_as_many_bits() -> None:
    found = [
        *(measured("sortserve-bf16", v, turn=t) for t, v in enumerate([10.0, 30.0, 12.0])),
        measured("vllm-bf16", 6.0, ttft_p50_ms=9.04),
        measured("openvino-fp16", 8.0),
        measured("openvino-int8", 100.0),
        measured("llamacpp-f16", 50.0, num_clients=8),
    ]

    rows = summarise_rows(
        choose(["all"]), found, {("sortserve-bf16", 1): Ceiling(1.0, 1.0, tokens_per_s=48.0)}
    )
    ours, vllm = rows[0], rows[1]

    assert (ours.tokens_per_s, ours.percent_of_ceiling) == (12.0, 25.0)
    assert (ours.best_peer, ours.ratio) == ("openvino-fp16", 1.5)
    assert (vllm.best_peer, vllm.ttft_p50_ms, vllm.ceiling_tokens_per_s) == (None, 9.0, None)


def test_the_table_says_who_is_missing_and_who_was_in_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = summarise_rows(choose(["openvino-int8"]), [measured("openvino-int8", 7.0)], {})

    print_rows(rows, {"vllm-bf16": "no such program"})
    printed = capsys.readouterr().out.splitlines()

    assert printed[1].split()[:5] == ["openvino-int8", "(in", "process)", "1", "7.0"]
    assert printed[-1] == "vllm-bf16: no such program"
    assert isinstance(rows[0], Row)


# Turns

WORKER = """
import json, sys
print(json.dumps({"ready": 1}), flush=True)
for line in sys.stdin:
    n = json.loads(line)["output_tokens"]
    answer = {"exit_layer": None, "due_s": 0.0, "sent_s": 0.0, "chunk_times_s": [0.5, 1.0],
              "num_output_tokens": n, "status": 200}
    run = {"records": [answer], "started_s": 0.0, "ended_s": 2.0, "cpu_s": 0.0}
    print(json.dumps(run), flush=True)
"""


def scripted(name: str, program: str) -> Configuration:
    return Configuration(
        name=name,
        peer=name,
        weights="none",
        bits_per_weight=16,
        bits=16,
        launch=lambda where: Launch([sys.executable, "-c", program]),
        in_process=True,
    )


def test_turns_go_round_and_one_that_does_not_start_is_left_out(tmp_path: Path) -> None:
    arguments = parse_arguments(["run", "--clients", "1,2", "--output-tokens", "128"])
    chosen = [
        scripted("a", WORKER),
        scripted("broken", "import sys; sys.exit('no such model')"),
        scripted("b", WORKER),
    ]
    journal = Journal(tmp_path / "journal.jsonl", {})

    failures = asyncio.run(take_turns(chosen, Layout(tmp_path), arguments, journal))

    order = [(m.configuration, m.turn, m.num_clients) for m in journal.measured]
    assert order == [(name, turn, n) for turn in (0, 1) for name in ("a", "b") for n in (1, 2)]
    assert journal.measured[0].figures["output_tokens_per_s"] == 64.0
    assert list(failures) == ["broken"]
    assert "no such model" in failures["broken"]


def test_no_server_starts_after_the_time_is_over(tmp_path: Path) -> None:
    arguments = parse_arguments(["run", "--max-minutes", "-1"])
    journal = Journal(tmp_path / "journal.jsonl", {})

    failures = asyncio.run(
        take_turns([scripted("a", WORKER)], Layout(tmp_path), arguments, journal)
    )

    assert journal.measured == []
    assert "the same command goes on" in failures["time"]
