"""METHODS: the papers' names, one row each: a selection times a rescaling."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from dpp_lightning import rescaling, selection

_DARE = ("Language Models are Super Mario (ICML 2024)", "https://arxiv.org/abs/2311.03099")
_DAREX = ("DARE the Extreme (ICLR 2025)", "https://arxiv.org/abs/2410.09344")


@dataclass(frozen=True)
class Method:
    """One pruning method.

    Attributes:
        select: which entries stay.
        rescale: q from the pruning rate alone; for a method that searches q this is its first candidate.
        searches_q: q is searched by an objective (output change or a metric), from 1 - p to 1.
        seeded: the kept positions follow from (seed, name, position), so that a file need not store them.
        paper, url: where it comes from.
    """

    select: selection.Selection
    rescale: Callable[[float], float]
    searches_q: bool
    seeded: bool
    paper: str
    url: str


METHODS: dict[str, Method] = {
    "random-drop": Method(selection.random, rescaling.no_rescaling, False, True, *_DARE),
    "dare": Method(selection.random, rescaling.keep_rate, False, True, *_DARE),
    "darex-q": Method(selection.random, rescaling.keep_rate, True, True, *_DAREX),
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
