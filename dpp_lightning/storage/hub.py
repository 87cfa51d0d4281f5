"""The hub: a repository's files fetched to this machine, and a folder uploaded as a repository.

Nothing else in the library imports ``huggingface_hub`` when it is itself imported, since that takes half a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_LOG_IN = "log in with hf auth login, or set HF_TOKEN"


def fetch_folder(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Fetch files of a model repository into the hub's cache on this machine, those that are not there yet.

    Where the hub cannot be reached, the cached revision is used, and a warning says so.

    Args:
        repo_id: ``name`` or ``organisation/name``.
        revision: branch, tag or commit; default the main branch.
        patterns: glob patterns of the names of the files to fetch.

    Returns:
        The folder in the cache that holds them.

    Raises:
        FileNotFoundError: no such repository or revision; or the hub is switched off (``HF_HUB_OFFLINE``) and the files
            are not in the cache.
        PermissionError: the repository may not be read.
        ConnectionError: the hub cannot be reached and the files are not in the cache.
        ValueError: a malformed ``repo_id``.
    """
    with plain_errors(revision):
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    _warn_if_unreached(repo_id, revision, folder.name)
    return folder


def answers(repo_id: str, revision: str | None) -> bool:
    """Whether the hub can be asked at this moment: it answers, be it that there is no such repository."""
    if is_offline_mode():
        return False
    try:
        with plain_errors(revision):
            HfApi().repo_info(repo_id, revision=revision)
    except ConnectionError:
        return False
    except OSError:
        return True
    return True


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


@contextmanager
def plain_errors(revision: str | None = None) -> Iterator[None]:
    """What the hub's client raises, as Python's own errors, in one line with the cure.

    Args:
        revision: branch, tag or commit that is asked for.

    Raises:
        FileNotFoundError: no such repository or revision; or the hub is switched off and its cache lacks the files.
        PermissionError: the repository may not be read or written.
        ConnectionError: the hub does not answer.
        OSError: any other refusal of the hub.
        ValueError: a malformed repository id.
    """
    try:
        yield
    except LocalEntryNotFoundError as error:
        part = isinstance(error, IncompleteSnapshotError)
        what = f"its revision {revision}" if revision else "it"
        cached = f"{'only a part' if part else 'nothing'} of {what} is in the hub's cache"
        if is_offline_mode():
            raise FileNotFoundError(
                f"{cached}, and the hub was not asked, as HF_HUB_OFFLINE is set: check the name, or unset that variable"
            ) from error
        reason = f" ({_one_line(error.__cause__)})" if error.__cause__ else ""
        raise ConnectionError(
            f"{cached}, and the hub cannot be reached{reason}: check the name and the network"
        ) from error
    except Exception as error:
        plain = _plain(error, revision)
        if plain is None:
            raise
        raise plain from error


def _plain(error: Exception, revision: str | None) -> OSError | None:
    """An error of the client as one of Python's own; None for one that is so already, or is no refusal of the hub."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, GatedRepoError):
        return PermissionError(f"the repository is gated: accept its terms on its page of the hub, then {_LOG_IN}")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"the hub has no such repository that you may read: check the name; for a private one {_LOG_IN}"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"the repository has no revision {revision or 'main'!r}: give a branch, tag or commit")
    if status in (401, 403):
        return PermissionError(f"the hub: {_one_line(error)}; {_LOG_IN}")
    if isinstance(error, ConnectionError) or type(error).__module__.startswith("httpx") or (status or 0) >= 500:
        return ConnectionError(f"the hub: {_one_line(error)}")
    return None if response is None or isinstance(error, ValueError) else OSError(f"the hub: {_one_line(error)}")


@cache
def _warn_if_unreached(repo_id: str, revision: str | None, commit: str) -> None:
    """Say once that a repository comes from the cache since the hub does not answer; where it is switched off, the user
    knows."""
    if not is_offline_mode() and not answers(repo_id, revision):
        warnings.warn(f"the hub does not answer: of {repo_id} the cached revision {commit} is used", stacklevel=3)


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
