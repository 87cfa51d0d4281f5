"""Selections: which entries of a delta are kept.

Each is a function of all pruned tensors that yields the kept entries of one tensor after the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from dpp_lightning.methods import training
from dpp_lightning.methods.exact_ranking import at_least, inclusion_rate, largest
from dpp_lightning.methods.kept_entries import GrowingBuffer, KeptEntries, exact_count, true_positions
from dpp_lightning.methods.rescaling import keep_rate
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.methods.top_scores import above, ranked, scores_of
from dpp_lightning.sampling.sampler import exact_rate, kept_positions_of, uniform_words
from dpp_lightning.tensors.shards import is_dtensor

Budget = Literal["tensor", "model"]
Score = Literal["magnitude", "activation"]
Where = Literal["linear", "all"]

_MARGIN = 1 + 1e-6  # above what single precision can be wrong by
_SAMPLE, _RUN = 1 << 19, 256  # entries of a sample of all tensors, about, and of one of its runs at most


class Selection(Protocol):
    """A selection: from all pruned tensors, the rate, the mask seed and the method's own settings to the kept entries.

    Yields one :class:`KeptEntries` for each pair in order; reads a tensor in blocks and holds the kept entries of one
    tensor.
    """

    def __call__(self, pairs: Sequence[TensorPair], pruning_rate: float, seed: int, /) -> Iterator[KeptEntries]: ...


def random(pairs: Sequence[TensorPair], pruning_rate: float, seed: int) -> Iterator[KeptEntries]:
    """Keep each entry independently with probability 1 - p (DARE, Yu et al. 2024), whatever its value.

    A function of (seed, name, position) alone, see :mod:`dpp_lightning.sampling.sampler`.
    """
    for positions in kept_positions_of([(pair.name, pair.numel) for pair in pairs], pruning_rate, seed):
        yield KeptEntries(torch.from_numpy(positions))


def random_in_maps(
    pairs: Sequence[TensorPair], pruning_rate: float, seed: int, *, where: Where = "linear"
) -> Iterator[KeptEntries]:
    """:func:`random`, for a method whose whole budget goes to some of the tensors.

    Args:
        pairs, pruning_rate, seed: as for every selection; of the tensors that the method covers.
        where: ``linear`` are the weights of linear maps and convolutions, ``all`` is every tensor.
    """
    if where not in get_args(Where):
        raise ValueError(f"where must be 'linear' or 'all', got {where!r}")
    yield from random(pairs, pruning_rate, seed)


def of_auto(
    pairs: Sequence[TensorPair], pruning_rate: float, seed: int, *, max_bytes: float = 0, max_loss: float = 0
) -> Iterator[KeptEntries]:
    """``auto`` has no selection of its own: it makes the forms of others and keeps the best.

    Args:
        pairs, pruning_rate, seed: as for every selection.
        max_bytes: of the delta's two files.
        max_loss: on held-out calibration data: 0 is the fine-tuned model's, 2 the base's.

    Raises:
        ValueError: always.
    """
    raise ValueError("auto chooses among other methods on calibration data, so that it cannot be drawn alone")


def verify_limits(settings: Mapping[str, Any]) -> None:
    """Refuse settings of ``auto`` without a limit, or of training that are out of their range.

    Raises:
        ValueError: not exactly one of ``max_bytes`` and ``max_loss``, or one that is not above 0; or as of training.
    """
    training.verify(settings)
    given = {name: settings[name] for name in ("max_bytes", "max_loss") if settings.get(name)}
    if len(given) != 1 or next(iter(given.values())) <= 0:
        raise ValueError(
            "auto goes by one limit above 0: max_bytes= of the file, or max_loss= on held-out calibration data "
            "(--max_bytes 50kB, --max_loss 0.1)"
        )


def magnitude(
    pairs: Sequence[TensorPair], pruning_rate: float, seed: int, *, budget: Budget = "tensor"
) -> Iterator[KeptEntries]:
    """Keep the k = n - floor(p n) largest |delta| (MP), exactly k; where they are equal, the first.

    Args:
        pairs, pruning_rate: as for every selection.
        seed: not used.
        budget: ``tensor`` counts n in each tensor, ``model`` over all of them.
    """
    if budget == "tensor":
        yield from ranked(pairs, [exact_count(pair.numel, pruning_rate) for pair in pairs])
        return
    threshold, left = None, 0
    for pair, group in _budgets(pairs, budget):
        if group:
            count = exact_count(sum(p.numel for p in group), pruning_rate)
            threshold = largest(partial(scores_of, group, "magnitude"), count) if count else None
            left = threshold.ties if threshold else 0
        kept, left = above(pair, threshold, left)
        yield kept


def importance(
    pairs: Sequence[TensorPair], pruning_rate: float, seed: int, *, budget: Budget = "model", score: Score = "magnitude"
) -> Iterator[KeptEntries]:
    """Keep entry j independently with probability pi_j = min(1, lambda s_j), with sum of pi = (1 - p) n.

    The value is (delta_j / pi_j)(1 - p), so that q = 1 - p gives the unbiased (Horvitz-Thompson) estimate of least
    variance. Below the cap every value is the same but for its sign (and the scale of its input feature).

    Args:
        pairs, pruning_rate: as for every selection.
        seed: of one 32-bit word per entry, a function of (seed, name, position).
        budget: ``model`` counts n over all pruned tensors, ``tensor`` in each.
        score: s_j is |delta_j| (``magnitude``, no data), or that times the root mean square of its input
            (``activation``: 1 for biases and norms, the root of a token's share for embeddings).
    """
    keep = 1 - exact_rate(pruning_rate)
    for pair, group in _budgets(pairs, budget):
        if group:
            total = float(keep * sum(p.numel for p in group))
            rate, cap = inclusion_rate(partial(scores_of, group, score), total, _sample(group, score))
        positions, values = GrowingBuffer(torch.int64), GrowingBuffer(torch.float32)
        for start, delta, scores in pair.scores(score):
            kept, value = _weighed(pair, start, delta, scores, rate, cap, keep_rate(pruning_rate), seed)
            positions.append(kept)
            values.append(value)
        yield KeptEntries(positions.tensor(), values.tensor())


def _sample(pairs: Sequence[TensorPair], kind: str) -> tuple[Tensor, Tensor] | None:
    """Some of the scores, and how many each stands for; None of tensors in shards, which would be gathered for it."""
    if any(is_dtensor(pair.finetuned) for pair in pairs):
        return None
    samples, weights = [], []
    runs = min(max(_SAMPLE // (_RUN * max(len(pairs), 1)), 4), 64)
    for pair in (pair for pair in pairs if pair.numel):
        samples.append(pair.sampled_scores(kind, runs, _RUN))
        weights.append(torch.full((len(samples[-1]),), pair.numel / len(samples[-1])))
    return (torch.cat(samples), torch.cat(weights)) if samples else None


def _weighed(
    pair: TensorPair, start: int, delta: Tensor, scores: Tensor, rate: float, cap: int, keep: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Kept positions and values of one block, given lambda and the bits of the cap."""
    if rate == float("inf"):
        positions = true_positions(at_least(scores, cap))
    else:
        words = uniform_words(pair.name, seed, start, start + len(delta))
        # single precision leaves the few of which double precision then decides
        limits = (scores * (rate * 2.0**32 * _MARGIN)).numpy()
        near = true_positions(words.astype("float32") <= limits)
        drawn = torch.from_numpy(words[near.numpy()].astype("float64"))
        kept = at_least(scores[near], cap) | (drawn < scores[near].double() * (rate * 2.0**32))
        positions = near[kept]
    delta, scores = delta[positions], scores[positions]
    capped = at_least(scores, cap)
    # |delta| / score is exactly 1 without data, so that all values below the cap are one number but for their sign
    value = torch.where(capped, delta * keep, torch.sign(delta) * (keep / rate) * (delta.abs() / scores))
    return positions + start, value


def _budgets(pairs: Sequence[TensorPair], budget: Budget) -> Iterator[tuple[TensorPair, Sequence[TensorPair]]]:
    """Every pair; beside the first pair of each budget all pairs that share it, beside the others none."""
    if budget not in ("tensor", "model"):
        raise ValueError(f"budget must be 'tensor' or 'model', got {budget!r}")
    for index, pair in enumerate(pairs):
        yield pair, ([pair] if budget == "tensor" else pairs if index == 0 else ())
