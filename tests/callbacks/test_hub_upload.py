"""push_to_hub: which folder goes to which repository, when, and what a failure leaves."""

import json
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tiny import Foreign, train_loader, trainer, val_loader

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback


def callback(folder, repo_id="user/name", **settings):
    fixed = {"method": "dare", "monitor": "acc", "output_dir": str(folder), "push_to_hub": repo_id}
    return DeltaPruneCallback(**{**fixed, **settings})


def fit(pruned, module=None, *callbacks):
    module = module or Foreign()
    trainer(pruned, *callbacks, max_epochs=1).fit(module, train_loader(100), val_loader())
    return module


class Hub:
    """Stands for the hub: what was uploaded where, and what it refuses."""

    def __init__(self):
        self.private, self.files, self.commits, self.refused = {}, {}, [], set()
        self.on_upload = lambda folder: None

    def client(self, token=None):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.private[repo_id] = private

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        self.on_upload(Path(folder_path))
        if repo_id in self.refused:
            raise ConnectionError("the hub does not answer\nfor reasons of its own")
        assert revision is None
        self.files[repo_id] = {f.name: f.read_bytes() for f in Path(folder_path).iterdir()}
        self.commits.append(repo_id)
        return type("Commit", (), {"commit_url": f"the commit in {repo_id}"})


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("dpp_lightning.storage.hub.HfApi", hub.client)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    return hub


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_single_delta_goes_to_the_repository_when_all_is_saved_and_the_weights_are_back(tmp_path, hub):
    module, tuned = Foreign(), {}

    class Spy(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            tuned.update({name: t.clone() for name, t in pl_module.state_dict().items()})

    def check(folder):
        assert folder == tmp_path / "dare-p0.9-seed0"
        SparseDelta.from_pretrained(folder)
        rows = [json.loads(line)["method"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        assert rows == ["base", "fine-tuned", "dare"]
        assert all(torch.equal(t, tuned[name]) for name, t in module.state_dict().items())

    hub.on_upload = check
    fit(callback(tmp_path, hub_private=True), module, Spy())
    assert hub.private == {"user/name": True}
    assert hub.files == {"user/name": files(tmp_path / "dare-p0.9-seed0")}


def test_each_of_several_deltas_goes_to_a_repository_named_after_its_folder(tmp_path, hub):
    fit(callback(tmp_path, method=["magnitude", "dare"], pruning_rate=[0.5, 0.99], seeds=[0, 1]))
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 2 * 1 + 2 * 2, "magnitude draws nothing, so one seed is enough"
    assert hub.files == {f"user/name-{folder.name}": files(folder) for folder in folders}
    assert set(hub.private.values()) == {None}


def test_a_failed_upload_is_a_warning_with_the_command_and_loses_nothing(tmp_path, hub):
    folder = tmp_path / "my deltas"
    hub.refused = {"user/name-dare-p0.5-seed0"}
    pruned = callback(folder, pruning_rate=[0.5, 0.9])
    with pytest.warns(UserWarning, match="was not uploaded") as record:
        fit(pruned)
    (message,) = (str(w.message) for w in record if "was not uploaded" in str(w.message))
    assert message == (
        f"{folder}/dare-p0.5-seed0 was not uploaded (the hub does not answer). To upload it later: "
        f"dpp push '{folder}/dare-p0.5-seed0' user/name-dare-p0.5-seed0"
    )
    assert hub.commits == ["user/name-dare-p0.9-seed0"]
    assert len(pruned.results) == 4
    SparseDelta.from_pretrained(folder / "dare-p0.5-seed0")


def test_a_resumed_run_uploads_what_an_earlier_one_made_and_says_what_is_gone(tmp_path, hub):
    settings = {"pruning_rate": [0.5, 0.9], "resume": True}
    torch.manual_seed(0)
    fit(callback(tmp_path, None, **settings))
    assert not hub.commits
    (tmp_path / "dare-p0.5-seed0").rename(tmp_path / "elsewhere")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"dare-p0.5-seed0 was not uploaded \(there is no such folder\)"):
        fit(callback(tmp_path, **settings))
    assert hub.commits == ["user/name-dare-p0.9-seed0"]
    assert list(hub.private) == ["user/name-dare-p0.9-seed0"], "no repository is made for what is not there"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "name"}, "must be user/name"),
        ({"repo_id": "a/b/c"}, "must be user/name"),
        ({"repo_id": "user/my name"}, r"push_to_hub='user/my name': .*alphanumeric"),
        ({"repo_id": "user/a--b"}, "Cannot have -- or"),
        ({"repo_id": "user/" + "n" * 90, "seeds": [0, 1]}, "maximum length is 96"),
        ({"save_deltas": False}, "save_deltas=False saves none"),
        ({"repo_id": None, "hub_private": True}, "hub_private says nothing without push_to_hub"),
    ],
)
def test_what_the_hub_cannot_take_is_refused_at_construction(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        callback(tmp_path, **settings)


def test_a_single_delta_has_no_suffix_so_its_long_id_is_taken(tmp_path):
    long = "user/" + "n" * 90
    assert callback(tmp_path, long).settings.repositories == {"dare-p0.9-seed0": long}


@pytest.mark.parametrize("cause", ["offline", "token"])
def test_an_upload_that_is_bound_to_fail_is_refused_before_training(tmp_path, hub, monkeypatch, cause):
    if cause == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    module = Foreign()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ValueError, match="hub is offline" if cause == "offline" else "needs a token"):
        fit(callback(tmp_path), module)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(callback(tmp_path, None))
    assert not hub.commits
