"""``make gpu-check`` and ``make gpu-train``: parts that cannot harm each other, and a rehearsal."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_check import find_gpu_tests, read_summary
from benchmarks.lib import floors
from benchmarks.lib.parts import Part, last_json, run_parts, write_document

from benchmarks import gpu_check, gpu_train
from sortserve.model.backends import BACKENDS
from support.bare_machine import bare_environment
from support.wrong_backends import WRONG

ROOT = Path(__file__).resolve().parents[3]


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def part(name: str, code: str, *, limit_s: float = 60.0, needs: str | None = None) -> Part:
    return Part(name, python(code), limit_s, needs=needs)


class StepClock:
    """A second further each time it is read."""

    def __init__(self, step_s: float = 1.0) -> None:
        self._now_s, self._step_s = 0.0, step_s

    def __call__(self) -> float:
        self._now_s += self._step_s
        return self._now_s


# ---- parts


def test_a_part_gives_the_json_of_its_last_line() -> None:
    found = run_parts([part("a", "print('a table'); print('{\"x\": 1}')")], total_s=60)

    assert found["a"]["status"] == "ok"
    assert found["a"]["result"] == {"x": 1}
    assert "output" not in found["a"]


def test_a_part_that_fails_costs_itself_alone_and_keeps_what_it_said() -> None:
    parts = [
        part("bad", "import sys; print('2.5'); sys.exit('no kernel image')"),
        part("silent", "pass"),
        part("good", "print(1)"),
    ]

    found = run_parts(parts, total_s=600)

    assert [each["status"] for each in found.values()] == ["failed", "failed", "ok"]
    assert "no kernel image" in found["bad"]["output"]
    assert found["silent"]["result"] is None


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
open({str(pid_file)!r}, "w").write(str(child.pid))
print("begun", flush=True)
child.wait()
"""
    found = run_parts([part("hangs", code, limit_s=3.0), part("good", "print(1)")], total_s=600)

    assert found["hangs"]["status"] == "timed out"
    assert "begun" in found["hangs"]["output"]
    assert found["good"]["status"] == "ok"
    assert is_gone(int(pid_file.read_text()))


def is_gone(pid: int) -> bool:
    """Wait until a process has ended: a signal is not instant. It may go while it is looked at."""
    with suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            os.sched_yield()
    return True


def test_when_the_time_is_over_the_rest_is_not_begun() -> None:
    parts = [part("a", "print(1)"), part("b", "print(2)")]

    found = run_parts(parts, total_s=30, clock=StepClock(10))

    assert found["a"]["status"] == "ok"
    assert found["b"] == {
        "status": "not begun",
        "seconds": 0.0,
        "result": None,
        "output": "the 30 s of all parts are over",
    }


def test_a_part_whose_model_could_not_be_made_is_not_begun() -> None:
    parts = [part("model", "raise OSError"), part("speed", "print(1)", needs="model")]

    assert run_parts(parts, total_s=600)["speed"]["output"] == "it needs model"


def test_what_is_known_is_told_after_each_part() -> None:
    told: list[list[str]] = []

    def tell(found: Mapping[str, Any]) -> None:
        told.append(list(found))

    run_parts([part("a", "print(1)"), part("b", "raise OSError")], total_s=600, after_each=tell)

    assert told == [["a"], ["a", "b"]]


def test_a_document_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"

    write_document(path, {"x": 1})

    assert json.loads(path.read_text()) == {"x": 1}
    assert os.listdir(path.parent) == ["result.json"]


def test_no_output_is_no_result() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        last_json("")


# ---- the tests of a GPU


def test_a_summary_of_pytest_is_read() -> None:
    output = "....\nFAILED tests/x.py\n1 failed, 21 passed, 3 skipped in 8.20s\n"

    assert read_summary(output) == {"failed": 1, "passed": 21, "skipped": 3}
    with pytest.raises(ValueError, match="no summary"):
        read_summary("ImportError: no module\n")


def is_marked(path: Path) -> bool:
    """Whether a file has the mark, as Python reads it."""
    text = path.read_text(encoding="utf-8")
    return "gpu" in text and any(
        isinstance(node, ast.Attribute) and ast.unparse(node).endswith("mark.gpu")
        for node in ast.walk(ast.parse(text))
    )


def test_all_files_with_tests_for_a_gpu_are_found() -> None:
    marked = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if is_marked(p)}

    assert set(find_gpu_tests()) == marked
    assert "tests/gpu/test_cuda_laws.py" in marked


# ---- the commands


