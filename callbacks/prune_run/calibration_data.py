"""Calibration data of a run: where it comes from, and what is measured on it. It is never the split that is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from dpp_lightning.calibration.output_change import OutputChange
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.callbacks.prune_run.evaluation import EvaluationPasses
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.pruning.known_inputs import unknown_inputs
from dpp_lightning.pruning.plan import PruningPlan


class CalibrationPasses:
    """Passes over calibration data with the weights as they stand, for the methods that fit something on it.

    Args:
        settings: say which data it is, and what the methods need of it.
        passes: of the trainer that holds the weights.

    Attributes:
        source: name of the data that q is searched on, for the results; empty where none is needed.
        inputs: statistics of the fine-tuned model's layer inputs by canonical name; empty where no method needs them.
        gradients: of the output's error; None where no method needs them.

    Raises:
        ValueError: if the settings need data that there is not.
    """

    def __init__(self, settings: PruneSettings, passes: EvaluationPasses) -> None:
        self._settings, self._passes = settings, passes
        self._batch, self._labelled, self.source = None, None, ""
        self._output_change: OutputChange | None = None
        self.inputs: dict[str, InputStatistics] = {}
        self.gradients: BatchGradients | None = None
        trainer, dataloader = passes.trainer, settings.calibration_dataloader
        compares_outputs = bool(settings.plot) or (settings.fits and settings.objective == "output_change")
        if compares_outputs or settings.needs_inputs or settings.methods_with_gradients:
            self._batch, self.source = calibration_batch(trainer, dataloader, settings.calibration_samples)
        if settings.fits and settings.objective == "metric":
            self._labelled, self.source = labelled_loader(trainer, dataloader)

    def measure_finetuned(self) -> None:
        """Measure the fine-tuned model, whose weights the module holds now, as the pruned ones are compared with it."""
        settings, passes, batch = self._settings, self._passes, self._batch
        if batch is None:
            return
        layer = settings.output_layer_of(passes.trainer.lightning_module)
        outputs = partial(passes.outputs, batch, layer, settings.forward_fn)
        self._output_change = OutputChange(outputs, settings.output_measure)
        self._output_change.take_reference()
        if settings.needs_inputs:
            self.inputs = passes.layer_inputs(batch, settings.forward_fn)
        if settings.methods_with_gradients:
            self.gradients = passes.output_gradients(batch, settings.forward_fn)

    def with_inputs(self, plan: PruningPlan) -> PruningPlan:
        """A plan that knows the inputs of the layers, where a method goes by them; warns of linear maps of which they
        are not known.

        Raises:
            ValueError: they are not known of most.
        """
        if not self._settings.needs_inputs:
            return plan
        plan = plan.with_inputs(self.inputs)
        for method in self._settings.methods:
            unknown = unknown_inputs(plan.pairs, method, self._settings.method_settings.get(method, {}))
            if unknown:
                rank_zero_warn(unknown)
        return plan

    @property
    def output_change(self) -> Callable[[], float] | None:
        """Change of the outputs against the fine-tuned model's; None where the settings do not need it."""
        change = self._output_change
        if change is None:
            return None
        # rank 0's value on all ranks, since rounding could make their searches differ
        return lambda: float(self._passes.trainer.strategy.broadcast(change()))

    @property
    def metric(self) -> Callable[[], float] | None:
        """Score on labelled calibration data; None where q is not searched by it."""
        return None if self._labelled is None else partial(self._passes.score, self._labelled)


def labelled_loader(trainer: pl.Trainer, dataloader: Iterable[Any] | None) -> tuple[Any, str]:
    """Labelled data for the objective ``metric``: a loader, and the name of its data for the results.

    Args:
        trainer: with its DataModule, if it has one.
        dataloader: the one that the user gave; default the DataModule's ``calibration_dataloader()``.

    Raises:
        ValueError: if there is neither: q would have to be chosen on the split that is scored or on training data.
    """
    if dataloader is not None:
        return dataloader, "calibration_dataloader="
    make_loader = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
    if make_loader is None:
        raise ValueError(
            "objective='metric' needs labelled data that was neither trained on nor is scored: give the DataModule a "
            "calibration_dataloader(), or pass calibration_dataloader=; or take objective='output_change' (no labels)"
        )
    return make_loader(), "calibration split"


def calibration_batch(trainer: pl.Trainer, dataloader: Iterable[Any] | None, samples: int) -> tuple[Any, str]:
    """One fixed batch for the output change, and the name of its data for the results.

    Its samples are taken by index from the dataset, not through a sharded or shuffled loader, so they are the same for
    every number of ranks. Labels play no part.

    Args:
        trainer: with its loaders attached.
        dataloader: the one that the user gave; default the DataModule's ``calibration_dataloader()``, else the training
            data, of which samples at equal distances are taken.
        samples: how many; fewer if the data has fewer.

    Raises:
        ValueError: if there is neither calibration data nor a single training DataLoader.
    """
    if dataloader is not None:
        return _collate_first(dataloader, samples, "calibration_dataloader=")
    make_loader = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
    if make_loader is not None:
        return _collate_first(make_loader(), samples, "the calibration split")
    source = trainer.fit_loop._data_source
    training = trainer.train_dataloader or (source.dataloader() if source.instance is not None else None)
    if not isinstance(training, DataLoader):
        raise ValueError(
            "the output change needs one batch of data: pass calibration_dataloader=, give the DataModule a "
            f"calibration_dataloader(), or use a single training DataLoader (found {type(training).__name__})"
        )
    return _collate_first(training, samples, "train", spread=True)


def _collate_first(loader: Iterable[Any], samples: int, source: str, *, spread: bool = False) -> tuple[Any, str]:
    """The first samples of the loader's dataset, or samples spread over it, as one batch; with a description of them.

    A loader without an indexable dataset gives its first batch, whatever its size.
    """
    dataset = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or collate is None:
        return next(iter(loader)), f"the first batch of {source}"
    length = len(dataset)  # type: ignore[arg-type]
    count = min(samples, length)
    step = length // count if spread and count else 1
    return collate([dataset[i * step] for i in range(count)]), f"{count} items of {source}"  # type: ignore[index]
