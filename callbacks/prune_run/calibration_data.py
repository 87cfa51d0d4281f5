"""Calibration data of a run: where it comes from, and what is measured on it. It is never the split that is scored."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, move_data_to_device, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from dpp_lightning.calibration.distillation import Distillation
from dpp_lightning.calibration.output_change import OutputChange
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.calibration.pieces import pieces_of, samples_of
from dpp_lightning.calibration.teacher import CannotTrain
from dpp_lightning.callbacks.prune_run.calibration_batch import (
    CURE,
    CalibrationBatch,
    FirstTrainingBatch,
    batch_of_items,
    own_batch,
)
from dpp_lightning.callbacks.prune_run.evaluation import EvaluationPasses
from dpp_lightning.callbacks.prune_run.evaluation_loop import OneBatch
from dpp_lightning.callbacks.prune_run.evaluation_trial import training_as_it_was
from dpp_lightning.callbacks.prune_run.settings import SAMPLES, PruneSettings
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.pruning.known_inputs import unknown_inputs
from dpp_lightning.pruning.plan import PruningPlan


class CalibrationData:
    """The data that a run needs for calibration, taken and tried before the first training step.

    Args:
        settings: say which data it is, and what the methods need of it.
        trainer: in ``on_train_start``, where its loaders exist, or in a validate or a test.

    Attributes:
        batch: for the output change, inputs and gradients; None where no method needs one, or until training draws its
            first batch, where only that will do.
        labelled: a loader and the name of its data for the objective ``metric``; None where it is not needed.
        inputs: of the layers, on some of the batch; empty where no method goes by them.
        waiting: whether :meth:`take_first` must be called once training has drawn its first batch.

    Raises:
        ValueError: if data is needed that there is not, or that the module's evaluation step does not take.
    """

    def __init__(self, settings: PruneSettings, trainer: pl.Trainer) -> None:
        self._settings, self._trainer = settings, trainer
        self.batch: CalibrationBatch | None = None
        self.labelled: tuple[Any, str] | None = None
        self.inputs: dict[str, InputStatistics] = {}
        self._first: FirstTrainingBatch | None = None
        if settings.fits and settings.objective == "metric":
            self.labelled = labelled_loader(trainer, settings.calibration_dataloader)
            _try_labelled(trainer, settings, *self.labelled)
        compares_outputs = bool(settings.plot) or (settings.fits and settings.objective == "output_change")
        if compares_outputs or settings.needs_inputs or settings.needs_batch:
            self._take_batch()

    @property
    def waiting(self) -> bool:
        """See the class."""
        return self._first is not None

    @property
    def source(self) -> str:
        """Name of the data that q is searched on, for the results; empty where none is needed."""
        if self.labelled is not None:
            return self.labelled[1]
        return "" if self.batch is None else self.batch.source

    def take_first(self) -> None:
        """Take and try the batch that training has drawn and not yet used.

        Raises:
            ValueError: if the module's evaluation step does not take it.
        """
        assert self._first is not None
        batch, self._first = self._first.take(), None
        self.batch = self._tried(batch)

    def all_inputs(self) -> dict[str, InputStatistics]:
        """Inputs of the layers on all of the batch, with the weights that the module holds."""
        assert self.batch is not None
        passes = EvaluationPasses(self._trainer, self._settings.monitor)
        with _as_it_was(self._trainer), isolate_rng():
            return passes.layer_inputs(pieces_of(self.batch.batch, SAMPLES), self._settings.forward_fn)

    def _take_batch(self) -> None:
        trainer, samples = self._trainer, self._settings.samples
        loaders, source = _calibration_loaders(trainer, self._settings.calibration_dataloader)
        fitting = trainer.state.fn == TrainerFn.FITTING
        trained = trainer.fit_loop._combined_loader if fitting else None
        training = loaders is None or (trained is not None and any(loaders is leaf for leaf in trained.flattened))
        if loaders is None:
            loaders = trained if fitting else _training_loaders(trainer)
            source = "train"
        batch = batch_of_items(loaders, samples, source, spread=training)
        if batch is None and training and fitting:
            self._first = FirstTrainingBatch(trainer)
            return
        self.batch = self._tried(batch or own_batch(loaders, source))

    def _tried(self, taken: CalibrationBatch) -> CalibrationBatch:
        """The batch, the first rank's on all ranks, if the evaluation step takes it; of several loaders' batches else
        the first one that it takes."""
        if self._trainer.world_size > 1:
            taken = _broadcast(self._trainer, taken)
        fault = self._fault(taken.batch)
        if fault is None:
            return replace(taken, parts=())
        if isinstance(fault, CannotTrain):  # whatever the data
            raise fault
        for part in taken.parts:
            if self._fault(part.batch) is None:
                rank_zero_warn(
                    f"the evaluation step does not take the batch of all training loaders ({_line(fault)}), so the "
                    f"calibration data is {part.source}; choose it with DeltaPruneCallback(calibration_dataloader=...)"
                )
                return part
        raise ValueError(
            f"the calibration data ({taken.source}) cannot be used: {_line(fault)}. If it is not what the evaluation "
            f"step takes, {CURE}"
        ) from fault

    def _fault(self, batch: Any) -> Exception | None:
        """What goes wrong where the batch is used as after the fit; None if nothing does."""
        settings, trying = self._settings, self._trainer.state.fn == TrainerFn.FITTING
        passes = EvaluationPasses(self._trainer, settings.monitor, trying=trying)
        module = self._trainer.lightning_module
        try:
            with _as_it_was(self._trainer), isolate_rng():
                layer = settings.output_layer_of(module)
                passes.outputs(measured_on(batch), layer, settings.forward_fn, lambda _, output: output)
                if settings.methods_with_gradients:
                    passes.output_gradients(measured_on(batch), settings.forward_fn)
                if settings.needs_inputs:
                    self.inputs = passes.layer_inputs([measured_on(batch)], settings.forward_fn)
                    if not self.inputs:
                        return ValueError(_NO_INPUTS.format(type(module).__name__))
                if settings.methods_that_train:
                    blocks = settings.scope.blocks
                    try_training(lambda some: passes.distillation(some, settings.forward_fn, blocks), batch, settings)
                if settings.methods_with_gradients or settings.methods_that_train:
                    passes.check_forward(measured_on(batch), settings.forward_fn)
        except Exception as error:  # of the user's step, in any way
            return error
        return None


_NO_INPUTS = (
    "no weight of {} is multiplied by an input that can be seen, as where weight_norm computes them: leave out the "
    "methods that go by the layers' inputs, such as wanda"
)


class CalibrationPasses:
    """Passes over calibration data with the weights as they stand, for the methods that fit something on it.

    Args:
        settings: say what the methods need of the data.
        passes: of the trainer that holds the weights.
        data: the data, taken before.

    Attributes:
        source: name of the data that q is searched on, for the results; empty where none is needed.
        inputs: statistics of the fine-tuned model's layer inputs by canonical name; empty where no method needs them.
        gradients: of the output's error; None where no method needs them.
        distillation: trains kept values and factors; None where no method does.
    """

    def __init__(self, settings: PruneSettings, passes: EvaluationPasses, data: CalibrationData) -> None:
        self._settings, self._passes, self.source = settings, passes, data.source
        self._batch = None if data.batch is None else data.batch.batch
        self._labelled = None if data.labelled is None else data.labelled[0]
        self._output_change: OutputChange | None = None
        self.inputs: dict[str, InputStatistics] = {}
        self.gradients: BatchGradients | None = None
        self.distillation: Distillation | None = None

    def measure_finetuned(self) -> None:
        """Measure the fine-tuned model, whose weights the module holds now, as the pruned ones are compared with it."""
        settings, passes = self._settings, self._passes
        if self._batch is None:
            return
        batch = measured_on(self._batch)
        layer = settings.output_layer_of(passes.trainer.lightning_module)
        outputs = partial(passes.outputs, batch, layer, settings.forward_fn)
        self._output_change = OutputChange(outputs, settings.output_measure)
        self._output_change.take_reference()
        if settings.needs_inputs or settings.uses_moments:
            pieces = pieces_of(self._batch, SAMPLES)
            self.inputs = passes.layer_inputs(pieces, settings.forward_fn, products=settings.uses_moments)
        if settings.methods_with_gradients:
            self.gradients = passes.output_gradients(batch, settings.forward_fn)
        if settings.methods_that_train:
            self.distillation = passes.distillation(self._batch, settings.forward_fn, settings.scope.blocks)

    def with_inputs(self, plan: PruningPlan) -> PruningPlan:
        """See :func:`with_known_inputs`."""
        return with_known_inputs(plan, self.inputs, self._settings)

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


def measured_on(batch: Any) -> Any:
    """The samples that outputs are compared on at once: the first 64 of a batch that can be cut."""
    return pieces_of(batch, SAMPLES)[0] if samples_of(batch) > SAMPLES else batch


def try_training(make: Callable[[Any], Distillation], batch: Any, settings: PruneSettings) -> None:
    """Try on some samples what training is made of, without what it warns of, which is said when it is made.

    Args:
        make: makes it of a batch.
        batch: the calibration data.
        settings: of the methods that train.

    Raises:
        CannotTrain: settings by which the model cannot be trained.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        training = make(measured_on(batch))
    for method in settings.methods_that_train:
        training.check_settings(settings.method_settings.get(method, {}))


