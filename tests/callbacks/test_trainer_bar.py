"""What is seen while a run goes on: the training's bar ends before the table, and candidates are told of."""

import io
import logging
import re
import sys

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.console import Console
from tiny import Foreign, train_loader, trainer, val_loader

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.callbacks.prune_run.progress import LogReporter
from dpp_lightning.callbacks.prune_run.rows_bar import RowsBar, rows_reporter, seconds_left
from dpp_lightning.experiments.grid import Result


class Recorder:
    def __init__(self):
        self.seen = []

    def begin(self, pending, kept):
        self.seen.append(("begin", len(pending)))

    def next(self, row, done):
        self.seen.append(("next", row))

    def row(self, result, monitor):
        self.seen.append(("row", result.method))

    def note(self, text):
        self.seen.append(("note", text))

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
    shown = capsys.readouterr().out
    assert "Epoch" in shown
    assert "Epoch" not in shown[shown.index("Pruned deltas") :]


def test_a_bar_shows_the_row_and_what_is_tried_for_it():
    file = io.StringIO()
    with RowsBar(console=Console(file=file, force_terminal=True, width=120)) as bar:
        bar.begin([("darex-q", 0.99, 0)], 0)
        bar.row(Result("base", 0.5), "acc")
        bar.row(Result("fine-tuned", 0.9), "acc")
        bar.next(("darex-q", 0.99, 0), 0)
        bar.stage("candidate 3")
        bar._bar.refresh()
        bar.row(Result("darex-q", 0.8, 0.99, 0), "acc")
    text = file.getvalue()
    assert "darex-q p=0.99 seed=0: candidate 3" in text
    assert "left" in text


def test_rows_of_other_processes_count_and_are_waited_for():
    file, rows = io.StringIO(), [("dare", 0.9, seed) for seed in range(4)]
    console = Console(file=file, force_terminal=True, width=120)
    with RowsBar(console=console) as bar:
        bar.begin(rows, 2)
        bar.next(rows[2], 4)
        bar.row(Result("dare", 0.8, 0.9, 2), "acc")
        assert "[5/6]" in file.getvalue()
        bar.next(None, 5)
        bar._bar.refresh()
        assert re.search(r"waiting \S+ 5/6", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()))
        assert bar._bar.live.is_started
        bar.next(None, 6)
        assert not bar._bar.live.is_started


def test_a_note_stands_on_a_line_of_its_own_above_the_bar():
    file = io.StringIO()
    with RowsBar(console=Console(file=file, force_terminal=True, width=120)) as bar:
        bar.begin([("dare", 0.9, 0)], 0)
        bar.note("stored dense: head.weight")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in file.getvalue().splitlines()]
    assert "stored dense: head.weight" in lines


@pytest.mark.parametrize(
    ("made", "pending", "spent", "current", "left"),
    [
        (0, 10, 0.0, 5.0, None),
        (2, 10, 20.0, 0.0, 80.0),
        (2, 10, 20.0, 4.0, 76.0),
        (2, 10, 20.0, 500.0, 70.0),
        (10, 10, 100.0, 0.0, 0.0),
    ],
)
def test_the_time_left_is_that_of_the_rows_made_for_each_row_to_come(made, pending, spent, current, left):
    assert seconds_left(made, pending, spent, current) == left


def test_the_time_left_is_known_from_the_first_row_on_and_counts_neither_references_nor_kept_rows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dpp_lightning.callbacks.prune_run.rows_bar.time.monotonic", lambda: now[0])
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with RowsBar(console=console) as bar:
        bar.begin([("dare", 0.9, seed) for seed in range(4)], 7)
        bar._bar.stop()
        for seconds, result in ((900, Result("fine-tuned", 0.9)), (60, Result("dare", 0.8, 0.9, 0))):
            now[0] += seconds
            bar.row(result, "acc")
        console.print(bar._bar.get_renderable())
    assert "8/11" in file.getvalue()
    assert "0:03:00" in file.getvalue()


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_there_is_a_bar_only_on_a_terminal_and_where_the_trainer_shows_bars(monkeypatch, terminal, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with rows_reporter(shown=shown) as reporter:
        assert isinstance(reporter, RowsBar if terminal and shown else LogReporter)


def test_a_log_says_once_a_minute_what_is_tried(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("dpp_lightning.callbacks.prune_run.progress.time.monotonic", lambda: now[0])
    with rows_reporter(shown=False) as reporter, caplog.at_level(logging.INFO):
        reporter.next(("refit", 0.99, 1), 0)
        for step in range(200):
            now[0] += 1
            reporter.stage(f"step {step}")
    said = [record.message for record in caplog.records if "step" in record.message]
    assert said == [f"refit p=0.99 seed=1: step {step}" for step in (59, 119, 179)]


def test_every_epoch_of_trained_coefficients_is_told(tmp_path):
    recorder = Recorder()
    trainer(fitted(tmp_path, "darex-learned", recorder)).fit(Foreign(), train_loader(), val_loader())
    stages = [what for kind, what in recorder.seen if kind == "stage"]
    assert stages
    assert all(re.fullmatch(r"epoch \d+ of at most 20, loss \S+", text) for text in stages)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_gone_at_the_end_and_the_lines_stay(terminal):
    file = io.StringIO()
    with RowsBar(console=Console(file=file, force_terminal=terminal, width=120)) as bar:
        bar.begin([("dare", 0.9, 0)], 0)
        bar.row(Result("fine-tuned", 0.9), "acc")
        bar.row(Result("dare", 0.8, 0.9, 0), "acc")
    text = file.getvalue()
    assert "[1/1] dare p=0.9 seed=0: acc 0.8000" in text
    if terminal:
        assert text.endswith("\x1b[1A\x1b[2K")  # up to the bar's line, and erase it
    else:
        assert len(text.splitlines()) == 2
