"""METHODS: the papers' names, one row each: a selection times a rescaling."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, Literal, get_args, get_type_hints

from dpp_lightning.methods import layerwise_rates, rescaling, selections, structured, wanda
from dpp_lightning.sampling.sampler import exact_rate
from dpp_lightning.tensors.dtypes import FLOATS, INTEGERS, check_dtype

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

Fitted = Literal["q", "layer", "learned", "partitions"]


@dataclass(frozen=True)
class Method:
    """One pruning method.

    Attributes:
        select: which entries stay.
        rescale: q from the pruning rate alone; for a method that searches q this is its first candidate.
        paper, url: where it comes from.
        fitted: what is found on calibration data, see :mod:`dpp_lightning.calibration.fit_rescaling`: one ``q`` for the
        model, one q a
            ``layer`` from a formula, one trained coefficient a layer (``learned``), a factor for each of the
            ``partitions``; None where nothing is.
        needs_search: without that search it is no longer this method.
        options: a function whose keyword-only parameters are further settings, those of the fit.
        inputs: the selection needs the inputs of the layers on calibration data.
        seeded: the kept positions follow from (seed, name, position), so that a file need not store them.
        random: the mask depends on the seed.
        weighs: the selection itself gives the kept values their weights.
    """

    select: selections.Selection
    rescale: Callable[[float], float]
    paper: str
    url: str
    fitted: Fitted | None = None
    needs_search: bool = False
    options: Callable[..., Any] | None = None
    inputs: bool = False
    seeded: bool = False
    random: bool = True
    weighs: bool = False

    def check(self, pruning_rate: float, settings: Mapping[str, Any]) -> None:
        """Refuse a rate or settings that the method does not have.

        Raises:
            ValueError: a rate outside [0, 1), an unknown setting, or an unknown choice of one.
        """
        exact_rate(pruning_rate)
        known = self.settings
        for name, value in settings.items():
            if name not in known:
                raise ValueError(f"unknown method setting {name!r}; this method has {', '.join(known) or 'none'}")
            choices = known[name]
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
            if not choices and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name} must be a number, got {value!r}")

    def needs_inputs(self, settings: Mapping[str, Any]) -> bool:
        """Whether selection or fit need the layers' inputs on calibration data, under these settings."""
        return self.inputs or self.fitted == "layer" or settings.get("score") == "activation"

    def selection_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the settings that the selection takes; the others are the fit's."""
        own = _keyword_only(self.select)
        return {name: value for name, value in settings.items() if name in own}

    def check_dtype(self, name: str, dtype: str | None) -> None:
        """Refuse a dtype of the kept values that is not known, or that this method's values would be lost in.

        Args:
            name: the method's.
            dtype: one of ``value_code.DTYPES``, or None for the values' own.

        Raises:
            ValueError: as said.
        """
        check_dtype(dtype)
        if self.weighs and dtype in INTEGERS:
            raise ValueError(
                f"{name} weighs the kept values, most of them to one magnitude that costs a bit each; {dtype} would "
                f"lose it: take one of {', '.join(FLOATS)}"
            )

    def check_q(self, name: str, pruning_rate: float, q: float | None, *, searched: bool) -> None:
        """Refuse a q that cannot be, and a method that searches q without anything to search it by.

        Args:
            name: the method's.
            pruning_rate: p in [0, 1).
            q: given by hand, or None.
            searched: an objective is at hand.

        Raises:
            ValueError: as said.
        """
        if q is not None:
            rescaling.check_q(q, pruning_rate)
            if self.fitted not in (None, "q"):
                raise ValueError(f"{name} has more than one q; leave q= out, or take method 'darex-q' to give one")
        elif self.needs_search and not searched and pruning_rate > 0:
            raise ValueError(
                f"{name} searches q: give calibration data (calibration=, --calibration), or q by hand (q=, --q), or "
                "take method 'dare' for q = 1 - pruning_rate"
                if self.fitted == "q"
                else f"{name} fits its rescaling: give calibration data (calibration=, --calibration)"
            )

    @property
    def settings(self) -> dict[str, tuple[str, ...]]:
        """The method's own settings and their choices; none where a number is wanted."""
        functions = [self.select] if self.options is None else [self.select, self.options]
        return {name: choices for function in functions for name, choices in _keyword_only(function).items()}


def _keyword_only(function: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(function)
    keyword = [p.name for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {name: tuple(c for c in get_args(hints[name]) if isinstance(c, str)) for name in keyword}


_Q: dict[str, Any] = {"fitted": "q", "needs_search": True}

METHODS: dict[str, Method] = {
    "random-drop": Method(selections.random, rescaling.no_rescaling, *_DARE, seeded=True),
    "dare": Method(selections.random, rescaling.keep_rate, *_DARE, seeded=True),
    "darex-q": Method(selections.random, rescaling.keep_rate, *_DAREX, seeded=True, **_Q),
    "darex-q-layer": Method(
        selections.random, rescaling.keep_rate, *_DAREX,
        fitted="layer", needs_search=True, options=rescaling.layer_q, seeded=True,
    ),
    "darex-learned": Method(
        selections.random, rescaling.keep_rate, *_DAREX, fitted="learned", needs_search=True, seeded=True
    ),
    "magnitude": Method(selections.magnitude, rescaling.no_rescaling, *_DAREX, random=False),
    "wanda": Method(wanda.wanda, rescaling.no_rescaling, *_WANDA, inputs=True, random=False),
    "owl": Method(layerwise_rates.owl, rescaling.no_rescaling, *_OWL, random=False),
    "dp": Method(layerwise_rates.dp, rescaling.no_rescaling, *_DPPA, random=False),
    "dppa": Method(
        layerwise_rates.dp, rescaling.no_rescaling, *_DPPA, fitted="partitions", needs_search=True, random=False
    ),
    "dare-dpa": Method(
        selections.random, rescaling.keep_rate, *_DPPA, fitted="partitions", needs_search=True, seeded=True
    ),
    "struct-dare": Method(structured.structured, rescaling.keep_rate, *_DAREX),
    "struct-darex-q": Method(structured.structured, rescaling.keep_rate, *_DAREX, **_Q),
    "importance": Method(selections.importance, rescaling.keep_rate, *_HORVITZ, fitted="q", weighs=True),
}  # fmt: skip


def get_method(name: str) -> Method:
    """The row of a method.

    Raises:
        ValueError: unknown name; the message lists the known ones and the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(str(name).lower().replace("_", "-"), METHODS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown pruning method {name!r}; {hint}known are {', '.join(METHODS)}")
