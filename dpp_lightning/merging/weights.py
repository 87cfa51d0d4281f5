"""Weights of a merge: one number for each delta, or one for each tensor and delta, given by name patterns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path

from dpp_lightning.storage.file_content import read_json
from dpp_lightning.storage.locate import not_found

Weight = float | Mapping[str, float]
Weights = float | Sequence[Weight] | Mapping[str, Weight]


class DeltaWeight:
    """The weight of one delta, tensor by tensor.

    Args:
        weight: one number; or names and glob patterns of tensors to numbers, where an exact name wins over patterns and
            a longer pattern over a shorter one.
        default: of a tensor that nothing matches.
    """

    def __init__(self, weight: Weight, default: float) -> None:
        self.weight, self.default = weight, default

    def __call__(self, name: str) -> float:
        """The weight at the tensor of that canonical name."""
        if not isinstance(self.weight, Mapping):
            return self.weight
        if name in self.weight:
            return self.weight[name]
        patterns = [pattern for pattern in self.weight if fnmatchcase(name, pattern)]
        return self.weight[max(patterns, key=len)] if patterns else self.default

    def unmatched(self, names: Collection[str]) -> list[str]:
        """Its names and patterns that are of none of some tensors."""
        given = self.weight if isinstance(self.weight, Mapping) else ()
        return [word for word in given if word not in names and not any(fnmatchcase(name, word) for name in names)]

    def plain(self) -> float | None:
        """The number, where it is one for all tensors."""
        return None if isinstance(self.weight, Mapping) else self.weight


def delta_weights(weights: Weights | None, tasks: Sequence[str], default: float) -> list[DeltaWeight]:
    """One :class:`DeltaWeight` for each task.

    Args:
        weights: None (the method's own), one number for all, one entry a delta in their order, or task to entry; an
            entry is a number or a mapping of tensor names and patterns to numbers.
        tasks: names of the deltas.
        default: the method's own weight.

    Raises:
        ValueError: another number of weights than deltas, tasks without a weight, or what is no finite number.
    """
    if weights is None:
        weights = default
    if isinstance(weights, Mapping):
        if set(weights) != set(tasks):
            raise ValueError(f"weights are given for {sorted(weights)}, the deltas are {sorted(tasks)}: name each once")
        listed: list[Weight] = [weights[task] for task in tasks]
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        listed = list(weights)
        if len(listed) == 1:
            listed *= len(tasks)
    else:
        listed = [weights] * len(tasks)
    if len(listed) != len(tasks):
        raise ValueError(f"got {len(listed)} weights for {len(tasks)} deltas: give one for each, or one for all")
    for weight in listed:
        for number in weight.values() if isinstance(weight, Mapping) else (weight,):
            if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number):
                raise ValueError(f"a weight is a finite number such as 0.4, got {number!r}")
    return [DeltaWeight(weight, default) for weight in listed]


def read_weights(words: Sequence[str]) -> Weights | None:
    """The command line's ``--weights``: numbers, or one JSON file.

    The file holds a list with an entry for each delta or an object of tasks, an entry being a number or an object of
    tensor names and patterns to numbers; AdaMerging writes such a file.

    Raises:
        ValueError: neither numbers nor a JSON file of that form.
    """
    if not words:
        return None
    try:
        return [float(word) for word in words]
    except ValueError:
        pass
    path = Path(words[0])
    if len(words) == 1 and not path.is_file():
        raise not_found(words[0], "JSON file", "--weights, which are numbers or a file:")
    if len(words) > 1:
        raise ValueError(f"--weights takes numbers or one JSON file, got {' '.join(words)!r}")
    content = read_json(path)
    if not isinstance(content, list | dict):
        raise ValueError(f"{path}: expected a list or an object of weights, got {type(content).__name__}")
    return content
