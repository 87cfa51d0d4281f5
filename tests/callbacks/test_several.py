"""Several DeltaPruneCallbacks in one trainer."""

import json

import pytest
from prune_fits import callback
from tiny import Foreign, train_loader, trainer, val_loader


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_two_callbacks_each_have_their_table_and_metrics(tmp_path):
    run = trainer(callback(tmp_path / "a"), callback(tmp_path / "b", seeds=1), max_epochs=1)
    run.fit(Foreign(), train_loader(100), val_loader())
    for name, seed in (("a", 0), ("b", 1)):
        table = rows(tmp_path / name)
        assert table[2]["folder"] == f"dare-p0.9-seed{seed}"
        assert float(run.callback_metrics[f"dpp/{name}/dare/0.9/acc"]) == pytest.approx(table[2]["score"])
    assert [r["score"] for r in rows(tmp_path / "a")[:2]] == [r["score"] for r in rows(tmp_path / "b")[:2]]


def test_a_fit_resumes_with_the_callbacks_in_another_order(tmp_path):
    def two(out):
        return callback(out / "a"), callback(out / "b", carry=["0.*"])

    first = two(tmp_path / "first")
    run, module = trainer(*first, max_epochs=1), Foreign()
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run.fit(module, train_loader(100), val_loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    second, resumed = two(tmp_path / "second"), Foreign()
    resumed.load_state_dict(base)
    trainer(*second[::-1]).fit(resumed, train_loader(100), val_loader(), ckpt_path=tmp_path / "one.ckpt")
    for before, after in zip(first, second, strict=True):
        assert after._checkpoint_fingerprint == before._base_fingerprint is not None
        assert len(after.results) == 3


@pytest.mark.parametrize(
    ("folders", "settings", "message"),
    [
        (("a", "a"), {}, "give each an output_dir of its own"),
        (("a", "b"), {"apply": True}, "prune with one callback, or leave apply out"),
    ],
)
def test_callbacks_that_spoil_each_other_are_refused_before_training(tmp_path, folders, settings, message):
    run = trainer(callback(tmp_path / folders[0], **settings), callback(tmp_path / folders[1], seeds=1))
    with pytest.raises(ValueError, match=message):
        run.fit(Foreign(), train_loader(100), val_loader())
    assert run.global_step == 0
