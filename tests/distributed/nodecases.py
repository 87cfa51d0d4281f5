"""What the tests of several nodes and of dying ranks start: ``dpp`` in processes of its own, as users run it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback

from dpp_lightning import SparseDelta

DPP = [sys.executable, "-m", "dpp_lightning"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
QUIET = [f"--trainer.{option}=false" for option in ("enable_progress_bar", "enable_model_summary", "logger")]
MARK = "DPP_TESTS_STARTED"  # torchrun's workers have sessions of their own: a run's processes are told by this variable
LEFT_OUT = ("PL_GLOBAL_SEED", "LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


HELPERS = [Path(__file__).parent, Path(__file__).parents[1] / "support"]  # importable in the processes that are started


class Kill(Callback):
    """SIGKILL for one rank: at the start of a step of training, or of a validation pass after the training; once, also
    where torchrun starts the ranks again.

    Args:
        rank: the global rank that dies.
        step: ``trainer.global_step`` at which it does.
        passes: in place of ``step``, validation passes after the training that it lives through.
    """

    def __init__(self, rank: int, step: int | None = None, passes: int | None = None):
        self.rank, self.step, self.passes, self.trained = rank, step, passes, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self._die(trainer)

    def on_train_end(self, trainer, pl_module):
        self.trained = True

    def on_validation_start(self, trainer, pl_module):
        if self.trained and self.passes is not None:
            self.passes -= 1
            if self.passes < 0:
                self._die(trainer)

    def _die(self, trainer):
        if trainer.global_rank == self.rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Done:
    """How a command ended: its code, its output, and how long processes of its outlived it."""

    code: int
    out: str
    err: str
    lingered: float


class Started:
    """A command whose output goes to files, so that no child of its can keep the tests waiting at a pipe.

    Args:
        command: to run.
        folder: to run it in; made.
        env: beside the tests' own.
    """

    def __init__(self, command, folder, **env):
        self.mark = f"{MARK}={uuid.uuid4()}"
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        folder.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        inherited |= {
            "PYTHONPATH": os.pathsep.join(map(str, HELPERS)),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        env = inherited | env | dict([self.mark.split("=")])
        self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=self.files[0], stderr=self.files[1])

    def wait(self, seconds):
        """How it ended; with all its children it is killed where it takes longer.

        Raises:
            TimeoutExpired: it was.
        """
        try:
            code = self.process.wait(seconds)
            ended = time.monotonic()
            while self.living() and time.monotonic() - ended < 30:
                time.sleep(0.1)
            return Done(code, *self.output(), time.monotonic() - ended)
        except subprocess.TimeoutExpired as error:
            error.stdout, error.stderr = self.output()
            raise
        finally:
            self.kill()

    def output(self):
        """What it has written so far to stdout and stderr."""
        for file in self.files:
            file.seek(0)
        return [file.read() for file in self.files]

    def kill(self):
        """End every process that it started."""
        while numbers := self.living():
            for number in numbers:
                os.kill(number, signal.SIGKILL)
            time.sleep(0.1)
            self.process.poll()

    def living(self):
        """Ids of its processes that run."""
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if self._is_own(path)]

    def _is_own(self, environ):
        try:
            return self.mark.encode() in environ.read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            return False


def node(rank, port, address="127.0.0.1"):
    """torchrun's command for one of two nodes of one process each."""
    places = ["--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1"]
    return [*TORCHRUN, *places, f"--master_addr={address}", f"--master_port={port}", "-m", "dpp_lightning"]


def quickstart(samples, epochs=2, **callback):
    """The quickstart in a few seconds: some epochs, one checkpoint for each, two deltas, all in the working folder.

    Args:
        samples: in a batch of each rank; 32 of all ranks together make the same run.
        epochs: of the training.
        callback: settings of the DeltaPruneCallback.
    """
    settings = {"method": "dare", "pruning_rate": "[0.5,0.9]", "seeds": 0, "plot": "false", "output_dir": "deltas"}
    trainer = {"max_epochs": epochs, "accelerator": "cpu", "enable_checkpointing": "true", "default_root_dir": "."}
    options = {f"trainer.{name}": value for name, value in trainer.items()} | {"data.batch_size": samples}
    options |= {f"trainer.callbacks.{name}": value for name, value in (settings | callback).items()}
    return ["--config", "quickstart.yaml", *QUIET, *(f"--{name}={value}" for name, value in options.items())]


def kept(folder):
    """The deltas under a folder, read and verified: tensors by delta and name."""
    deltas = {path.name: SparseDelta.from_pretrained(path) for path in folder.glob("[!.]*") if path.is_dir()}
    return {(name, tensor): part for name, delta in deltas.items() for tensor, part in delta.tensors.items()}


def weights(checkpoint):
    """The weights in a checkpoint of one file, by name."""
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def rows(folder):
    """The scores in a folder's ``results.jsonl``, by method, rate and seed."""
    lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {(row["method"], row["pruning_rate"], row["seed"]): row["score"] for row in lines}
