"""``dpp push``: a delta folder to the hub."""

from __future__ import annotations

from pathlib import Path

from dpp_lightning.cli.command import FunctionCommand, hub_errors, say
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.storage.hub import upload_folder


def push_delta(
    folder: str,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    commit_message: str = "Upload pruned delta",
) -> None:
    """Upload a delta folder to a model repository of the hub, which is made where there is none.

    The token is the one that hf auth login or the environment variable HF_TOKEN set.

    Args:
        folder: a delta folder, which is checked before anything is sent; all files in it are uploaded
        repo_id: the repository, such as user/name
        revision: branch to commit to, made where there is none; null for the main one
        private: make a new repository private
        commit_message: first line of the commit
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a delta folder, as dpp prune writes it")
    DeltaReader.open(folder)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = ", ".join(str(path.relative_to(folder)) for path in files)
    say(f"uploading {sum(path.stat().st_size for path in files):,} bytes: {names}")
    with hub_errors():
        address = upload_folder(
            folder, repo_id, revision=revision, private=private or None, commit_message=commit_message
        )
    say(address)


COMMAND = FunctionCommand(push_delta, example="dpp push DELTA user/name --private")
