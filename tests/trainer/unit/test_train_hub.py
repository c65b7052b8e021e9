"""A finished checkpoint is pushed; a token that is missing is told before anything is trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sortserve.cli import main
from sortserve.core.errors import ConfigError
from sortserve_trainer.run import hub
from sortserve_trainer.run.hub import check_hub, push_checkpoint
from support.tiny_models import make_tiny_checkpoint


@dataclass
class ScriptedHub:
    """A hub of the user ``me``, that fails where it is told to."""

    fails: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=dict)

    def _called(self, name: str, what: Any) -> None:
        self.calls.append((name, what))
        if name == self.fails:
            raise RuntimeError("401 Unauthorized.\n  Request ID: 7")

    def whoami(self) -> dict[str, Any]:
        self._called("whoami", None)
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        self._called("create_repo", (repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._called("upload_folder", commit_message)
        self.files[repo_id] = sorted(path.name for path in folder_path.iterdir())


def test_a_checkpoint_gets_the_name_of_its_folder(tmp_path: Path) -> None:
    api = ScriptedHub()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sorted.json").write_text("{}")

    assert push_checkpoint(api, tmp_path / "mine", model_id=None, private=True) == "me/mine"

    assert api.files == {"me/mine": ["sorted.json"]}
    assert ("create_repo", ("mine", True, True)) in api.calls


@pytest.mark.parametrize("fails", ["create_repo", "upload_folder"])
def test_a_push_that_fails_says_how_to_go_on(tmp_path: Path, fails: str) -> None:
    with pytest.raises(ConfigError, match=r"401 Unauthorized\. Request.*`hf upload org/m "):
        push_checkpoint(ScriptedHub(fails), tmp_path, model_id="org/m", private=None)


def test_a_token_is_asked_for_first() -> None:
    with pytest.raises(ConfigError, match=r"--push-to-hub: .*401.*hf auth login"):
        check_hub(ScriptedHub("whoami"))


def command(tmp_path: Path, *more: str) -> list[str]:
    base = make_tiny_checkpoint(tmp_path / "base", exits=None)
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"instruction": "Count.", "output": "one two"}) + "\n") * 20)
    flags = {"--base": base, "--data": data, "--output": tmp_path / "out", "--exits": "2"}
    flags |= {"--max-tokens": "200", "--dtype": "float32", "--lora-rank": "2"}
    flags |= {"--pack-length": "100", "--max-length": "100", "--held-out": "0"}
    parts = [str(part) for pair in flags.items() for part in pair]
    return ["train", *parts, "--report-to", "none", "--push-to-hub", *more]


def test_a_run_pushes_what_it_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = ScriptedHub()
    monkeypatch.setattr(hub, "default_api", lambda: api)

    assert main(command(tmp_path, "--hub-model-id", "org/sorted")) == 0

    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert {"sorted.json", "README.md", "adapter_model.safetensors"} <= set(api.files["org/sorted"])


def test_a_run_without_a_token_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "default_api", lambda: ScriptedHub("whoami"))

    assert main(command(tmp_path)) == 2

    assert not list(tmp_path.glob("out*"))
