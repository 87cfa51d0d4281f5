"""What is seen while a run goes on: the training's bar ends before the table, and candidates are told of."""

import io
import re

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console
from tiny import Foreign, train_loader, trainer, val_loader

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.callbacks.prune_run.rows_bar import RowsBar
from dpp_lightning.experiments.grid import Result


class Recorder:
    def __init__(self):
        self.seen = []

    def begin(self, pending, kept):
        self.seen.append(("begin", len(pending)))

    def row(self, result, monitor):
        self.seen.append(("row", result.method))

    def stage(self, text):
        self.seen.append(("stage", text))


def logits(module, batch):
    return module.net(batch[0])


def fitted(tmp_path, method, reporter=None, **settings):
    callback = DeltaPruneCallback(
        method, 0.9, monitor="acc", output_dir=str(tmp_path / "out"), forward_fn=logits, **settings
    )
    callback.reporter = reporter
    return callback


def test_every_candidate_of_a_search_is_told(tmp_path):
    recorder = Recorder()
    trainer(fitted(tmp_path, ["dare", "darex-q"], recorder)).fit(Foreign(), train_loader(), val_loader())
    stages = [what for kind, what in recorder.seen if kind == "stage"]
    assert len(stages) >= 5
    assert stages[:2] == ["candidate 1", "candidate 2"]
    rows = [i for i, (kind, _) in enumerate(recorder.seen) if kind == "row"]
    assert all(rows[2] < i < rows[3] for i, (kind, _) in enumerate(recorder.seen) if kind == "stage")


@pytest.mark.filterwarnings("ignore:values are trained")
def test_every_step_of_training_is_told(tmp_path):
    recorder = Recorder()
    callback = fitted(tmp_path, "refit", recorder, calibration_samples=64, blocks=["*"])
    trainer(callback).fit(Foreign(), train_loader(), val_loader())
    stages = [what for kind, what in recorder.seen if kind == "stage"]
    assert re.fullmatch(r"step 400 of 400, loss \d+\.\d+", stages[-1])


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_the_bar_of_the_training_ends_before_the_table(tmp_path, bar, capsys):
    fit = trainer(fitted(tmp_path, "dare"), enable_progress_bar=True)
    fit.callbacks = [c for c in fit.callbacks if not isinstance(c, (RichProgressBar, TQDMProgressBar))]
    fit.callbacks.insert(0, bar())
    fit.fit(Foreign(), train_loader(), val_loader())
    shown = capsys.readouterr()
    table = shown.out.index("Pruned deltas")
    assert "Epoch" not in shown.out[table:]
    if bar is TQDMProgressBar:
        assert "Epoch" not in shown.err.split("base: acc")[-1] if "base: acc" in shown.err else True


def test_a_bar_shows_the_row_and_what_is_tried_for_it():
    file = io.StringIO()
    with RowsBar(console=Console(file=file, force_terminal=True, width=120)) as bar:
        bar.begin([("darex-q", 0.99, 0)], 0)
        bar.row(Result("base", 0.5), "acc")
        bar.row(Result("fine-tuned", 0.9), "acc")
        bar.stage("candidate 3")
        bar._bar.refresh()
        bar.row(Result("darex-q", 0.8, 0.99, 0), "acc")
    text = file.getvalue()
    assert "darex-q p=0.99 seed=0: candidate 3" in text
    assert "left" in text
