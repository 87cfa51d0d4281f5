"""The hub: a repository's files fetched to this machine, and a folder uploaded as a repository.

Nothing else in the library imports ``huggingface_hub`` when it is itself imported, since that takes half a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download


def fetch_folder(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Fetch files of a model repository into the hub's cache on this machine, those that are not there yet.

    Args:
        repo_id: ``name`` or ``organisation/name``.
        revision: branch, tag or commit; default the main branch.
        patterns: glob patterns of the names of the files to fetch.

    Returns:
        The folder in the cache that holds them.

    Raises:
        huggingface_hub.errors.RepositoryNotFoundError: no such repository, or no right to read it.
        huggingface_hub.errors.LocalEntryNotFoundError: the hub cannot be reached and the files are not in the cache.
    """
    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))


def upload_folder(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload pruned delta",
) -> str:
    """Upload the files of a folder in one commit to a model repository of the hub.

    Args:
        folder: a local folder; all of its files are uploaded, whatever they are.
        repo_id: ``name`` or ``organisation/name``; the repository is made if it is absent.
        revision: branch to commit to, made if it is absent; default the repository's main branch.
        private: whether a repository that is made here is private; default as the account has it.
        token: of the account; default the one that ``hf auth login`` or the environment variable ``HF_TOKEN`` set.
        commit_message: first line of the commit.

    Returns:
        The address of the commit.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the hub refuses, for example for want of a valid token.
        ValueError: the folder is no folder, or ``repo_id`` is malformed.
    """
    client = HfApi(token=token)
    client.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        client.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = client.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return str(commit.commit_url)
