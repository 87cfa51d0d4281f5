"""The sampler: known answers, golden vectors (they pin the file format), a slow twin, and its statistics."""

from fractions import Fraction
from hashlib import sha256
from itertools import pairwise
from math import comb

import numpy as np
import pytest

from dpp_lightning.sampling import BLOCK, _binomial_thresholds, exact_rate, kept_positions, philox, stream_key

# Random123's kat_vectors for philox4x32-10: counter, key, output
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# (name, entries, rate, seed) -> kept, first positions, SHA-256 of all positions as little-endian int64: never to change
GOLDEN = [
    (("embeddings.word_embeddings.weight", 11720448, 0.99, 0), 117567, [116, 308, 376, 378], "9d6bf86a484a9255"),
    (("encoder.layer.0.attention.self.query.weight", 147456, 0.9, 1), 14726, [2, 12, 14, 23], "1ed67e2ca16f7642"),
    (("encoder.layer.5.output.dense.bias", 384, 0.5, 2), 185, [2, 4, 5, 6], "bd59bcd9a3c6bdeb"),
    (("net.0.weight", 200000, 0.999, 12345), 210, [744, 2268, 2390, 3077], "5a3b41fd9b74ff88"),
    (("w", 131073, 0.1, 7), 117854, [0, 1, 2, 3], "40be0ecdf9bc7df5"),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, output):
    words = philox(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(int(w[0]) for w in words) == output


@pytest.mark.parametrize(("case", "kept", "first", "digest"), GOLDEN)
def test_golden_vectors(case, kept, first, digest):
    positions = kept_positions(*case)
    assert len(positions) == kept
    assert positions[:4].tolist() == first
    assert sha256(positions.astype("<i8").tobytes()).hexdigest()[:16] == digest


def twin(name: str, numel: int, pruning_rate: float, seed: int) -> list[int]:
    """The sampler as its docstring says it, one Python integer at a time."""
    keep = 1 - Fraction(str(pruning_rate))
    key = stream_key(name, seed)

    def words(counter):
        return [int(w[0]) for w in philox(tuple(np.array([c], dtype=np.uint64) for c in counter), key)]

    kept: list[int] = []
    for block in range(-(-numel // BLOCK)):
        size = min(BLOCK, numel - block * BLOCK)
        low, high, _, _ = words((0, block, 0, 0))
        draw = (high << 32) | low
        below, count = Fraction(0), -1
        while count < size and draw >= below:  # the number of thresholds 2**64 * CDF at or below the draw
            count += 1
            below += comb(size, count) * keep**count * (1 - keep) ** (size - count) * 2**64
        wanted = size - count if 2 * count > size else count
        chosen: set[int] = set()
        group = 0
        while len(chosen) < wanted:
            for word in words((group, block, 0, 1)):
                for lane in (word & 0xFFFF, word >> 16):
                    if lane < size * (BLOCK // size) and len(chosen) < wanted:
                        chosen.add(lane % size)
            group += 1
        rest = chosen if 2 * count <= size else set(range(size)) - chosen
        kept += [block * BLOCK + value for value in sorted(rest)]
    return kept


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("numel", [1, 7, 300, 1000])
def test_equals_the_slow_twin(numel, rate):
    for seed in (0, 5):
        assert kept_positions("layer.weight", numel, rate, seed).tolist() == twin("layer.weight", numel, rate, seed)


@pytest.mark.parametrize(("n", "keep"), [(10, Fraction(3, 10)), (65536, Fraction(1, 100)), (400, Fraction(1, 1000))])
def test_thresholds_are_the_binomial_distribution(n, keep):
    lowest, thresholds = _binomial_thresholds(n, keep)
    scipy_stats = pytest.importorskip("scipy.stats")
    counts = lowest + np.arange(len(thresholds))
    np.testing.assert_allclose(
        thresholds.astype(float) / 2.0**64, scipy_stats.binom.cdf(counts, n, float(keep)), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 0.99, 0.999])
def test_any_cut_gives_the_same_positions(rate):
    numel = 3 * BLOCK + 1234
    whole = kept_positions("w", numel, rate, 3)
    cuts = [0, 1, 70_000, 70_000, BLOCK * 2, numel - 1, numel]
    parts = [kept_positions("w", numel, rate, 3, start=a, stop=b) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.all(np.diff(whole) > 0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.99])
def test_keeps_each_entry_independently_with_probability_one_minus_p(rate):
    numel, seeds = 5000, 400
    hits = np.zeros(numel)
    counts, pairs = [], 0
    for seed in range(seeds):
        positions = kept_positions("w", numel, rate, seed)
        hits[positions] += 1
        counts.append(len(positions))
        pairs += int(np.sum(np.diff(positions) == 1))
    keep = 1 - rate
    spread = numel * keep * rate
    assert abs(np.mean(counts) - numel * keep) < 5 * (spread / seeds) ** 0.5
    assert 0.75 < np.var(counts) / spread < 1.3  # a fixed count would give 0
    assert np.abs(hits - seeds * keep).max() < 6 * (seeds * keep * rate) ** 0.5 + 4
    neighbours = seeds * (numel - 1) * keep**2
    assert abs(pairs - neighbours) < 6 * neighbours**0.5 + 6


def test_seed_and_name_change_the_draw():
    a, b, c = (set(kept_positions(n, 50_000, 0.9, s).tolist()) for n, s in (("x", 0), ("x", 1), ("y", 0)))
    for one, other in ((a, b), (a, c)):
        assert abs(len(one & other) - 500) < 150  # independent: 50,000 * 0.1 * 0.1


def test_rate_zero_keeps_everything_and_empty_tensors_nothing():
    assert kept_positions("w", 10, 0, 0).tolist() == list(range(10))
    assert kept_positions("w", 0, 0.9, 0).tolist() == []


@pytest.mark.parametrize("rate", [1, 1.0, -0.1, float("nan"), "many", None])
def test_refuses_rates_outside_zero_to_one(rate):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        exact_rate(rate)


@pytest.mark.parametrize("seed", [-1, 0.5, True, "0"])
def test_refuses_seeds_that_are_no_integer(seed):
    with pytest.raises(ValueError, match="mask seed"):
        kept_positions("w", 10, 0.5, seed)
