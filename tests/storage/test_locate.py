"""What is a path and what a hub id; and what is said where neither is there."""

from pathlib import Path

import pytest

from dpp_lightning.storage import hub
from dpp_lightning.storage.locate import hub_id, local_folder


@pytest.mark.parametrize(
    "source", ["./x", "../x", "/x/y", "~/x", "a/b/c", "C:\\x", "a\\b", "", ".", "a b", "a//b", "a/", Path("x/y/z")]
)
def test_what_cannot_be_a_hub_id_is_never_asked_of_the_hub(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    assert hub_id(source) is None
    if source not in ("", "."):  # the working directory itself
        with pytest.raises(FileNotFoundError, match="no such folder"):
            local_folder(source, None, ["*"])


@pytest.mark.parametrize("source", ["bert", "organisation/name.v1-2_x", Path("organisation/name")])
def test_a_hub_id_is_one_only_where_nothing_of_that_name_lies_here(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo_id, **k: f"/cache/{repo_id}")
    assert local_folder(source, None, ["*"]) == Path("/cache") / source
    Path(source).parent.mkdir(exist_ok=True)
    Path(source).mkdir()
    assert hub_id(source) is None
    assert local_folder(source, None, ["*"]) == Path(source)
