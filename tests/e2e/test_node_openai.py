"""OpenAI's own package for Node against a server with a tiny model.

Skipped without node, or where ``SORTSERVE_NODE_PATH`` names no folder with ``node_modules/openai``
(``npm install openai`` makes one).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sortserve.api.app import create_app
from sortserve.api.settings import ApiSettings
from sortserve.checkpoint.load import load_checkpoint
from sortserve.engine.assemble import EngineOptions, assemble
from sortserve.engine.worker import EngineWorker
from support.http_service import listening
from support.tiny_models import make_tiny_checkpoint

SCRIPT = Path(__file__).parents[1] / "support" / "node" / "openai_client.mjs"
FOLDER = os.environ.get("SORTSERVE_NODE_PATH", "")
NODE = shutil.which("node")
PERSON = {"name": str, "age": int, "role": str}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(NODE is None, reason="needs node"),
    pytest.mark.skipif(
        not (Path(FOLDER) / "node_modules" / "openai").is_dir() or not FOLDER,
        reason="SORTSERVE_NODE_PATH names no folder with node_modules/openai",
    ),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = make_tiny_checkpoint(tmp_path_factory.mktemp("node"), exits=(2, 4, 6))
    checkpoint = load_checkpoint(str(path), dtype="float32", device="cpu")
    parts = assemble(checkpoint, EngineOptions(block_size=4, seed=0, min_quality=0.0))
    worker = EngineWorker(parts.engine)
    worker.start()
    with listening(create_app(worker, parts.tokenizer, ApiSettings(served_model_name="tiny"))) as u:
        yield u
    worker.stop()


@pytest.fixture(scope="module")
def found(url: str) -> dict[str, Any]:
    assert NODE is not None
    environment = {**os.environ, "NODE_PATH": FOLDER}
    done = subprocess.run(
        [NODE, str(SCRIPT), url, "tiny"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_models_chats_and_streams(found: dict[str, Any]) -> None:
    assert found["models"] == ["tiny", "tiny@2", "tiny@4", "tiny@6"]
    assert found["chat"] == found["streamed"] != ""
    assert found["exit"] == 6
    assert found["response"]


@pytest.mark.parametrize("name", ["parsed", "responseParsed", "call", "streamedCall"])
def test_documents_and_arguments_are_as_the_schema_says(found: dict[str, Any], name: str) -> None:
    assert {field: type(value) for field, value in found[name].items()} == PERSON
    assert found[name]["role"] in ("admin", "user")


def test_tools_and_their_results(found: dict[str, Any]) -> None:
    assert found["reason"] == "tool_calls"
    assert found["allowed"] == ["save"]
    assert found["later"] in ("stop", "length")
    assert set(found["responseCall"]) == set(PERSON)
    assert "response.function_call_arguments.delta" in found["kinds"]
    assert found["after"] in ("completed", "incomplete")


def test_an_error_has_its_status_and_its_field(found: dict[str, Any]) -> None:
    assert found["refused"] == [400, "budget.exit_layer"]
