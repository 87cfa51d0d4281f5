"""SparseTraining in a GLUE fit: the new head is trained whole, of the encoder a share, and the delta is without loss."""

import json

import datasets
import lightning.pytorch as pl
import pytest
import torch
from tiny_glue import make_data, make_model

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback, SparseTraining
from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule


@pytest.mark.parametrize("mask", ["random", "fisher"])
def test_the_delta_of_a_sparse_fit_is_the_trained_model(tmp_path, monkeypatch, mask):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    base, data = make_model(tmp_path / "base"), make_data(tmp_path / "data", "sst2")
    module = GLUEModule("sst2", base, optimizer=lambda groups: AdamR(groups, lr=1e-2), seed=0)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    method = "random-drop" if mask == "random" else "magnitude"
    prune = DeltaPruneCallback(method, 0.9, output_dir=str(tmp_path / "out"))
    sparse = SparseTraining(mask, 0.9, batches=2)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[sparse, prune],
    ).fit(module, GLUEDataModule(path=data))  # fmt: skip
    after = module.state_dict()
    head = {name for name in after if "classifier" in name}
    assert head
    assert all((after[name] != before[name]).all() for name in head)
    changed = sum(int((after[name] != before[name]).sum()) for name in after.keys() - head)
    assert 0.5 * sparse.num_kept < changed <= sparse.num_kept < 0.11 * sparse.num_entries
    folder = tmp_path / "out" / prune.results[-1].folder
    positions = json.loads((folder / "delta_config.json").read_text())["positions"]
    assert positions == ("seed" if mask == "random" else "index")
    again = GLUEModule("sst2", base, seed=1)
    SparseDelta.from_pretrained(folder).apply_(again)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-6)
