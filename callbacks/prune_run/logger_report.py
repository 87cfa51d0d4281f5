"""The table and the figures of a run in the loggers people use: TensorBoard, Weights & Biases and MLflow.

Loggers of Lightning and those of the Trainer of transformers are known by their classes' names, so that no package is
imported that is not in use. What a logger refuses is a warning: the run is over by then, and its files are written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.tables import COLUMNS, markdown_table, summary_rows


@dataclass(frozen=True)
class RunReport:
    """What is shown of a run.

    Attributes:
        results: its rows.
        figures: files of pictures.
        prefix: of the names that loggers get.
        step: of the training, at which it is shown.
    """

    results: Sequence[Result]
    figures: Sequence[Path]
    prefix: str
    step: int

    @property
    def columns(self) -> dict[str, list[str]]:
        """The table by its columns, as text."""
        rows = summary_rows(self.results)
        return {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}


Show = Callable[[RunReport], None]


def boards_of_lightning(loggers: Iterable[Any]) -> list[tuple[str, Show]]:
    """Name and a function that shows a run, for every known logger of a Lightning ``Trainer``."""
    found: list[tuple[str, Show]] = []
    for logger in loggers:
        names = {cls.__name__ for cls in type(logger).__mro__}
        if "TensorBoardLogger" in names:
            found.append(("TensorBoard", partial(_of_experiment, _to_tensorboard, logger)))
        elif "WandbLogger" in names:
            found.append(("Weights & Biases", partial(_of_experiment, _to_wandb, logger)))
        elif "MLFlowLogger" in names:
            found.append(("MLflow", partial(_to_mlflow, logger)))
    return found


def boards_of_transformers(callbacks: Iterable[Any]) -> list[tuple[str, Show]]:
    """The same for the reporting callbacks of a ``Trainer`` of transformers."""
    found: list[tuple[str, Show]] = []
    for callback in callbacks:
        names = {cls.__name__ for cls in type(callback).__mro__}
        if "TensorBoardCallback" in names and callback.tb_writer is not None:
            found.append(("TensorBoard", partial(_to_tensorboard, callback.tb_writer)))
        elif "WandbCallback" in names and getattr(callback, "_wandb", None) is not None and callback._wandb.run:
            found.append(("Weights & Biases", partial(_to_wandb, callback._wandb.run)))
        elif "MLflowCallback" in names and getattr(callback, "_ml_flow", None) is not None:
            found.append(("MLflow", partial(_to_active_mlflow, callback._ml_flow)))
    return found


def show_run(boards: Iterable[tuple[str, Show]], report: RunReport) -> None:
    """Show a run on boards; one that refuses is warned of."""
    for name, show in boards:
        try:
            show(report)
        except Exception as error:  # of a server, an account or a disk, in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            warnings.warn(f"{name} did not take the table and figures of the run: {reason}", stacklevel=2)


def _to_tensorboard(writer: Any, report: RunReport) -> None:
    from matplotlib.image import imread

    writer.add_text(f"{report.prefix}/table", markdown_table(report.results), global_step=report.step)
    for path in report.figures:
        pixels = imread(path)[..., :3]
        writer.add_image(f"{report.prefix}/{path.stem}", pixels, global_step=report.step, dataformats="HWC")
    writer.flush()


def _to_wandb(run: Any, report: RunReport) -> None:
    wandb = import_module("wandb")  # which a run is of
    rows = [list(row) for row in summary_rows(report.results)]
    shown: dict[str, Any] = {f"{report.prefix}/table": wandb.Table(columns=list(COLUMNS), data=rows)}
    shown |= {f"{report.prefix}/{path.stem}": wandb.Image(str(path)) for path in report.figures}
    run.log(shown)  # at the logger's own step: an earlier one would be dropped


def _of_experiment(show: Callable[[Any, RunReport], None], logger: Any, report: RunReport) -> None:
    """Show a run on what a logger holds, which is made when it is first asked for."""
    show(logger.experiment, report)


def _to_mlflow(logger: Any, report: RunReport) -> None:
    client, run_id = logger.experiment, logger.run_id
    client.log_table(run_id, data=report.columns, artifact_file=f"{report.prefix}/table.json")
    for path in report.figures:
        client.log_artifact(run_id, str(path), artifact_path=report.prefix)


def _to_active_mlflow(mlflow: Any, report: RunReport) -> None:
    mlflow.log_table(report.columns, artifact_file=f"{report.prefix}/table.json")
    for path in report.figures:
        mlflow.log_artifact(str(path), artifact_path=report.prefix)
