"""A fit that goes on from a folder of shards, on as many ranks or others, is the uninterrupted one."""

from pathlib import Path

import distjobs
import pytest
import strategycases
import torch
from test_sharded import apart
from tiny_glue import bert_config, make_data, make_model

from dpp_lightning import SparseDelta


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """Base without dropout and data, a whole fit of two epochs, and two ranks' shards after the first."""
    folder = tmp_path_factory.mktemp("glue")
    still = bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    made = (make_model(folder / "base", config=still), make_data(folder / "data", "sst2", n_train=160))
    whole = strategycases.glue_fit("single", *made, 2, None, str(folder / "whole"))
    first = str(folder / "first")
    distjobs.run(strategycases.glue_fit, 2, "fsdp2-folder", *made, 1, None, first, lightning=True)
    return made, whole, folder / "whole-deltas", first


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.distributed)])
def test_a_fit_goes_on_from_a_folder_of_shards(glue, tmp_path, world):
    made, whole, deltas, first = glue
    assert (Path(first) / ".metadata").is_file()
    arguments = ("fsdp2-folder", *made, 2, first, str(tmp_path / "second"))
    for found in distjobs.run(strategycases.glue_fit, world, *arguments, lightning=True).values():
        assert apart(found["weights"], whole["weights"]) < 1e-5
        assert found["pretrained"].keys() == whole["pretrained"].keys()
        assert all(torch.equal(found["pretrained"][name], tensor) for name, tensor in whole["pretrained"].items())
        for (method, q, score), (name, other, expected) in zip(found["rows"], whole["rows"], strict=True):
            assert method == name
            assert q == (other and pytest.approx(other, rel=0.02))
            assert score == pytest.approx(expected, abs=0.051)  # one of 20 samples
    for method in ("dare", "darex-q"):
        one, many = (
            SparseDelta.from_pretrained(d / f"{method}-p0.9-seed0") for d in (deltas, tmp_path / "second-deltas")
        )
        assert one.base_fingerprint == many.base_fingerprint
        assert one.tensors.keys() == many.tensors.keys()
        assert all(torch.equal(many.tensors[name].indices, t.indices) for name, t in one.tensors.items())
