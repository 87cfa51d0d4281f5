"""What the hub's client raises in one line with the cure, and what is done where the hub cannot be reached."""

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dpp_lightning.storage import hub
from dpp_lightning.storage.locate import local_folder
from dpp_lightning.storage.source_kind import check_model

COMMIT = "a" * 40


def refused(kind, status):
    """An error as the client raises it for an answer of the hub."""
    return kind("the client's\n\nwords", response=httpx2.Response(status, request=httpx2.Request("GET", "http://x")))


def unreachable(*args, **settings):
    raise httpx2.ConnectError("no route")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with the configuration of ``org/cached``, while nothing can be reached."""
    repository = tmp_path / "models--org--cached"
    for file, content in ((f"snapshots/{COMMIT}/config.json", "{}"), ("refs/main", COMMIT)):
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(content)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "repo_info", unreachable)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (refused(RepositoryNotFoundError, 404), FileNotFoundError, "no such repository that you may read: check the name"),
        (refused(GatedRepoError, 403), PermissionError, "accept its terms on its page of the hub, then log in"),
        (refused(RevisionNotFoundError, 404), FileNotFoundError, "the repository has no revision 'v9'"),
        (refused(HfHubHTTPError, 401), PermissionError, "the client's words; log in with hf auth login, or set HF_TOKEN"),
        (refused(HfHubHTTPError, 503), ConnectionError, "the hub: the client's words"),
        (refused(HfHubHTTPError, 409), OSError, "the hub: the client's words"),
        (httpx2.ConnectError("no route"), ConnectionError, "the hub: no route"),
        (LocalEntryNotFoundError("x"), ConnectionError, "nothing of its revision v9 is in the hub's cache, and the hub c"),
        (KeyError("a bug"), KeyError, "a bug"),
    ],
)  # fmt: skip
def test_errors_of_the_client_are_pythons_own_in_one_line(error, kind, says, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(kind) as raised, hub.plain_errors("v9"):
        raise error
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_hub_that_is_switched_off_is_no_failure_of_the_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    part = r"only a part of it is in the hub's cache, .* HF_HUB_OFFLINE is set"
    with pytest.raises(FileNotFoundError, match=part), hub.plain_errors():
        raise IncompleteSnapshotError("x", snapshot_path="x")


def test_both_readings_of_a_name_are_said(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(refused(RepositoryNotFoundError, 404))
    )
    with pytest.raises(FileNotFoundError) as raised:
        local_folder("rums", None, ["*"], argument="BASE")
    assert str(raised.value) == (
        "BASE rums: no such folder (did you mean runs?); and as a hub id: the hub has no such repository that you may "
        "read: check the name; for a private one log in with hf auth login, or set HF_TOKEN"
    )


def test_the_cached_revision_is_used_and_said_once_where_the_hub_is_not_reached(cache, recwarn):
    hub._warn_if_unreached.cache_clear()
    for _ in range(3):
        assert hub.fetch_folder("org/cached", None, ["config.json"]) == cache
    said = [str(warning.message) for warning in recwarn]
    assert said == [f"the hub does not answer: of org/cached the cached revision {COMMIT} is used"]
    with pytest.raises(ConnectionError, match=r"nothing of it is in the hub's cache, and the hub cannot be reached"):
        hub.fetch_folder("org/other", None, ["config.json"])


def test_a_cache_without_the_weights_is_no_model_where_the_hub_is_not_reached(cache):
    with pytest.raises(ConnectionError, match=r"BASE org/cached: .* holds config\.json and no weights"):
        check_model("org/cached", "BASE")
    (cache / "model.safetensors").write_bytes(b"x")
    check_model("org/cached", "BASE")
