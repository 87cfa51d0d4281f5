"""A base, its fine-tuned model and what is made of them in one folder, for one of the architectures."""

from __future__ import annotations

import contextlib
import io
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from architectures import Architecture
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpp_lightning.cli import main


class Refused(Exception):
    """What the library does not do, said in one line."""


class Holder(pl.LightningModule):
    """A LightningModule as a user writes one around a model of transformers; its training puts given weights in."""

    def __init__(self, model: nn.Module, trained: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.trained = [trained]  # in a list, so that its parameters are not this module's
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        self.model.load_state_dict(self.trained[0].state_dict())

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("score", tensors_of(self.model(**batch))[0].float().mean(), batch_size=2)

    def configure_optimizers(self) -> None:
        return None


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, logits first where there are any."""
    found = [value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()]
    logits = [output["logits"]] if "logits" in output else []
    return [*logits, *(tensor for tensor in found if tensor.dim() > 0)]


class Trial:
    """A base, its fine-tuned model, and all that is made of them, in one folder.

    Args:
        row: the architecture.
        folder: an empty one.
    """

    def __init__(self, row: Architecture, folder: Path) -> None:
        self.row, self.folder = row, folder
        self.base, self.finetuned = folder / "base", folder / "finetuned"
        self._pruned: dict[tuple, Path] = {}
        self.warnings: list[str] = []
        model = row.build()
        model.save_pretrained(self.base)
        row.finetune(model)
        model.save_pretrained(self.finetuned)
        self.saved_keys = keys(self.finetuned)
        for name in row.old_files:
            row.write_old_names(folder / name)
        self.inputs = {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in row.inputs().items()}
        self.expected = self.outputs(self.load(self.finetuned))

    def load(self, folder: Path) -> Any:
        """The model of a folder, of which nothing is missing, left over or of another shape."""
        model, info = self.row.model_class.from_pretrained(folder, output_loading_info=True)
        found = {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}
        assert not found, f"from_pretrained says {found}"
        return model.eval()

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[Tensor]:
        """All outputs on the row's inputs, finite ones."""
        found = tensors_of(model(**self.inputs))
        assert found
        assert all(bool(torch.isfinite(tensor).all()) for tensor in found), "outputs are not finite"
        return found

    def command(self, *words: object) -> str:
        """Run ``dpp`` in this process.

        Returns:
            What it printed. Warnings are added to ``warnings``.

        Raises:
            Refused: it said in one line why not.
            AssertionError: it failed otherwise.
        """
        printed, errors = io.StringIO(), io.StringIO()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
                code = main([str(word) for word in words])
        said = [line for line in errors.getvalue().splitlines() if line.strip()]
        lines = [
            line for line in said if "warning" not in line.lower() and "\N{BOX DRAWINGS HEAVY HORIZONTAL}" not in line
        ]
        if code:
            assert len(lines) == 1, f"exit code {code} with {len(lines)} lines: {' / '.join(lines)[:400]}"
            raise Refused(lines[0].removeprefix(f"dpp {words[0]}: error: "))
        self.warnings += [line for line in said if "warning" in line.lower()]
        self.warnings += [str(w.message) for w in caught if "dpp_lightning" in w.filename or "callbacks" in w.filename]
        return printed.getvalue() + errors.getvalue()

    def prune(self, method: str, rate: float, *options: object, source: Path | None = None) -> Path:
        """The delta folder that ``dpp prune`` writes, made once."""
        key = (method, rate, *map(str, options), source)
        if key not in self._pruned:
            folder = self.folder / f"delta{len(self._pruned)}"
            words = ("--method", method, "--pruning_rate", rate, "--output", folder, *options)
            self.command("prune", self.base, source or self.finetuned, *words)
            self._pruned[key] = folder
        return self._pruned[key]

    def dense(self, delta: Path) -> Path:
        """The folder that ``dpp apply`` makes of the base and a delta."""
        folder = delta.with_name(delta.name + "-dense")
        self.command("apply", self.base, delta, "--output", folder)
        return folder

    @cached_property
    def dense_of_half(self) -> Path:
        return self.dense(self.prune("dare", 0.5))

    @cached_property
    def checkpoint(self) -> Path:
        """A Lightning checkpoint of the fine-tuned model."""
        module, file = Holder(self.load(self.finetuned)), self.folder / "finetuned.ckpt"
        trainer = quiet_trainer()
        trainer.strategy.connect(module)
        trainer.save_checkpoint(file, weights_only=True)
        return file

    @cached_property
    def repeated_batch(self) -> Path:
        """The row's inputs ten times over, as a file, for what trains on pieces of a batch."""
        file = self.folder / "repeated.safetensors"
        repeated = {name: torch.cat([tensor] * 10) for name, tensor in load_file(self.batch).items()}
        save_file(repeated, file)
        return file

    @cached_property
    def batch(self) -> Path:
        """The row's inputs as a calibration file."""
        file = self.folder / "batch.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self.inputs.items()}, file)
        return file


def keys(folder: Path) -> set[str]:
    """Names in a folder's file of weights."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def quiet_trainer(*callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", callbacks=[*callbacks], max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=1,
    )  # fmt: skip