@pytest.mark.parametrize("command", [gpu_check, gpu_train])
def test_without_a_gpu_the_command_says_so(
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert command.main(["--output", str(tmp_path / "out.json")]) == 2

    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("command", [gpu_check, gpu_train])
@pytest.mark.parametrize("more", [[], ["--smollm2", "models/smollm2"]])
def test_all_parts_fit_eight_minutes_and_name_what_they_need(
    command: Any, more: list[str], tmp_path: Path
) -> None:
    arguments = command.parse_arguments(["--output", "out.json", *more])

    parts = command.parts_of(arguments, tmp_path)

    assert arguments.total_s <= 480
    names = [each.name for each in parts]
    assert len(set(names)) == len(names)
    for index, each in enumerate(parts):
        assert each.needs is None or each.needs in names[:index]
    commands = [" ".join(each.command) for each in parts]
    assert any("models/smollm2" in text for text in commands) == bool(more)
    assert all("--device cuda" in text for text in commands if "pytest" not in text)


def in_this_process(part: Part, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a part finds, run here: what it imports is here already."""
    _, (module, *arguments) = split_at(part.command, "-m")
    assert import_module(module).main(arguments) == 0
    return (part.read or last_json)(capsys.readouterr().out)


def split_at(command: Sequence[str], word: str) -> tuple[Sequence[str], Sequence[str]]:
    place = command.index(word)
    return command[:place], command[place + 1 :]


@pytest.fixture(name="small_floors")
def _small_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "BUFFER_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(floors, "GEMM_SIZE", {"cpu": 64})


def check_offline(results: dict[str, Any], rows: set[str]) -> None:
    assert set(results["decode"]) == rows
    assert set(results["decode"]["1"]) == set(results["prefill"]) == {"2", "4"}
    assert {"copy_gb_per_s", "gemm_gflop_per_s"} <= set(results["machine"])
    assert {"memory_floor_ms", "compute_floor_ms"} <= set(results["decode"]["1"]["2"])


@pytest.mark.usefixtures("small_floors")
def test_every_measurement_of_the_check_works_on_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", "out.json", "--device", "cpu", "--rows", "1", "2", "--steps", "1"]
    parts = gpu_check.parts_of(gpu_check.parse_arguments(arguments), tmp_path)

    found = {p.name: in_this_process(p, capsys) for p in parts if p.name != "tests"}

    check_offline(found["offline tiny"]["results"], {"1", "2"})
    check_offline(found["offline tiny, reference"]["results"], {"1"})
    assert found["offline tiny, reference"]["results"]["backend"] == "reference"
    for name in ("offline tiny", "offline tiny, reference"):
        assert found[name]["results"]["failed_backends"] == []
        assert found[name]["results"]["num_graphs"] == 0


@pytest.mark.usefixtures("small_floors")
def test_figures_name_the_backend_that_ran_and_not_the_one_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails its check on the card would else lend its name to the reference's times."""
    monkeypatch.setitem(BACKENDS, "wrong", WRONG["page"])
    arguments = ["--output", "out.json", "--device", "cpu", "--rows", "1", "--steps", "1"]
    parts = gpu_check.parts_of(gpu_check.parse_arguments(arguments), tmp_path)

    _, found = (in_this_process(p, capsys) for p in parts if p.name in ("model", "offline tiny"))

    assert found["results"]["failed_backends"] == ["wrong"]
    assert found["results"]["backend"].split()[0] in ("cpu", "reference")


@pytest.mark.usefixtures("small_floors")
def test_every_measurement_of_training_works_on_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", "out.json", "--device", "cpu", "--steps", "1"]
    parts = gpu_train.parts_of(gpu_train.parse_arguments(arguments), tmp_path)

    found = {p.name: in_this_process(p, capsys) for p in parts}

    check_training(found)


@pytest.mark.usefixtures("small_floors")
def test_all_weights_are_trained_without_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only adapters need it, and the machine of the check need not have it."""
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = ["--output", "out.json", "--device", "cpu", "--steps", "1"]
    parts = gpu_train.parts_of(gpu_train.parse_arguments(arguments), tmp_path)

    make, soft = (in_this_process(p, capsys) for p in parts[:2])

    assert make == {"shape": "tiny"}
    assert soft["results"]["soft"]["tokens/s"] > 0


def check_training(found: Mapping[str, Any]) -> None:
    for method in ("soft", "soft+kd"):
        for model in ("smollm2-135m", "1b"):
            [figures] = found[f"{method} on {model}"]["results"].values()
            assert figures["tokens/s"] > 0
            assert figures["floor tokens/s"] > 0


def rehearse(command: str, folder: Path, *more: str) -> dict[str, Any]:
    """What ``make`` runs, on a machine that has none of the server's libraries."""
    output = folder / "result.json"
    line = [sys.executable, "-m", f"benchmarks.{command}", "--device", "cpu"]
    done = subprocess.run(
        [*line, "--output", str(output), *more],
        cwd=ROOT,
        env=bare_environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.exists(), done.stdout + done.stderr
    document: dict[str, Any] = json.loads(output.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == document
    bad = {name: p for name, p in document["parts"].items() if p["status"] != "ok"}
    assert not bad, json.dumps(bad, indent=1)
    assert done.returncode == 0
    return {name: p["result"] for name, p in document["parts"].items()}


@pytest.mark.slow
def test_the_check_is_rehearsed_without_the_servers_libraries(tmp_path: Path) -> None:
    found = rehearse("gpu_check", tmp_path, "--rows", "1", "2", "--steps", "2")

    counts = found["tests"]
    assert counts.get("failed", 0) == counts.get("error", 0) == 0
    assert counts["skipped" if not torch.cuda.is_available() else "passed"] > 20
    check_offline(found["offline tiny"]["results"], {"1", "2"})


@pytest.mark.slow
def test_training_is_rehearsed_without_the_servers_libraries(tmp_path: Path) -> None:
    check_training(rehearse("gpu_train", tmp_path, "--steps", "1"))


def test_the_makefile_runs_what_is_rehearsed() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "gpu-check", "gpu-train"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert "-m benchmarks.gpu_check --output build/gpu-check.json" in done.stdout
    assert "-m benchmarks.gpu_train --output build/gpu-train.json" in done.stdout
