"""PruneSettings: what a pruning callback is asked to do, checked before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from dpp_lightning.calibration.output_change import MEASURES, Measure
from dpp_lightning.callbacks.prune_run.evaluation import ForwardFn
from dpp_lightning.callbacks.prune_run.hub_upload import repository_ids
from dpp_lightning.callbacks.prune_run.lora_view import AdapterView
from dpp_lightning.experiments.row_groups import Row, grid
from dpp_lightning.methods.pruning_spec import PruningSpec, with_numbers_of_bytes
from dpp_lightning.methods.registry import METHODS, get_method
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.sampling.sampler import exact_rate, stream_key
from dpp_lightning.tensors.dtypes import DTYPES
from dpp_lightning.tensors.names import without_adapters

LAST_HIDDEN = "last_hidden"
SAMPLES = 64  # of calibration, that outputs are compared on at once


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """The settings of one :class:`~dpp_lightning.callbacks.DeltaPruneCallback`, whose docstring explains them.

    ``methods``, ``rates``, ``seeds`` and ``scope`` hold what the callback's arguments of similar names say, and
    ``callback`` is the name of the callback's class, for messages.

    Raises:
        ValueError: if anything is wrong with them. The message names every fault.
    """

    methods: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    monitor: str
    mode: Literal["max", "min"]
    output_dir: str | None
    pretrained: str | None
    revision: str | None
    objective: Literal["output_change", "metric"]
    calibration_samples: int | None
    calibration_dataloader: Iterable[Any] | None
    output_layer: str | None
    output_measure: Measure
    forward_fn: ForwardFn | None
    scope: Scope
    dtype: str | None
    method_settings: Mapping[str, Mapping[str, str | float]]
    apply: bool
    ckpt: Literal["last", "best"]
    plot: bool | str
    resume: bool
    save_deltas: bool
    lora: AdapterView | None
    push_to_hub: str | None
    hub_private: bool | None
    callback: str = "DeltaPruneCallback"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "method_settings", {name: with_numbers_of_bytes(s) for name, s in self.method_settings.items()}
        )
        faults = [
            *_refused(get_method, self.methods),
            *_refused(exact_rate, self.rates),
            *_refused(lambda seed: stream_key("", seed), self.seeds),
            *self._choice_faults(),
            *self._list_faults(),
            *self._method_faults(),
            *self._plot_faults(),
            *self._apply_faults(),
        ]
        if self.calibration_samples is not None and self.calibration_samples < 1:
            faults.append(f"calibration_samples must be at least 1, got {self.calibration_samples}")
        if not faults:  # what is uploaded where follows from settings that are right
            faults += self._hub_faults()
        if faults:
            raise ValueError(f"{self.callback}: " + "; ".join(faults))

    @property
    def rows(self) -> list[Row]:
        """Every (method, pruning rate, seed) to be pruned, in order; one seed for a method that draws nothing."""
        return grid(self.methods, self.rates, self.seeds)

    @property
    def specs(self) -> list[PruningSpec]:
        """What every method does at every pruning rate, of one seed."""
        return [
            PruningSpec(method, rate, self.seeds[0], method_settings=self.method_settings.get(method, {}))
            for method in self.methods
            for rate in self.rates
        ]

    @property
    def repositories(self) -> dict[str, str]:
        """Names of delta folders to the ids of the hub repositories that they are uploaded to."""
        return {} if self.push_to_hub is None else repository_ids(self.push_to_hub, self.rows)

    @property
    def fits(self) -> bool:
        """Whether a method fits something on calibration data."""
        return any(get_method(name).fit is not None for name in self.methods)

    @property
    def needs_inputs(self) -> bool:
        """Whether a method needs what the layers see as input on calibration data."""
        return any(get_method(name).needs_inputs(self.method_settings.get(name, {})) for name in self.methods)

    @property
    def uses_moments(self) -> bool:
        """Whether a method uses second moments of the layers' inputs."""
        return any((fit := get_method(name).fit) is not None and fit.uses_moments for name in self.methods)

    @property
    def methods_that_train(self) -> list[str]:
        """The methods that train kept values or factors on the outputs of the fine-tuned model."""
        fits = {name: get_method(name).fit for name in self.methods}
        return [name for name, fit in fits.items() if fit is not None and fit.needs_distillation]

    @property
    def needs_batch(self) -> bool:
        """Whether a method needs gradients or trains, whatever q is searched by."""
        return bool(self.methods_with_gradients or self.methods_that_train)

    @property
    def samples(self) -> int:
        """Calibration samples: those asked for, or as many as the method that takes most has by default."""
        fits = [get_method(name).fit for name in self.methods]
        most = max((fit.samples for fit in fits if fit is not None), default=SAMPLES)
        return most if self.calibration_samples is None else self.calibration_samples

    @property
    def methods_with_gradients(self) -> list[str]:
        """The methods that need gradients of the output on calibration data."""
        fits = {name: get_method(name).fit for name in self.methods}
        return [name for name, fit in fits.items() if fit is not None and fit.needs_gradients]

    def output_layer_of(self, module: nn.Module) -> str | None:
        """Name of the submodule whose output is compared; None for the last one with parameters.

        Raises:
            ValueError: if the setting is ``last_hidden`` and the module does not say which layer that is.
        """
        if self.output_layer != LAST_HIDDEN:
            return self.output_layer
        layer = getattr(module, "output_layer", None)
        if not isinstance(layer, str):
            raise ValueError(
                f"output_layer='{LAST_HIDDEN}' needs a module with an attribute output_layer (a submodule's name), "
                f"which {type(module).__name__} has not; name the submodule itself"
            )
        return layer if layer in dict(module.named_modules()) else without_adapters(layer)

    def _choice_faults(self) -> list[str]:
        choices: tuple[tuple[str, Any, Sequence[Any]], ...] = (
            ("mode", self.mode, ("max", "min")),
            ("objective", self.objective, ("output_change", "metric")),
            ("output_measure", self.output_measure, MEASURES),
            ("ckpt", self.ckpt, ("last", "best")),
            ("dtype", self.dtype, (None, *DTYPES)),
            ("lora", self.lora, (None, "adapter", "merged")),
        )
        return [
            f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}"
            for name, value, allowed in choices
            if value not in allowed
        ]

    def _list_faults(self) -> list[str]:
        lists: tuple[tuple[str, Sequence[Any]], ...] = (
            ("method", self.methods),
            ("pruning_rate", self.rates),
            ("seeds", self.seeds),
        )
        return [
            f"{name} must name at least one value and none twice, got {list(values)}"
            for name, values in lists
            if not values or len(set(values)) != len(values)
        ]

    def _method_faults(self) -> list[str]:
        """Settings of a method that is not run or does not have them; a dtype that would lose a method's values."""
        faults = []
        for name in self.method_settings:
            if name not in self.methods:
                faults.append(f"method_settings name {name!r}, which is not among the methods {list(self.methods)}")
        for name in self.methods:
            for rate in self.rates if name in METHODS and not _refused(exact_rate, self.rates) else ():
                faults += _refused(partial(METHODS[name].check, rate), [self.method_settings.get(name, {})])
        for name in self.methods if self.dtype in DTYPES else ():
            if name in METHODS:
                faults += _refused(partial(METHODS[name].check_dtype, name), [self.dtype])
        return [*dict.fromkeys(faults)]

    def _plot_faults(self) -> list[str]:
        """A curve over q of a method that is not run, or that has more than one q."""
        if not isinstance(self.plot, str):
            return []
        if self.plot not in self.methods:
            return [f"plot names {self.plot!r}, which is not among the methods {list(self.methods)}"]
        if self.plot in METHODS and (fit := METHODS[self.plot].fit) is not None and not fit.one_q:
            return [f"plot={self.plot!r}: that method has more than one q, so there is no curve over q"]
        return []

    def _apply_faults(self) -> list[str]:
        faults = []
        if self.apply and self.resume:
            faults.append(
                "apply=True leaves the pruned model in place, which resume=True would not make again: take one"
            )
        if self.apply and len(self.methods) * len(self.rates) * len(self.seeds) != 1:
            faults.append("apply=True leaves one pruned model in place: give a single method, pruning_rate and seed")
        return faults

    def _hub_faults(self) -> list[str]:
        if self.push_to_hub is None:
            return [] if self.hub_private is None else ["hub_private says nothing without push_to_hub: give both"]
        faults = [] if self.save_deltas else ["push_to_hub uploads delta folders, but save_deltas=False saves none"]
        return faults + _refused(lambda _: self.repositories, [self.push_to_hub])


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A setting that may be one value or a sequence of values, as a tuple."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _refused(check: Callable[[Any], Any], values: Sequence[Any]) -> list[str]:
    """The messages of the values that a check refuses with a ValueError."""
    faults = []
    for value in values:
        try:
            check(value)
        except ValueError as error:
            faults.append(str(error))
    return faults
