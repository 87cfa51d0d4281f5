"""METHODS: the papers' names, one row each: a selection times a rescaling."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, get_args, get_type_hints

from dpp_lightning import rescaling, selection
from dpp_lightning.sampling import exact_rate
from dpp_lightning.value_code import FLOATS, INTEGERS, check_dtype

_DARE = ("Language Models are Super Mario (ICML 2024)", "https://arxiv.org/abs/2311.03099")
_DAREX = ("DARE the Extreme (ICLR 2025)", "https://arxiv.org/abs/2410.09344")
_HORVITZ = (
    "A Generalization of Sampling Without Replacement From a Finite Universe (JASA 1952)",
    "https://doi.org/10.1080/01621459.1952.10483446",
)


@dataclass(frozen=True)
class Method:
    """One pruning method.

    Attributes:
        select: which entries stay.
        rescale: q from the pruning rate alone; for a method that searches q this is its first candidate.
        paper, url: where it comes from.
        searches_q: q is searched by an objective (output change or a metric), from 1 - p to 1, where there is data.
        needs_search: without that search it is no longer this method.
        seeded: the kept positions follow from (seed, name, position), so that a file need not store them.
        random: the mask depends on the seed.
        weighs: the selection itself gives the kept values their weights.
    """

    select: selection.Selection
    rescale: Callable[[float], float]
    paper: str
    url: str
    searches_q: bool = False
    needs_search: bool = False
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
            if value not in known[name]:
                raise ValueError(f"{name} must be one of {', '.join(known[name])}, got {value!r}")

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
        elif self.needs_search and not searched and pruning_rate > 0:
            raise ValueError(
                f"{name} searches q: give calibration data (calibration=, --calibration), or q by hand (q=, --q), or "
                "take method 'dare' for q = 1 - pruning_rate"
            )

    @property
    def settings(self) -> dict[str, tuple[str, ...]]:
        """The method's own settings and their choices."""
        hints = get_type_hints(self.select)
        keyword = [p.name for p in signature(self.select).parameters.values() if p.kind is p.KEYWORD_ONLY]
        return {name: get_args(hints[name]) for name in keyword}


METHODS: dict[str, Method] = {
    "random-drop": Method(selection.random, rescaling.no_rescaling, *_DARE, seeded=True),
    "dare": Method(selection.random, rescaling.keep_rate, *_DARE, seeded=True),
    "darex-q": Method(selection.random, rescaling.keep_rate, *_DAREX, searches_q=True, needs_search=True, seeded=True),
    "magnitude": Method(selection.magnitude, rescaling.no_rescaling, *_DAREX, random=False),
    "importance": Method(selection.importance, rescaling.keep_rate, *_HORVITZ, searches_q=True, weighs=True),
}


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
