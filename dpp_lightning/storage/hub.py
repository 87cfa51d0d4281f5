"""The hub: folders uploaded to it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi


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
