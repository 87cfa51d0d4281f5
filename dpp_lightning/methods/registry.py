"""METHODS: the papers' names, one row each: a selection, a rescaling, and what is fitted on calibration data."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import entry_points
from inspect import signature
from math import isfinite
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

from dpp_lightning.methods import layerwise_rates, low_rank, rescaling, selections, structured, training, wanda
from dpp_lightning.sampling.sampler import exact_rate
from dpp_lightning.tensors.blocks import is_multiplied
from dpp_lightning.tensors.dtypes import FLOATS, INTEGERS, check_dtype
from dpp_lightning.tensors.factors import matrix_shape

_DARE = ("Language Models are Super Mario (ICML 2024)", "https://arxiv.org/abs/2311.03099")
_DAREX = ("DARE the Extreme (ICLR 2025)", "https://arxiv.org/abs/2410.09344")
_DPPA = ("DPPA: Pruning Method for Large Language Model to Model Merging (2024)", "https://arxiv.org/abs/2403.02799")
_OWL = ("Outlier Weighed Layerwise Sparsity (ICML 2024)", "https://arxiv.org/abs/2310.05175")
_WANDA = (
    "A Simple and Effective Pruning Approach for Large Language Models (ICLR 2024)",
    "https://arxiv.org/abs/2306.11695",
)
_HORVITZ = (
    "A Generalization of Sampling Without Replacement From a Finite Universe (JASA 1952)",
    "https://doi.org/10.1080/01621459.1952.10483446",
)

_ECKART = ("The approximation of one matrix by another of lower rank (1936)", "https://doi.org/10.1007/BF02288367")
_OURS = ("dpp_lightning: kept values trained by distillation", "https://arxiv.org/abs/1503.02531")

PLUGINS = "dpp_lightning.methods"  # the entry-point group of methods in other packages
_OF_ALL = ("pruning_rate", "seed", "dtype", "q", "calibration", "scope")  # what every method is given
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Fit:
    """What a method finds on calibration data once the kept entries are chosen.

    Attributes:
        find: ``(Calibrator, SparseDelta) -> FoundRescaling``, see :mod:`dpp_lightning.calibration.fit_rescaling`. It is
            the function or an object reference ``"package.module:function"``, imported when it is first needed.
        one_q: it finds one q for the whole model, which leaves the kept values as they were drawn. Otherwise it gives
            the kept values weights, so that they are drawn in float32 and cast once the weights are known.
        needs_inputs: it needs what the layers see as input on calibration data.
        needs_gradients: it needs gradients of the output on calibration data.
        needs_distillation: it trains on the outputs of the fine-tuned model, piece by piece of the calibration data.
        one_mask: what it finds belongs to one mask, so that it is found anew for every seed.
        samples: how many calibration examples it takes where no number is given.
        required: without it the method would be another one, so that pruning without calibration data is an error.
        options: a function whose keyword-only parameters are the fit's settings.
        draws: it draws the delta by itself: its function is ``(PruningPlan, PruningSpec, CalibrationSource, Report)
            -> (SparseDelta, FoundRescaling)``, and the method has no selection of its own.
        uses_moments: it uses the means and second moments of the layers' inputs, where there is calibration data.
    """

    find: str | Callable[..., Any]
    one_q: bool = False
    needs_inputs: bool = False
    needs_gradients: bool = False
    needs_distillation: bool = False
    one_mask: bool = False
    samples: int = 64
    required: bool = True
    options: Callable[..., Any] | None = None
    uses_moments: bool = False
    draws: bool = False

    @cached_property
    def function(self) -> Callable[..., Any]:
        """``find``, imported."""
        return resolve_name(self.find) if isinstance(self.find, str) else self.find


@dataclass(frozen=True)
class Method:
    """One pruning method.

    Attributes:
        select: which entries are kept.
        rescale: q from the pruning rate alone; for a method that fits one q this is its first candidate.
        paper, url: where it comes from.
        fit: what is found on calibration data; None where nothing is.
        inputs: the selection needs what the layers see as input on calibration data.
        seeded: the kept positions follow from (seed, tensor name, position), so that a file need not store them.
        random: the kept positions depend on the seed.
        weighs: the selection itself gives the kept values their weights.
        by_blocks: the selection goes by the linear maps in a model's blocks, and refuses a model without any; see
            :mod:`dpp_lightning.methods.block_checks`.
        covers: whether the method holds anything of a tensor in scope, given its canonical name, shape, and the
            settings; its whole budget goes to those, and the others get the base's values. None covers all.
        numbers: how many numbers the method keeps of the tensors that it covers, given their shapes, the rate among
            them, and the settings; None where the rate says it.
        ignores_rate: whether the settings say how much is kept, as a rank does, so that the rate plays no part; None
            where it always does.
        rest: the rate at which the method draws, by the sampler, what its factors leave of their tensors, given the
            settings; 1 draws nothing. None for a method without.
        dtype: of the kept values where none is asked for; None for the fine-tuned dtype.
        factors_dtype: of the numbers of factors, for a method that has them, unless the settings have another.
        verify: refuses settings that are out of their range by a ValueError.
        verify_at: the same of settings that do not go with the rate, which comes first.
    """

    select: selections.Selection
    rescale: Callable[[float], float]
    paper: str
    url: str
    fit: Fit | None = None
    inputs: bool = False
    seeded: bool = False
    random: bool = True
    weighs: bool = False
    by_blocks: bool = False
    covers: Callable[[str, Sequence[int], Mapping[str, Any]], bool] | None = None
    numbers: Callable[[Sequence[tuple[int, ...]], float, Mapping[str, Any]], float] | None = None
    ignores_rate: Callable[[Mapping[str, Any]], bool] | None = None
    rest: Callable[[Mapping[str, Any]], float] | None = None
    dtype: str | None = None
    factors_dtype: str | None = None
    verify: Callable[[Mapping[str, Any]], None] | None = None
    verify_at: Callable[[float, Mapping[str, Any]], None] | None = None

    def check(self, pruning_rate: float, settings: Mapping[str, Any]) -> None:
        """Refuse a rate or settings that the method does not have.

        Raises:
            ValueError: a rate outside [0, 1), an unknown setting, or an unknown choice of one.
        """
        exact_rate(pruning_rate)
        known = self.settings
        for name, value in settings.items():
            if name not in known:
                others = [other for other, row in METHODS.items() if name in row.settings]
                hint = f"it is one of {', '.join(others)}; " if others else _did_you_mean(str(name), [*known, *_OF_ALL])
                raise ValueError(f"unknown method setting {name!r}; {hint}this method has {', '.join(known) or 'none'}")
            choices = known[name]
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            if not choices and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not choices and not isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if self.verify is not None:
            self.verify(settings)
        if self.verify_at is not None:
            self.verify_at(pruning_rate, settings)

    def needs_inputs(self, settings: Mapping[str, Any]) -> bool:
        """Whether selection or fit need the layers' inputs on calibration data, under these settings."""
        return self.inputs or (self.fit is not None and self.fit.needs_inputs) or settings.get("score") == "activation"

    def selection_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the settings that the selection takes; the others are the fit's."""
        selects_by = _keyword_only(self.select)
        return {name: value for name, value in settings.items() if name in selects_by}

    def check_dtype(self, name: str, dtype: str | None) -> None:
        """Refuse a dtype of the kept values that is not known, or that this method's values would be lost in.

        Args:
            name: the method's.
            dtype: one of :data:`dpp_lightning.tensors.dtypes.DTYPES`, or None for the values' own.

        Raises:
            ValueError: an unknown dtype, or an integer dtype for a method that weighs the values itself.
        """
        check_dtype(dtype)
        if self.weighs and dtype in INTEGERS:
            raise ValueError(
                f"{name} weighs the kept values, most of them to one magnitude that costs a bit each; {dtype} would "
                f"lose it: take one of {', '.join(FLOATS)}"
            )

    @property
    def settings(self) -> dict[str, tuple[str, ...]]:
        """The method's own settings and their choices; none where a number is wanted."""
        functions = [self.select, *([self.fit.options] if self.fit and self.fit.options else [])]
        return {name: choices for function in functions for name, choices in _keyword_only(function).items()}


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known name nearest to a word, as a question; empty where none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _keyword_only(function: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(function)
    keyword = [p.name for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {name: tuple(c for c in get_args(hints[name]) if isinstance(c, str)) for name in keyword}


def _in_maps(name: str, shape: Sequence[int], settings: Mapping[str, Any]) -> bool:
    """What ``refit`` covers: the weights of linear maps and convolutions, or with ``where="all"`` every tensor."""
    return settings.get("where", "linear") == "all" or is_multiplied(name, shape)


def _maps_and_vectors(name: str, shape: Sequence[int], settings: Mapping[str, Any]) -> bool:
    """What ``lowrank`` covers: the weights of linear maps and convolutions, and tensors of one column."""
    return is_multiplied(name, shape) or matrix_shape(tuple(shape))[1] == 1


def _by_limit(_settings: Mapping[str, Any]) -> bool:
    """What ``auto`` keeps follows from its limit, never from a rate."""
    return True


# Fits belong to a higher room than methods, so the rows name them by object reference and import nothing of theirs.
_ONE_Q = Fit("dpp_lightning.calibration.q_search:fit_one_q", one_q=True)
_LAYER_Q = Fit("dpp_lightning.calibration.layer_q:fit_layer_q", needs_inputs=True, options=rescaling.layer_q)
_LEARNED = Fit("dpp_lightning.calibration.learned_rescaling:fit_coefficients", needs_gradients=True)
_PARTITIONS = Fit("dpp_lightning.calibration.dpa:fit_partitions")
_VALUES = Fit(
    "dpp_lightning.calibration.trained_values:fit_values",
    needs_distillation=True,
    one_mask=True,
    samples=512,
    options=training.Training,
)
_FACTORS = Fit(
    "dpp_lightning.calibration.factor_fit:fit_factors",
    needs_distillation=True,
    uses_moments=True,
    one_mask=True,
    required=False,
    samples=512,
    options=training.Training,
)
_CHOICE = Fit(
    "dpp_lightning.pruning.auto:choose",
    needs_distillation=True,
    uses_moments=True,
    draws=True,
    one_mask=True,
    samples=1024,
    options=training.Training,
)


class MethodTable(Mapping[str, Method]):
    """Method names to rows: those of this package, of :func:`register_method`, and of installed packages.

    Entry points of the group ``dpp_lightning.methods`` are loaded when the table is first looked at. One that cannot be
    loaded is left out with a warning that names it.
    """

    def __init__(self, rows: dict[str, Method]) -> None:
        self._rows, self._plugins_loaded = rows, False

    def register(self, name: str, method: Method) -> None:
        """See :func:`register_method`."""
        if not isinstance(method, Method):
            raise TypeError(f"method {name!r} must be a dpp_lightning.methods.Method, got {type(method).__name__}")
        if not _NAME.fullmatch(name):
            raise ValueError(f"a method is named in lower-case words with hyphens, such as 'top-rows'; got {name!r}")
        if name in self._rows and self._rows[name] != method:
            raise ValueError(f"there is a method {name!r} already; choose another name")
        self._rows[name] = method

    def __getitem__(self, name: str) -> Method:
        return self._with_plugins()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._with_plugins())

    def __len__(self) -> int:
        return len(self._with_plugins())

    def _with_plugins(self) -> dict[str, Method]:
        if not self._plugins_loaded:
            self._plugins_loaded = True
            for point in entry_points(group=PLUGINS):
                try:
                    self.register(point.name, point.load())
                except Exception as error:  # whatever another package raises, the methods of this one still work
                    warnings.warn(f"method {point.name!r} of {point.value} is left out: {error}", stacklevel=3)
        return self._rows


METHODS = MethodTable({
    "random-drop": Method(selections.random, rescaling.no_rescaling, *_DARE, seeded=True),
    "dare": Method(selections.random, rescaling.keep_rate, *_DARE, seeded=True),
    "darex-q": Method(selections.random, rescaling.keep_rate, *_DAREX, fit=_ONE_Q, seeded=True),
    "darex-q-layer": Method(selections.random, rescaling.keep_rate, *_DAREX, fit=_LAYER_Q, seeded=True),
    "darex-learned": Method(selections.random, rescaling.keep_rate, *_DAREX, fit=_LEARNED, seeded=True),
    "magnitude": Method(selections.magnitude, rescaling.no_rescaling, *_DAREX, random=False),
    "wanda": Method(wanda.wanda, rescaling.no_rescaling, *_WANDA, inputs=True, random=False),
    "owl": Method(
        layerwise_rates.owl, rescaling.no_rescaling, *_OWL, random=False, by_blocks=True, verify=layerwise_rates.verify
    ),
    "dp": Method(
        layerwise_rates.dp, rescaling.no_rescaling, *_DPPA, random=False, by_blocks=True, verify=layerwise_rates.verify
    ),
    "dppa": Method(
        layerwise_rates.dp, rescaling.no_rescaling, *_DPPA, fit=_PARTITIONS, random=False, by_blocks=True,
        verify=layerwise_rates.verify,
    ),
    "dare-dpa": Method(selections.random, rescaling.keep_rate, *_DPPA, fit=_PARTITIONS, seeded=True),
    "struct-dare": Method(
        structured.structured, rescaling.keep_rate, *_DAREX, by_blocks=True, verify_at=structured.verify_at
    ),
    "struct-darex-q": Method(
        structured.structured, rescaling.keep_rate, *_DAREX, fit=_ONE_Q, by_blocks=True, verify_at=structured.verify_at
    ),
    "importance": Method(
        selections.importance, rescaling.keep_rate, *_HORVITZ, fit=replace(_ONE_Q, required=False), weighs=True
    ),
    "refit": Method(
        selections.random_in_maps, rescaling.no_rescaling, *_OURS, fit=_VALUES, seeded=True, covers=_in_maps,
        dtype="int4", verify=training.verify,
    ),
    "lowrank": Method(
        low_rank.low_rank, rescaling.no_rescaling, *_ECKART, fit=_FACTORS, covers=_maps_and_vectors,
        numbers=low_rank.numbers_kept, ignores_rate=low_rank.by_rank, rest=low_rank.rest_of,
        dtype=low_rank.REST_DTYPE, factors_dtype=low_rank.FACTORS_DTYPE, verify=low_rank.verify,
    ),
    "auto": Method(
        selections.of_auto, rescaling.no_rescaling, *_OURS, fit=_CHOICE, ignores_rate=_by_limit,
        verify=selections.verify_limits,
    ),
})  # fmt: skip


def register_method(name: str, method: Method) -> None:
    """Add a method, for this process, to what every front door takes: ``prune``, the callback, ``dpp`` and sweeps.

    A package that ships a method declares it instead as an entry point of the group ``dpp_lightning.methods``, with the
    method's name and an object reference to its :class:`Method`.

    Args:
        name: lower-case words with hyphens, not taken yet.
        method: its row.

    Raises:
        TypeError: not a :class:`Method`.
        ValueError: a name that is taken or not of that form.
    """
    METHODS.register(name, method)


def get_method(name: str) -> Method:
    """The row of a method.

    Raises:
        ValueError: unknown name; the message lists the known ones and the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    hint = _did_you_mean(str(name).lower().replace("_", "-"), METHODS)
    raise ValueError(f"unknown pruning method {name!r}; {hint}known are {', '.join(METHODS)}")
