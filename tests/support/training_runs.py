"""Short runs of the trainer on a tiny model, in this process, in one of its own, or in two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sortserve_trainer.run.settings import load_train_settings
from sortserve_trainer.run.train import train

COMMAND = (
    "import sys; from sortserve_trainer.run.train import train_command; train_command(sys.argv[1:])"
)


def write_data(folder: Path, num_rows: int = 60) -> Path:
    """Rows of different lengths that a tiny model can learn a little of."""
    rows = [
        {"instruction": f"Say {word} {i % 4 + 1} times.", "output": " ".join([word] * (i % 4 + 1))}
        for i, word in enumerate(["red", "blue", "green", "black", "white"] * (num_rows // 5))
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(base: Path, output: Path, **overrides: object) -> dict[str, object]:
    """A short run in fp32 on a tiny model."""
    return {
        "base": str(base),
        "data": str(write_data(base.parent)),
        "output": str(output),
        "exits": "2,4",
        "dtype": "float32",
        "device": "cpu",
        "max_length": 96,
        "pack_length": 128,
        "learning_rate": 2e-3,
        "lora_rank": 4,
        "max_tokens": 1300,
        "held_out": 0,
        "report_to": "none",
        "save_every": 3,
        **overrides,
    }


def run(base: Path, output: Path, **overrides: object) -> dict[str, Tensor]:
    """The tensors of the checkpoint that a run ends with."""
    return tensors(train(load_train_settings(flags(base, output, **overrides))))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.name}:{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_close(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=2e-4, msg=name)


def start(
    base: Path,
    output: Path,
    *,
    before: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
    **overrides: Any,
) -> subprocess.Popen[bytes]:
    """A short run in a process of its own."""
    return spawn(flags(base, output, **overrides), before=before, environment=environment)


def spawn(
    settings: Mapping[str, object],
    *,
    before: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[bytes]:
    """``sortserve train`` with these flags in a process of its own; ``before`` is run first."""
    arguments = [
        part
        for name, value in settings.items()
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-c", before + COMMAND, *arguments],
        env={**os.environ, **quiet, **environment},
        stderr=subprocess.DEVNULL,
    )


def run_two(
    base: Path,
    output: Path,
    *,
    before: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
    **overrides: Any,
) -> dict[str, Tensor]:
    """What two processes end with that share a run, as accelerate would start them."""
    together = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        **environment,
    }
    processes = [
        start(
            base,
            output,
            before=before,
            environment={**together, "RANK": rank, "LOCAL_RANK": rank},
            **overrides,
        )
        for rank in ("0", "1")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    return tensors(output)


def free_port() -> int:
    """One that no other test is given: systems give ports above 32767 to who names none."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")