def labelled_loader(trainer: pl.Trainer, dataloader: Iterable[Any] | None) -> tuple[Any, str]:
    """Labelled data for the objective ``metric``: a loader, and the name of its data for the results.

    Args:
        trainer: with its DataModule, if it has one.
        dataloader: the one that the user gave; default the DataModule's ``calibration_dataloader()``.

    Raises:
        ValueError: if there is neither: q would have to be chosen on the split that is scored or on training data; or
            if it can be iterated only once.
    """
    loaders, source = _calibration_loaders(trainer, dataloader)
    if loaders is None:
        raise ValueError(
            "objective='metric' needs labelled data that was neither trained on nor is scored: give the DataModule a "
            "calibration_dataloader(), or pass calibration_dataloader=; or take objective='output_change' (no labels)"
        )
    if isinstance(loaders, Iterator):
        raise ValueError(
            f"{source} is an iterator ({type(loaders).__name__}), which is used up after one pass; objective='metric' "
            "needs a pass for each q: give a DataLoader or a list of batches"
        )
    return loaders, source.removeprefix("the ")


def _calibration_loaders(trainer: pl.Trainer, dataloader: Iterable[Any] | None) -> tuple[Any, str]:
    """The user's loader or the DataModule's, and its name; None and no name where there is neither."""
    if dataloader is not None:
        return dataloader, "calibration_dataloader="
    make_loader = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
    return (None, "") if make_loader is None else (make_loader(), "the calibration split")


