"""A client of the hub that records what it is asked, in place of the real one."""

import os


def record_hub(monkeypatch, describe=lambda folder: sorted(os.listdir(folder))):
    """The list of calls to the hub's client from here on.

    Args:
        monkeypatch: of the test.
        describe: what is recorded of an uploaded folder, while it exists; default its files.
    """
    calls = []

    class Client:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("repo", repo_id, private, exist_ok))

        def create_branch(self, repo_id, *, branch, exist_ok):
            calls.append(("branch", branch, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            calls.append(("upload", repo_id, describe(folder_path), revision, commit_message))
            return type("Commit", (), {"commit_url": "the commit"})

    monkeypatch.setattr("dpp_lightning.storage.hub.HfApi", Client)
    return calls
