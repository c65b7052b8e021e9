"""The programs that show the offline engine run, and say what their page says."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sortserve import LLM
from sortserve.engine.assemble import EngineOptions
from support.tiny_models import make_tiny_checkpoint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "offline.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("m"), "llama-tied", exits=(2, 4, 6))


def test_the_example_runs(model: Path) -> None:
    program = ROOT / "examples" / "offline.py"

    run = subprocess.run(
        [sys.executable, str(program), str(model)], capture_output=True, text=True, check=False
    )

    assert run.returncode == 0, run.stderr
    assert [at in run.stdout for at in ("at {2: ", "at {6: ", "at {4: ")] == [True] * 3
    assert run.stdout.count("sample ") == 3


def test_the_program_of_the_page_runs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

    exec(program.replace("sorted-smollm2-135m", str(model)), {})

    assert capsys.readouterr().out.count("{4: 24}") == 2


def test_the_page_names_every_method_and_setting() -> None:
    methods = [name for name, _ in inspect.getmembers(LLM, inspect.isfunction) if name[0] != "_"]
    settings = ("max_model_len", "policy", "max_num_seqs", "max_num_batched_tokens", "seed")

    assert [name for name in methods if f"`{name}" not in PAGE] == []
    assert all(name in EngineOptions.__dataclass_fields__ for name in settings)
    assert [name for name in settings if f"`{name}`" not in PAGE] == []
