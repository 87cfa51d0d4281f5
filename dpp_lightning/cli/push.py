"""``dpp push``: a delta folder to the hub."""

from __future__ import annotations

from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dpp_lightning.cli.command import FunctionCommand, say
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.storage.hub import plain_errors, upload_folder
from dpp_lightning.storage.locate import local_path, not_found
from dpp_lightning.storage.source_kind import check_delta

_ORDER = "dpp push FOLDER REPO_ID"


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
    path = local_path(folder)
    if not path.is_dir():
        raise not_found(folder, "folder", "FOLDER")
    validate_repo_id(repo_id)
    check_delta(folder, "FOLDER", order=_ORDER)
    DeltaReader.open(folder)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = ", ".join(str(file.relative_to(path)) for file in files)
    say(f"uploading {sum(file.stat().st_size for file in files):,} bytes: {names}")
    with plain_errors(revision):
        address = upload_folder(
            path, repo_id, revision=revision, private=private or None, commit_message=commit_message
        )
    say(address)


COMMAND = FunctionCommand(push_delta, example="dpp push DELTA user/name --private")