def _training_loaders(trainer: pl.Trainer) -> CombinedLoader:
    """The training loaders of a trainer that does not train."""
    source = trainer.fit_loop._data_source
    if source.instance is None or not source.is_defined():
        raise ValueError(f"methods that calibrate need a batch of data, and there is no training data: {CURE}")
    try:
        loaders = source.dataloader()
    except Exception as error:
        module = trainer.datamodule  # type: ignore[attr-defined]
        if module is None:
            raise ValueError(f"the training data cannot be had ({_line(error)}): {CURE}") from error
        module.setup("fit")  # many DataModules take their training data there
        loaders = source.dataloader()
    return loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)


def _try_labelled(trainer: pl.Trainer, settings: PruneSettings, loaders: Any, source: str) -> None:
    """Score one batch of labelled data.

    Raises:
        ValueError: if there is no batch, or its evaluation does not log the monitor.
    """
    taken = own_batch(loaders, source)
    batch = taken.parts[0].batch if taken.parts else taken.batch
    try:
        with _as_it_was(trainer):
            EvaluationPasses(trainer, settings.monitor).score(OneBatch(batch))
    except Exception as error:
        raise ValueError(
            f"{source} cannot be scored for objective='metric': {_line(error)}. Its batches must be as the evaluation "
            "step takes them"
        ) from error


@contextmanager
def _as_it_was(trainer: pl.Trainer) -> Iterator[None]:
    """The module's modes, its training, and what Lightning notes of the loop that it is in, are as before after a pass
    that failed or that was made between two steps."""
    module: Any = trainer.lightning_module
    modes = [(child, child.training) for child in module.modules()]
    connector: Any = trainer._logger_connector
    noted = (module._current_fx_name, connector._first_loop_iter)
    try:
        with training_as_it_was(trainer):
            yield
    finally:
        for child, training in modes:
            child.training = training
        module._current_fx_name, connector._first_loop_iter = noted


def _broadcast(trainer: pl.Trainer, taken: CalibrationBatch) -> CalibrationBatch:
    """The first rank's batch, on all ranks."""
    on_cpu = replace(
        taken,
        batch=move_data_to_device(taken.batch, "cpu"),
        parts=tuple(replace(part, batch=move_data_to_device(part.batch, "cpu")) for part in taken.parts),
    )
    received: CalibrationBatch = trainer.strategy.broadcast(on_cpu)
    return received


def _line(error: Exception) -> str:
    """An error as part of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removeprefix("ValueError: ").rstrip(".: ")


def with_known_inputs(plan: PruningPlan, inputs: Mapping[str, InputStatistics], settings: PruneSettings) -> PruningPlan:
    """A plan that knows the inputs of the layers, where a method goes by them; warns of linear maps of which they are
    not known.

    Args:
        plan: of both models.
        inputs: what weights see as input on calibration data, by canonical name.
        settings: of the callback.

    Raises:
        ValueError: they are not known of most.
    """
    if not (settings.needs_inputs or settings.uses_moments) or not inputs:
        return plan
    plan = plan.with_inputs(inputs)
    for method in settings.methods if settings.needs_inputs else ():
        if unknown := unknown_inputs(plan.pairs, method, settings.method_settings.get(method, {})):
            rank_zero_warn(unknown)
    return plan
