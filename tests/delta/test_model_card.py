"""The model card: what the hub reads of it is true, in the hub's own words, and says nothing of this machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from factored import factored_pair
from huggingface_hub import ModelCard
from tiny import Net, pair

from dpp_lightning import SparseDelta, merge, prune
from dpp_lightning.delta.folder import DeltaReader, delta_bytes, set_q
from dpp_lightning.storage.checkpoints import total_bytes


def card_of(folder):
    """The card as the hub's library reads it, which checks the metadata block."""
    return ModelCard((folder / "README.md").read_text("utf-8"))


def delta_of(base_name=None, **settings):
    base, finetuned = pair()
    delta = prune(base, finetuned, **{"method": "dare", "pruning_rate": 0.9, "carry": ["head.*"], **settings})
    delta.info.__dict__["base_name"] = base_name
    return delta


def test_a_base_of_the_hub_is_named_and_the_delta_put_onto_it_as_an_adapter_is(tmp_path):
    data = card_of(delta_of("organisation/base-v1").save_pretrained(tmp_path / "d")).data.to_dict()
    assert data == {
        "base_model": "organisation/base-v1",
        "base_model_relation": "adapter",
        "library_name": "dpp_lightning",
        "tags": ["delta-parameter-pruning", "dare"],
    }


@pytest.mark.parametrize(
    "base_name", ["/home/someone/models/base", "runs/someone/base", "./someone/base", "C:\\someone\\base", "someone/base", None]
)  # fmt: skip
def test_paths_of_this_machine_stay_on_it(tmp_path, monkeypatch, base_name):
    """``someone/base`` has the form of a hub id, but is a folder here."""
    monkeypatch.chdir(tmp_path)
    Path("someone/base").mkdir(parents=True)
    delta = delta_of(base_name)
    card = card_of(delta.save_pretrained("d"))
    assert not {"base_model", "base_model_relation"} & card.data.to_dict().keys()
    assert "someone" not in card.content
    assert ("`base`, not on the hub" if base_name else "| base | unnamed") in card.content
    assert delta.base_fingerprint in card.content
    assert json.loads(Path("d/delta_config.json").read_text()).get("base_name") == base_name


def test_factors_and_what_was_trained_are_rows_of_the_table(tmp_path):
    _, delta = factored_pair(factors_dtype="int4")
    told = {"texts": 1200, "steps": 40, "held_out_before": 0.5, "held_out_after": 0.125, "form": "plain | odd"}
    trained = SparseDelta(delta.tensors, delta.carried, replace(delta.info, training=told))
    folder = trained.save_pretrained(tmp_path / "d")
    factors = f"| tensors with factors | 8, rank 1 to 2, {delta.num_factor_numbers:,} numbers in int4 |"
    training = "| values trained | on 1,200 unlabelled texts, 40 steps, held-out loss 0.5 → 0.125 |"
    for row in (factors, training):
        assert row in card_of(folder).content
    set_q(folder, 0.3)
    for row in (factors, training):
        assert row in card_of(folder).content
    for told in ({}, {"texts": "many"}):
        trained = SparseDelta(delta.tensors, delta.carried, replace(delta.info, training=told))
        assert "values trained" not in card_of(trained.save_pretrained(tmp_path / "d")).content
    assert "factors" not in card_of(delta_of().save_pretrained(tmp_path / "d")).content


def test_the_pruned_models_scores_are_its_model_index_and_the_others_stand_in_the_table_alone(tmp_path):
    folder = delta_of().save_pretrained(
        tmp_path / "d", scores={"val_acc": 0.75}, reference_scores={"base": 0.5, "fine-tuned": 0.875}
    )
    card = card_of(folder)
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("val_acc", 0.75)]
    for row in ("| val_acc | 0.75 |", "| base | 0.5 |", "| fine-tuned | 0.875 |"):
        assert row in card.content


def test_the_ratio_is_that_of_the_dense_models_bytes_in_its_own_dtype(tmp_path):
    delta = delta_of()
    folder = delta.save_pretrained(tmp_path / "d")
    size = sum((folder / name).stat().st_size for name in ("delta_model.safetensors", "delta_config.json"))
    ratio = total_bytes(dict(Net().state_dict())) / size
    assert delta_bytes(folder) == size
    assert f"| bytes, ratio to the dense model | {size:,}, {ratio:.1f} |" in card_of(folder).content
    assert delta.info.ratio(size) == pytest.approx(ratio)


def test_a_merged_delta_says_so(tmp_path):
    base, first = pair(seed=1)
    _, second = pair(seed=1, scale=0.5)
    deltas = {name: prune(base, model, "dare", 0.5) for name, model in (("a", first), ("b", second))}
    card = card_of(merge(base, deltas).save_pretrained(tmp_path / "d"))
    assert card.data.tags == ["delta-parameter-pruning", "task-arithmetic", "merge"]
    assert "Deltas of one base (a, b) merged" in card.content


def test_another_q_in_a_folder_changes_config_and_card_alone(tmp_path):
    delta = delta_of()
    folder, expected = delta.save_pretrained(tmp_path / "d"), delta.rescaled(0.25).save_pretrained(tmp_path / "e")
    set_q(folder, 0.25)
    assert SparseDelta.from_pretrained(folder).q == 0.25
    for name in ("delta_model.safetensors", "delta_config.json", "README.md"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    before = (folder / "delta_config.json").read_bytes()
    with pytest.raises(ValueError, match="finite number above 0"):
        set_q(folder, 0.0)
    assert (folder / "delta_config.json").read_bytes() == before
    assert DeltaReader.open(folder).contents.info() == delta.rescaled(0.25).info
