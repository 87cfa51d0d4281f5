"""Uploading the delta folders of a run to the hub. The run's results are on disk by then, and no failure loses them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import get_token, is_offline_mode
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dpp_lightning.experiments.grid import delta_name
from dpp_lightning.experiments.row_groups import Row
from dpp_lightning.storage.hub import upload_folder


def repository_ids(push_to_hub: str, rows: Sequence[Row]) -> dict[str, str]:
    """Name of each delta folder of a run to the id of the repository that it is uploaded to.

    A single delta goes to the repository that the user names, one of several to a repository of its own, whose id ends
    in the folder's name: the hub advises one repository per set of weights, and each can then be loaded by its id.

    Args:
        push_to_hub: ``user/name`` or ``organisation/name``.
        rows: (method, pruning rate, seed) of every delta.

    Raises:
        ValueError: if the hub does not take one of the ids.
    """
    names = [delta_name(*row) for row in rows]
    ids = {name: push_to_hub if len(names) == 1 else f"{push_to_hub}-{name}" for name in names}
    if push_to_hub.count("/") != 1:
        raise ValueError(f"push_to_hub must be user/name or organisation/name, got {push_to_hub!r}")
    for repo_id in ids.values():
        try:
            validate_repo_id(repo_id)
        except ValueError as error:
            raise ValueError(f"push_to_hub={push_to_hub!r}: {error}") from None
    return ids


def check_can_upload() -> None:
    """Refuse to begin where an upload is bound to fail at the end.

    Raises:
        ValueError: if huggingface_hub is offline or has no token.
    """
    if is_offline_mode():
        raise ValueError(
            "push_to_hub cannot upload while the hub is offline: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or "
            "leave push_to_hub out and upload the deltas' folders later with dpp push FOLDER REPO_ID"
        )
    if get_token() is None:
        raise ValueError(
            "push_to_hub needs a token that may write to the hub, and there is none: run hf auth login, or set HF_TOKEN"
        )


def push_deltas(folder: Path, repositories: Mapping[str, str], *, private: bool | None) -> None:
    """Upload delta folders; warn of each that could not be uploaded, with the command that does it later.

    Args:
        folder: holds the delta folders.
        repositories: name of each delta folder to the id of its repository.
        private: whether a repository that is made here is private; None takes the account's default.
    """
    for name, repo_id in repositories.items():
        path = folder / name
        try:
            if not path.is_dir():
                raise FileNotFoundError("there is no such folder")
            address = upload_folder(path, repo_id, private=private)
        except Exception as error:  # hours of training are not to end in a traceback of the network
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            rank_zero_warn(
                f"{path} was not uploaded ({reason}). To upload it later: dpp push {shlex.quote(str(path))} {repo_id}"
            )
        else:
            rank_zero_info(f"{name} is uploaded: {address}")
