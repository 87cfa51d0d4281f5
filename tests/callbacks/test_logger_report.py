"""The table and figures of a run reach the loggers, and a logger that refuses ends no run."""

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger
from tiny import Foreign, train_loader, trainer, val_loader
from tiny_hf import make_trainer

from dpp_lightning.callbacks import DeltaPruneCallback, HFDeltaPruneCallback
from dpp_lightning.callbacks.prune_run.logger_report import (
    RunReport,
    boards_of_lightning,
    boards_of_transformers,
    show_run,
)
from dpp_lightning.experiments.grid import Result

RESULTS = [Result("base", 0.5), Result("fine-tuned", 0.9), Result("dare", 0.8, 0.9, 0, 0.1)]


def fitted(tmp_path, logger, **settings):
    callback = DeltaPruneCallback(
        ["dare", "darex-q"], 0.9, monitor="acc", output_dir=str(tmp_path / "out"), plot="darex-q",
        forward_fn=lambda module, batch: module.net(batch[0]), **settings,
    )  # fmt: skip
    trainer(callback, logger=logger).fit(Foreign(), train_loader(), val_loader())
    return callback


def test_tensorboard_has_the_table_and_the_plot(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path / "tb")
    fitted(tmp_path, logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    assert "dpp/q_curve" in events.Tags()["images"]
    (text,) = events.Tensors("dpp/table/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert table.startswith("| model | p | score |")
    assert "| darex-q | 0.9 |" in table


def test_wandb_offline_has_the_table_and_the_plot(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fitted(tmp_path, logger)
    summary = dict(logger.experiment.summary)
    wandb.finish()
    assert summary["dpp/table"]["_type"] == "table-file"
    assert summary["dpp/q_curve"]["_type"] == "image-file"


def test_mlflow_has_the_table_and_the_plot(tmp_path):
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts"))
    fitted(tmp_path, logger)
    table = json.loads((tmp_path / "artifacts" / logger.run_id / "artifacts" / "dpp" / "table.json").read_text())
    assert table["columns"][:3] == ["model", "p", "score"]
    assert [row[0] for row in table["data"]] == ["base", "fine-tuned", "dare", "darex-q"]
    assert (tmp_path / "artifacts" / logger.run_id / "artifacts" / "dpp" / "q_curve.png").is_file()


class Writer:
    def __init__(self):
        self.texts, self.images = {}, {}

    def add_text(self, tag, text, global_step):
        self.texts[tag] = text

    def add_image(self, tag, image, global_step, dataformats):
        self.images[tag] = image.shape

    def flush(self):
        pass


class TensorBoardLogger:  # known by its name
    def __init__(self):
        self.experiment = Writer()


class WandbLogger:
    @property
    def experiment(self):
        raise OSError("no\nnetwork")


class MLflowCallback:
    def __init__(self):
        self._ml_flow = self
        self.tables = {}

    def log_table(self, data, artifact_file):
        self.tables[artifact_file] = data


def test_a_logger_that_refuses_is_a_warning_and_the_others_get_theirs(tmp_path):
    known = TensorBoardLogger()
    boards = boards_of_lightning([WandbLogger(), CSVLogger(tmp_path), known])
    with pytest.warns(UserWarning, match=r"Weights & Biases did not take .* run: no network"):
        show_run(boards, RunReport(RESULTS, [], "dpp", 3))
    assert "| dare | 0.9 | 0.8000 |" in known.experiment.texts["dpp/table"]
    assert [name for name, _ in boards] == ["Weights & Biases", "TensorBoard"]


def test_the_callbacks_of_transformers_are_known():
    callback = MLflowCallback()
    silent = type("TensorBoardCallback", (), {"tb_writer": None})()
    boards = boards_of_transformers([silent, SimpleNamespace(), callback])
    show_run(boards, RunReport(RESULTS, [], "dpp/a", 3))
    assert callback.tables["dpp/a/table.json"]["model"] == ["base", "fine-tuned", "dare"]


def test_the_trainer_of_transformers_writes_to_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    callback = HFDeltaPruneCallback("dare", 0.9, monitor="accuracy", output_dir=str(tmp_path / "deltas"))
    train = make_trainer(tmp_path, callbacks=[callback], report_to="tensorboard", num_train_epochs=1)
    if hasattr(callback, "attach"):
        callback.attach(train)
    train.train()
    file = next(tmp_path.rglob("events.out.*"))
    events = EventAccumulator(str(file.parent), size_guidance={"tensors": 0}).Reload()
    assert "dpp/table/text_summary" in events.Tags()["tensors"]
