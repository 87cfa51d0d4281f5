"""Nothing of a run is lost or mixed with another one's, and a fit that does nothing says so."""

import json
import logging

import pytest
from prune_fits import callback
from tiny import Foreign, train_loader, trainer, val_loader

from dpp_lightning.experiments.grid import delta_name


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fit(pruned, module=None, **settings):
    run = trainer(pruned, **{"max_epochs": 1, **settings})
    run.fit(module or Foreign(), train_loader(64), val_loader())
    return run


def test_a_second_run_into_a_folder_moves_the_first_one_aside_whole(tmp_path, caplog):
    fit(callback(tmp_path, seeds=[0, 1]))
    first = contents(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with caplog.at_level(logging.INFO):
        fit(callback(tmp_path, pruning_rate=0.5))
    assert "holds the deltas of an earlier run: they are moved to" in caplog.text
    assert contents(tmp_path / "earlier-1") == first
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    folders = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    assert folders == {"earlier-1"} | {row["folder"] for row in rows if row["folder"]}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    fit(callback(tmp_path))
    assert contents(tmp_path / "earlier-1") == first
    assert (tmp_path / "earlier-2" / "dare-p0.5-seed0").is_dir()


@pytest.mark.parametrize("ckpt", ["last", "best"])
def test_fast_dev_run_tries_every_method_and_writes_nothing(tmp_path, ckpt):
    fit(callback(tmp_path / "out"))
    before = contents(tmp_path)
    pruned = callback(tmp_path / "out", method=["dare", "darex-q"], pruning_rate=[0.9, 0.5], seeds=[0, 1], ckpt=ckpt)
    fit(pruned, fast_dev_run=True)
    assert contents(tmp_path) == before
    assert [r.method for r in pruned.results] == ["base", "fine-tuned", "dare", "darex-q"]


def test_a_run_that_is_stopped_before_its_first_row_leaves_the_earlier_one(tmp_path):
    class Failing(Foreign):
        def on_train_epoch_end(self):
            raise RuntimeError("out of luck")

    fit(callback(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(callback(tmp_path), Failing())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("settings", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_a_fit_without_a_step_says_so_and_how_to_get_the_table(tmp_path, settings):
    with pytest.warns(UserWarning, match=r"had no step to take .*dpp validate --ckpt_path"):
        fit(callback(tmp_path), **settings)


def test_a_fit_resumed_after_its_end_says_so(tmp_path):
    run = fit(callback(tmp_path))
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = trainer(callback(tmp_path / "again"), max_epochs=1)
    with pytest.warns(UserWarning, match="had no step to take"):
        again.fit(Foreign(), train_loader(64), val_loader(), ckpt_path=tmp_path / "end.ckpt")


def test_a_second_fit_of_the_module_says_which_base_it_has(tmp_path, caplog):
    pruned, module = callback(tmp_path), Foreign()
    with caplog.at_level(logging.INFO):
        fit(pruned, module)
        assert "the base of this fit" not in caplog.text
        fit(pruned, module)
    assert caplog.text.count("the base of this fit is what the earlier fit left in the module") == 1


def test_no_two_rates_share_a_folder():
    rates = [0.9, 0.99999999, 0.999999999, 0.0, 1e-7, 0.1234567, 0.12345671]
    assert len({delta_name("dare", rate, 0) for rate in rates}) == len(rates)
    assert delta_name("dare", 0.9, 0) == "dare-p0.9-seed0"
