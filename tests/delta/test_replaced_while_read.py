"""A delta folder that another takes the place of while it is read."""

import shutil

import pytest
from tiny import pair

from dpp_lightning import SparseDelta, prune
from dpp_lightning.delta import folder as module
from dpp_lightning.delta.folder import MODEL_FILE


@pytest.mark.parametrize("gone_between", [False, True])
def test_the_new_delta_is_read(tmp_path, monkeypatch, gone_between):
    base, finetuned = pair(seed=1)
    old, new = (prune(base, finetuned, "dare", 0.5, seed=seed) for seed in (0, 1))
    old.save_pretrained(tmp_path / "delta")
    new.save_pretrained(tmp_path / "new")
    checksum, read = module._file_checksum, module.check_delta

    def replaced(path):
        (tmp_path / "delta").rename(tmp_path / "old")
        monkeypatch.setattr(module, "_file_checksum", checksum)
        if gone_between:  # as where a folder is replaced in two steps
            monkeypatch.setattr(
                module, "check_delta", lambda *a: (shutil.copytree(tmp_path / "new", path.parent), read(*a))
            )
        else:
            (tmp_path / "new").rename(tmp_path / "delta")
        return checksum(path)

    monkeypatch.setattr(module, "_file_checksum", replaced)
    assert SparseDelta.from_pretrained(tmp_path / "delta").info.seed == 1


def test_a_damaged_one_is_read_once(tmp_path, monkeypatch):
    base, finetuned = pair(seed=1)
    prune(base, finetuned, "dare", 0.5).save_pretrained(tmp_path)
    with (tmp_path / MODEL_FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    reads = []
    checksum = module._file_checksum
    monkeypatch.setattr(module, "_file_checksum", lambda path: (reads.append(path), checksum(path))[1])
    with pytest.raises(ValueError, match="checksum"):
        SparseDelta.from_pretrained(tmp_path)
    assert len(reads) == 1
