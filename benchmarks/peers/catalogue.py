"""Who is compared: a configuration is a server, the format of its weights, and its best settings.

How an instruction set is forced differs from peer to peer; `Launch.forced_by` says how, in the
words of the result. What cannot be forced is said there too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib.common import ROOT
from benchmarks.peers.layout import Layout

__all__ = ["CONFIGURATIONS", "ISAS", "PEERS", "Configuration", "Launch", "Where", "choose"]

ISAS = ("native", "avx2")
MAX_CLIENTS = 32
MAX_MODEL_LEN = 512
"""Tokens of one request, prompt and answer, that each server makes room for."""

FORCE_AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ",
}
"""oneDNN under both of its names, torch's own kernels, MKL, and the C library's copies of memory.

The last costs nothing, and without it every thread would seem to compute with AVX-512.
"""
WITHOUT_AVX512 = Path(__file__).with_name("without_avx512")
"""What hides AVX-512 from programs that no variable keeps from it: vLLM and OpenVINO."""


@dataclass(frozen=True)
class Where:
    """What a command line depends on."""

    layout: Layout
    port: int
    isa: str
    num_threads: int


@dataclass(frozen=True)
class Launch:
    """A process to start."""

    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    forced_by: str | None = None
    """How the instruction set was forced; None where it was not."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row of the table."""

    name: str
    peer: str
    weights: str
    """The format of the weights, in the words of the peer."""
    bits_per_weight: float
    """What a step must read for each weight, scales included."""
    bits: int
    """The class it competes in: 16, 8 or 4."""
    launch: Callable[[Where], Launch]
    in_process: bool = False
    """No HTTP: the process makes the load itself and prints what it saw (see `openvino_load`)."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a request that only this server knows."""


def _sortserve(where: Where, *arguments: str) -> Launch:
    forced = where.isa != "native"
    return Launch(
        [
            str(Path(sys.executable).with_name("sortserve")),
            "serve",
            str(where.layout.model),
            *("--exits", "9,15,21,30"),
            *("--num-threads", str(where.num_threads)),
            *("--host", "127.0.0.1", "--port", str(where.port)),
            *arguments,
        ],
        {"PYTHONPATH": str(ROOT / "server"), "OMP_NUM_THREADS": str(where.num_threads)}
        | ({"SORTSERVE_CPU_ISA": where.isa} | FORCE_AVX2 if forced else {}),
        f"SORTSERVE_CPU_ISA={where.isa}" if forced else None,
    )


def _vllm(where: Where) -> Launch:
    layout, cores = where.layout, f"0-{where.num_threads - 1}"
    preload = [str(layout.tcmalloc.resolve())] if layout.tcmalloc.exists() else []
    forced = where.isa != "native"
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(preload),
        "PYTHONPATH": str(WITHOUT_AVX512) if forced else "",
    }
    command = [
        # `vllm serve` asks for the metadata of a package called vllm, which this one is not.
        *(str(layout.python("vllm")), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(layout.model)),
        *("--served-model-name", "model", "--dtype", "bfloat16"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_CLIENTS)),
        *("--host", "127.0.0.1", "--port", str(where.port)),
    ]
    return Launch(
        command,
        env | (FORCE_AVX2 if forced else {}),
        "its AVX2 library: torch tells it of no AVX-512" if forced else None,
    )


def _llamacpp(where: Where, kind: str) -> Launch:
    return Launch(
        [
            str(where.layout.llama_bin(where.isa) / "llama-server"),
            *("--model", str(where.layout.gguf(kind)), "--alias", "model"),
            *("--parallel", str(MAX_CLIENTS), "--ctx-size", str(MAX_CLIENTS * MAX_MODEL_LEN)),
            *("--threads", str(where.num_threads), "--threads-batch", str(where.num_threads)),
            *("--host", "127.0.0.1", "--port", str(where.port)),
        ],
        FORCE_AVX2 if where.isa != "native" else {},
        forced_by="a CPU library built without AVX-512" if where.isa != "native" else None,
    )


def _openvino(where: Where, weight_format: str) -> Launch:
    forced = where.isa != "native"
    return Launch(
        [
            str(where.layout.python("openvino")),
            str(Path(__file__).with_name("openvino_load.py")),
            str(where.layout.openvino(weight_format)),
            *("--num-threads", str(where.num_threads)),
        ],
        {"PYTHONPATH": ""}
        | (FORCE_AVX2 | {"LD_PRELOAD": str(where.layout.openvino_avx2)} if forced else {}),
        "ONEDNN_MAX_CPU_ISA, and a preloaded library for its other kernels" if forced else None,
    )


CONFIGURATIONS: Mapping[str, Configuration] = {
    configuration.name: configuration
    for configuration in (
        Configuration(
            name="sortserve-bf16",
            peer="sortserve",
            weights="bf16",
            bits_per_weight=16,
            bits=16,
            launch=_sortserve,
            extra_body={"budget": {"exit_layer": 30}},
        ),
        Configuration(
            name="sortserve-int8",
            peer="sortserve",
            weights="int8",
            bits_per_weight=8.5,
            bits=8,
            launch=lambda where: _sortserve(where, "--quantize", "int8"),
            extra_body={"budget": {"exit_layer": 30}},
        ),
        Configuration(
            name="vllm-bf16",
            peer="vllm",
            weights="bf16",
            bits_per_weight=16,
            bits=16,
            launch=_vllm,
        ),
        Configuration(
            name="openvino-fp16",
            peer="openvino",
            weights="fp16",
            bits_per_weight=16,
            bits=16,
            launch=lambda where: _openvino(where, "fp16"),
            in_process=True,
        ),
        Configuration(
            name="openvino-int8",
            peer="openvino",
            weights="int8",
            bits_per_weight=8,
            bits=8,
            launch=lambda where: _openvino(where, "int8"),
            in_process=True,
        ),
        Configuration(
            name="llamacpp-bf16",
            peer="llamacpp",
            weights="BF16",
            bits_per_weight=16,
            bits=16,
            launch=lambda where: _llamacpp(where, "bf16"),
        ),
        Configuration(
            name="llamacpp-f16",
            peer="llamacpp",
            weights="F16",
            bits_per_weight=16,
            bits=16,
            launch=lambda where: _llamacpp(where, "f16"),
        ),
        Configuration(
            name="llamacpp-q8_0",
            peer="llamacpp",
            weights="Q8_0",
            bits_per_weight=8.5,
            bits=8,
            launch=lambda where: _llamacpp(where, "q8_0"),
        ),
        Configuration(
            name="llamacpp-q4_1",
            peer="llamacpp",
            weights="Q4_1",
            bits_per_weight=5,
            bits=4,
            launch=lambda where: _llamacpp(where, "q4_1"),
        ),
    )
}

PEERS = tuple(dict.fromkeys(configuration.peer for configuration in CONFIGURATIONS.values()))


def choose(names: Sequence[str]) -> list[Configuration]:
    """The configurations that ``names`` mean, in the order of the table.

    A name is a configuration's, a peer's for all of its configurations, or ``all``.

    Raises:
        ValueError: there is no such name.
    """
    known = {"all", *PEERS, *CONFIGURATIONS}
    for name in names:
        if name not in known:
            raise ValueError(
                f"--peers: {name!r} is unknown; choose from {', '.join(sorted(known))}."
            )
    chosen = set(names)
    return [
        configuration
        for configuration in CONFIGURATIONS.values()
        if chosen & {"all", configuration.peer, configuration.name}
    ]
