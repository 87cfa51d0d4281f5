"""Uploading a delta to the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from dpp_lightning.delta.sparse_delta import SparseDelta


def upload(
    delta: SparseDelta,
    repo_id: str,
    revision: str | None,
    private: bool | None,
    token: str | None,
    commit_message: str,
    save_settings: Mapping[str, Any],
) -> str:
    """See :meth:`dpp_lightning.delta.sparse_delta.SparseDelta.push_to_hub`."""
    with TemporaryDirectory() as place:
        folder = delta.save_pretrained(Path(place) / "delta", **save_settings)  # all that can be wrong is wrong by here
        client = HfApi(token=token)
        client.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            client.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = client.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return str(commit.commit_url)
