"""A fit of a tiny BERT whose checkpoint ``dpp sweep`` takes, what a sweep has made, and sweeps in processes."""

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager, redirect_stderr

import datasets
import torch
import yaml
from tiny_glue import make_data, make_model

from dpp_lightning.cli import main

MEASURED = ("seconds", "prune_seconds", "score_seconds", "forwards")


@contextmanager
def fitted(folder, epochs, rows, **model):
    """Fit, and give the arguments of a sweep but for grid and output; the data sets' cache lies in the folder meanwhile.

    Args:
        folder: of all files.
        epochs: of the fit.
        rows: of the training and of each other split.
        model: further settings of the module.
    """
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    checkpoint = {"dirpath": str(folder), "filename": "last", "save_weights_only": True}
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    settings = {"task": "sst2", "pretrained": make_model(folder / "base"), **model}
    data = {"path": make_data(folder / "data", "sst2", *rows)}
    config = {
        "trainer": {"max_epochs": epochs, "accelerator": "cpu", "callbacks": [saving], **quiet},
        "model": {"class_path": "GLUEModule", "init_args": settings},
        "data": {"class_path": "GLUEDataModule", "init_args": data},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    with (folder / "stderr.txt").open("w") as file, redirect_stderr(file):
        assert main(["fit", "--config", str(folder / "fit.yaml"), "--trainer.default_root_dir", str(folder)]) == 0
    yield ["--config", str(folder / "fit.yaml"), "--ckpt_path", str(folder / "last.ckpt")]
    datasets.config.HF_DATASETS_CACHE = cache


def sweep_result(folder):
    """What a sweep has made, without the times: names of all files, rows, table, bytes of the deltas."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    rows = [json.loads(line) for line in files["results.jsonl"].read_text().splitlines()]
    for row in rows:
        for name in MEASURED:
            row.pop(name, None)
    lines = files["table.md"].read_text().splitlines()
    cells = [line.split("|") for line in lines if " s for " not in line]  # what the seconds went into
    measured = next(k for k, name in enumerate(next(c for c in cells if len(c) > 3)) if name.strip() == "seconds")
    table = [[cell for k, cell in enumerate(line) if len(line) < 4 or k != measured] for line in cells]
    deltas = {name: path.read_bytes() for name, path in files.items() if "delta_" in name}
    return {"files": sorted(files), "rows": rows, "table": table, "deltas": deltas}


class SweepProcess:
    """``dpp`` in a fork of this process.

    Args:
        words: of the command line.
        file: of what it says.
        prepare: called in the process first.
    """

    def __init__(self, words, file, prepare=None):
        self.file = file
        self._process = multiprocessing.get_context("fork").Process(
            target=self._run, args=(words, prepare), daemon=True
        )
        self._process.start()

    def _run(self, words, prepare):
        sys.stdout = sys.stderr = self.file.open("w", buffering=1)
        torch.set_num_threads(1)  # those of the parent are not there after a fork
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background, or a test before, ignores it
        if prepare is not None:
            prepare()
        os._exit(main([str(word) for word in words]))

    def said(self):
        """What it has said so far."""
        return self.file.read_text() if self.file.exists() else ""

    def wait_for(self, text, seconds=60):
        """Wait until it has said something."""
        end = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < end, self.said()
            assert self._process.is_alive(), self.said()
            time.sleep(0.02)

    def end(self, number=None, seconds=60):
        """The exit code, after a signal or of its own."""
        if number is not None and self._process.is_alive():
            os.kill(self._process.pid, number)
        self._process.join(seconds)
        assert self._process.exitcode is not None, self.said()
        return self._process.exitcode
