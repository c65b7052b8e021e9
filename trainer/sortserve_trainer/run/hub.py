"""``--push-to-hub``: the finished checkpoint as a repository on the Hugging Face hub.

The token is the hub client's own affair (``HF_TOKEN``, ``hf auth login``): no flag takes it, since
the command goes into the checkpoint's card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from sortserve.core.errors import ConfigError

__all__ = ["HubApi", "check_hub", "default_api", "push_checkpoint"]


class HubApi(Protocol):
    """What is asked of ``huggingface_hub.HfApi``."""

    def whoami(self) -> dict[str, Any]:
        """Whose token it is."""

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        """Make a repository; what comes back has its full ``repo_id``."""

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        """One commit of all files in a folder."""


def default_api() -> HubApi:
    """The hub's client."""
    from huggingface_hub import HfApi

    return HfApi()


def check_hub(api: HubApi) -> None:
    """Ask whether there is a token that is good, before hours go into what cannot be pushed.

    Raises:
        ConfigError: there is none, or the hub cannot be reached.
    """
    try:
        api.whoami()
    except Exception as error:  # the hub client and its HTTP client raise many kinds
        raise ConfigError(
            f"--push-to-hub: the hub takes no token of yours: {_reason(error)} "
            "(`hf auth login`, or HF_TOKEN).",
            param="push-to-hub",
        ) from error


def push_checkpoint(
    api: HubApi, folder: Path, *, model_id: str | None, private: bool | None
) -> str:
    """Upload a checkpoint; returns the id of its repository.

    Args:
        api: the hub's.
        folder: of the checkpoint.
        model_id: of the repository; None is the folder's name, of whoever has the token.
        private: whether a new repository is.

    Raises:
        ConfigError: it cannot be uploaded. The folder stays, and the message says how to go on.
    """
    wanted = model_id or folder.absolute().name
    try:
        made = api.create_repo(wanted, private=private, exist_ok=True)
        repo_id = str(made.repo_id)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="A sorted checkpoint")
    except Exception as error:  # as above
        raise ConfigError(
            f"--push-to-hub: {folder} is finished, but was not pushed: {_reason(error)}. "
            f"Push it with `hf upload {wanted} {folder}`.",
            param="push-to-hub",
        ) from error
    return repo_id


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
