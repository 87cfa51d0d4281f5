"""What a run of DeltaPruneCallback costs beside the forward passes themselves, on GLUE's validation split.

Run by hand: python tests/benchmarks/bench_scoring.py --pretrained ENCODER --finetuned FOLDER --data GLUE [--task sst2]
[--workers 0 2] [--seeds 8] [--repeats 3]. A run is ``Trainer.validate`` of the fine-tuned model with ``dare`` at one
rate: base, fine-tuned model and every mask seed are scored, drawn, applied, reverted and saved. Its seconds are set
against as many bare forward passes over batches that lie in memory, both in turn; CPU seconds leave out what other
processes on the machine take.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from statistics import median

import lightning.pytorch as pl
import torch
from transformers import AutoModelForSequenceClassification

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.callbacks.prune_run.evaluation_loop import run_evaluation_loop
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule

MONITOR = "val_score"


class Ratios(pl.Callback):
    """One pass of the evaluation loop against one bare pass, in the middle of a validation."""

    def __init__(self, repeats: int) -> None:
        self.repeats, self.bare, self.loop = repeats, [], []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bare:
            return
        batches = list(trainer.datamodule.val_dataloader())
        for _ in range(self.repeats):
            self.bare.append(timed(lambda: forwards(pl_module, batches)))
            self.loop.append(timed(lambda: run_evaluation_loop(trainer, testing=False)))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall and CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


@torch.no_grad()
def forwards(module: pl.LightningModule, batches: list) -> None:
    module.eval()
    for batch in batches:
        module(batch)


def trainer(callback: pl.Callback) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", callbacks=[callback], **quiet)


def measure(options: argparse.Namespace, workers: int) -> None:
    module = GLUEModule(options.task, options.pretrained)
    tuned = AutoModelForSequenceClassification.from_pretrained(options.finetuned)
    module.model.load_state_dict(tuned.state_dict())
    data = GLUEDataModule(options.task, path=options.data, tokenizer=options.pretrained, num_workers=workers)
    ratios, runs = Ratios(options.repeats), []
    trainer(ratios).validate(module, data, verbose=False)
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            prune = DeltaPruneCallback(
                "dare", 0.99, seeds=list(range(options.seeds)), monitor=MONITOR, pretrained=options.pretrained,
                output_dir=folder,
            )  # fmt: skip
            runs.append(timed(lambda: trainer(prune).validate(module, data, verbose=False)))  # noqa: B023
    passes = options.seeds + 3  # base, fine-tuned model, and the validation that it was called in
    for index, kind in enumerate(("wall", "CPU")):
        bare, loop, run = (median(t[index] for t in times) for times in (ratios.bare, ratios.loop, runs))
        print(f"| {workers} | {kind} | {bare:.2f} | {loop / bare:.2f} | {run:.1f} | {run / (bare * passes):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("pretrained", "finetuned", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print("| workers | seconds of | a bare pass | a pass of the loop over it | a run | over its passes |")
    print("|---|---|---|---|---|---|")
    for workers in options.workers:
        measure(options, workers)


if __name__ == "__main__":
    main()
