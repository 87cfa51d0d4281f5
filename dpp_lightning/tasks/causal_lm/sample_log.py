"""Generated texts in the loggers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

SAMPLES_FILE = "samples.jsonl"


def log_samples(loggers: Sequence[Logger], name: str, samples: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log samples to every logger: as a table (Weights and Biases), a text (TensorBoard), else as lines of a file.

    Args:
        loggers: the trainer's.
        name: name of the table, such as ``val_samples``.
        samples: plain values by column, with the same columns in each.
        step: number of optimizer steps so far.
    """
    if not samples:
        return
    for logger in loggers:
        if hasattr(logger, "log_text"):
            columns = list(samples[0])
            logger.log_text(key=name, columns=columns, data=[[str(s[c]) for c in columns] for s in samples], step=step)
        elif hasattr(logger.experiment, "add_text"):  # type: ignore[attr-defined]
            logger.experiment.add_text(name, "\n\n".join(map(_lines, samples)), step)  # type: ignore[attr-defined]
        elif logger.log_dir or logger.save_dir:
            _append(Path(str(logger.log_dir or logger.save_dir)), name, samples, step)


def _lines(sample: Mapping[str, Any]) -> str:
    return "  \n".join(f"**{column}**: {value}" for column, value in sample.items())


def _append(folder: Path, name: str, samples: Sequence[Mapping[str, Any]], step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": step, "name": name, **sample}, ensure_ascii=False) + "\n")
