"""The sampler: golden vectors (they pin the file format), a slow twin, and its statistics."""

from fractions import Fraction
from hashlib import sha256
from itertools import count, islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpp_lightning.sampling import sampler
from dpp_lightning.sampling.sampler import (
    BLOCK,
    _gaps,
    exact_rate,
    kept_positions,
    kept_positions_of,
    stream_key,
    uniform_words,
)

# (name, entries, rate, seed) -> kept, first positions, SHA-256 of all positions as little-endian int64: never to change
GOLDEN = [
    (("embeddings.word_embeddings.weight", 11720448, 0.99, 0), 116984, [369, 443, 566, 672], "6a335b9d7df3261f"),
    (("encoder.layer.0.attention.self.query.weight", 147456, 0.9, 1), 14777, [7, 9, 27, 30], "c320042fa46f8344"),
    (("encoder.layer.5.output.dense.bias", 384, 0.5, 2), 191, [0, 1, 2, 9], "3393f10662b9a36f"),
    (("net.0.weight", 200000, 0.999, 12345), 241, [289, 2206, 4689, 7218], "9ca312461b9cb11e"),
    (("w", 131073, 0.1, 7), 118044, [0, 1, 2, 3], "d074ba2e297fedd6"),
    (("w", 5000000, 0.99999, 3), 39, [110915, 350134, 364616, 480749], "6864eef136dc2866"),
]


@pytest.mark.parametrize(("case", "kept", "first", "digest"), GOLDEN)
def test_golden_vectors(case, kept, first, digest):
    positions = kept_positions(*case)
    assert len(positions) == kept
    assert positions[:4].tolist() == first
    assert sha256(positions.astype("<i8").tobytes()).hexdigest()[:16] == digest


def twin(name: str, numel: int, pruning_rate: float, seed: int, start: int = 0) -> list[int]:
    """The sampler as its docstring says it, one Python integer at a time, from the block that has ``start`` on."""
    keep = 1 - Fraction(str(pruning_rate))
    drawn, (low, high) = min(keep, 1 - keep), stream_key(name, seed)
    left, thresholds = 2**128, []
    while len(thresholds) < 4096 and thresholds[-1:] != [2**32 - 1]:
        left = left * (1 - drawn).numerator // (1 - drawn).denominator
        thresholds.append((2**128 - left) // 2**96)
    kept: list[int] = []
    for block in range(start // BLOCK, -(-numel // BLOCK)):
        size, position, chosen = min(BLOCK, numel - block * BLOCK), -1, set()
        for output in count(1):
            quads = philox_4x64((block << 64) + output, high << 32 | low)
            for word in (half for quad in quads for half in (quad & 0xFFFFFFFF, quad >> 32)):
                gap = next((g for g, limit in enumerate(thresholds, 1) if word < limit), None)
                position += gap or len(thresholds)
                chosen |= {position} if gap and position < size else set()
            if position >= size - 1:
                break
        kept += [block * BLOCK + i for i in range(size) if (i in chosen) == (keep <= Fraction(1, 2))]
    return kept


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("numel", [1, 7, 300, 1000])
def test_equals_the_slow_twin(numel, rate):
    for seed in (0, 5):
        assert kept_positions("layer.weight", numel, rate, seed).tolist() == twin("layer.weight", numel, rate, seed)


def test_equals_the_slow_twin_beyond_the_first_block():
    numel = 5 * BLOCK + 300
    drawn = kept_positions("far", numel, 0.9, 2, start=5 * BLOCK)
    assert drawn.tolist() == twin("far", numel, 0.9, 2, 5 * BLOCK)


@pytest.mark.parametrize(
    "drawn", [Fraction(1, 2), Fraction(1, 10), Fraction(1, 100), Fraction(7, 10**5), Fraction(1, 10**7)]
)
def test_gaps_are_geometric(drawn):
    """One word passes L entries or draws at its gap: the share of entries that it draws, from exact sums."""
    gaps = _gaps(drawn)
    limits = [0, *gaps.thresholds.tolist()]
    survival = [Fraction(2**32 - limit, 2**32) for limit in limits]
    rate = (1 - survival[-1]) / sum(survival[:-1])
    assert abs(rate / drawn - 1) < Fraction(1, 10**7 if drawn > Fraction(1, 10**6) else 10**6)
    exact = Fraction(1)
    for number, share in enumerate(survival[:200]):
        assert 0 <= share - exact < Fraction(1, 2**32) * 1.001, number
        exact *= 1 - drawn
    assert gaps.mean == pytest.approx(float(sum(survival[:-1])), rel=1e-9)


def test_the_lookup_agrees_with_the_thresholds_for_every_upper_half():
    gaps, lower = _gaps(Fraction(1, 1000)), np.random.default_rng(0).integers(0, 2**16, (4, 2**16), dtype=np.uint32)
    words = (np.arange(2**16, dtype=np.uint32) << np.uint32(16)) | np.concatenate([lower, lower * 0, lower * 0 + 65535])
    words = np.append(words.reshape(-1), [gaps.thresholds, gaps.thresholds - 1]).astype(np.uint32)
    assert np.array_equal(gaps.steps(words), np.searchsorted(gaps.thresholds, words, side="right") + 1)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 0.99, 0.999])
def test_any_cut_gives_the_same_positions(rate):
    numel = 2 * BLOCK + 1234
    whole = kept_positions("w", numel, rate, 3)
    cuts = [0, 1, 70_000, 70_000, BLOCK, BLOCK + 1, BLOCK * 2, numel - 1, numel]
    pieces = [kept_positions("w", numel, rate, 3, start=a, stop=b) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(pieces), whole)
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


# Tensors of many sizes, and rates that draw what is kept and what is dropped
MIXED = [("a", 768), ("b", 0), ("c", 1), ("d", BLOCK + 5), ("e", 7), ("f", BLOCK), ("g", BLOCK - 1), ("h", 50_000)]
MIXED += [("i", 2)]
MIXED_GOLDEN = {
    0.05: "7a219097089605bd",
    0.5: "cc4e7c5feaf6ef39",
    0.51: "5f6febdbb1410562",
    0.95: "3f88e4bfef7cf031",
    0.9999: "06a241cb0585aaa4",
}


def digest(arrays) -> str:
    return sha256(b"".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()[:16]


@pytest.mark.parametrize(("rate", "expected"), MIXED_GOLDEN.items())
def test_golden_vectors_of_many_tensors(rate, expected):
    assert digest(kept_positions_of(MIXED, rate, 4)) == expected
    assert digest(kept_positions(name, numel, rate, 4) for name, numel in MIXED) == expected


def test_golden_vector_of_a_block_beyond_32_bits():
    positions = kept_positions("far", 2**58 + 1000, 0.99, 0, start=2**58 - 70_000)
    assert (positions[:4] - (2**58 - 70_000)).tolist() == [72, 604, 629, 816]
    assert digest([positions]) == "6303242446600aff"


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40) | st.integers(500, 4000) | st.integers(BLOCK - 2, BLOCK + 2), max_size=12),
    rate=st.sampled_from([0, 0.01, 0.2, 0.5, 0.7, 0.86, 0.88, 0.9, 0.99, 0.9999]),
    seed=st.integers(0, 2**40),
)
def test_tensors_drawn_together_are_those_drawn_alone(sizes, rate, seed):
    tensors = [(f"layer.{i}.weight", numel) for i, numel in enumerate(sizes)]
    together = list(kept_positions_of(iter(tensors), rate, seed))
    assert len(together) == len(tensors)
    for (name, numel), positions in zip(tensors, together, strict=True):
        assert positions.dtype == np.int64
        assert np.array_equal(positions, kept_positions(name, numel, rate, seed))


@pytest.mark.parametrize("rate", MIXED_GOLDEN)
@pytest.mark.parametrize(
    ("setting", "value"), [("_PIECE", 1), ("_PIECE", 37), ("_DEVIATIONS", 40), ("_DEVIATIONS", -1)]
)
def test_how_many_words_are_read_at_once_changes_nothing(monkeypatch, setting, value, rate):
    monkeypatch.setattr(sampler, setting, value)
    small = [(name, min(numel, 20_000)) for name, numel in MIXED]
    cut = digest(kept_positions_of(small, rate, 4))
    monkeypatch.undo()
    assert cut == digest(kept_positions_of(small, rate, 4))


def test_tensors_are_read_as_they_are_needed():
    endless = ((f"t{i}", 3 * BLOCK) for i in count())
    first = list(islice(kept_positions_of(endless, 0.9, 0), 3))
    assert all(np.array_equal(first[i], kept_positions(f"t{i}", 3 * BLOCK, 0.9, 0)) for i in range(3))


def test_many_tensors_refuse_what_one_refuses():
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        kept_positions_of([], 1.0, 0)
    with pytest.raises(ValueError, match="mask seed"):
        kept_positions_of([], 0.5, -1)
    with pytest.raises(ValueError, match="-3 entries"):
        list(kept_positions_of([("w", -3)], 0.5, 0))


def philox_4x64(counter: int, key: int) -> list[int]:
    """Philox-4x64-10 (Salmon et al., SC 2011) in Python integers: counter and key, lowest word first, to four words."""
    full = 2**64 - 1
    c0, c1, c2, c3 = (counter >> 64 * i & full for i in range(4))
    k0, k1 = key & full, key >> 64
    for _ in range(10):
        p0, p1 = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & full, (p0 >> 64) ^ c3 ^ k1, p0 & full
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & full, (k1 + 0xBB67AE8584CAA73B) & full
    return [c0, c1, c2, c3]


def test_uniform_words_are_philox_4x64_of_the_position():
    # Random123's kat_vectors
    assert [f"{w:x}" for w in philox_4x64(0, 0)[:2]] == ["16554d9eca36314c", "db20fe9d672d0fdc"]
    low, high = stream_key("w", 3, "importance")
    for start in (0, 5, 16, 1_000_003, 2**40 + 1):
        expected = []
        for position in range(start, start + 20):
            pair = philox_4x64(position // 8 + 1, high << 32 | low)[position % 8 // 2]
            expected.append(pair >> 32 if position % 2 else pair & 0xFFFFFFFF)
        assert uniform_words("w", 3, start, start + 20).tolist() == expected


def test_golden_vector_of_uniform_words():
    name = "encoder.layer.0.output.dense.weight"
    assert uniform_words(name, 3, 0, 4).tolist() == [1581536249, 798280090, 4035765787, 2167401106]
    assert uniform_words(name, 3, 1_000_003, 1_000_006).tolist() == [1507959159, 3503333731, 2863974368]


def test_any_cut_gives_the_same_uniform_words():
    whole = uniform_words("w", 0, 0, 1000)
    assert whole.dtype == np.uint32
    for start, stop in [(0, 0), (8, 8), (13, 13), (0, 1), (7, 9), (8, 16), (3, 998), (999, 1000)]:
        assert np.array_equal(uniform_words("w", 0, start, stop), whole[start:stop])


def test_uniform_words_are_uniform_and_their_own_for_seed_name_and_stream():
    number = 200_000
    words = uniform_words("w", 0, 0, number)
    for shift in (24, 12, 0):  # of 256 bins: chi-square has mean 255 and deviation 22.6
        bins = np.bincount(words >> shift & 0xFF, minlength=256)
        assert 150 < np.sum((bins - number / 256) ** 2) / (number / 256) < 370
    others = [uniform_words("w", 1, 0, number), uniform_words("x", 0, 0, number)]
    others += [uniform_words("w", 0, 0, number, "other"), np.roll(words, 1)]
    for other in others:
        assert abs(np.corrcoef(words, other)[0, 1]) < 5 / number**0.5


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3)])
def test_uniform_words_refuse_what_is_no_range(start, stop):
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        uniform_words("w", 0, start, stop)


def test_uniform_words_refuse_a_negative_seed():
    with pytest.raises(ValueError, match="mask seed"):
        uniform_words("w", -1, 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999, 0.3])
def test_counts_and_gaps_over_a_billion_entries(rate):
    """Counts of 1,000 windows of a million entries by chi-square, gaps by Kolmogorov and Smirnov's distance, and pairs of
    successive gaps by their correlation."""
    numel, keep, window = 10**9, 1 - rate, 10**6
    tail, last, distance, pairs = np.zeros(1000), -1, np.zeros(400), []
    for start in range(0, numel, 10**8):
        kept = kept_positions("w", numel, rate, 11, start=start, stop=start + 10**8)
        tail += np.bincount(kept // window, minlength=1000)
        steps = np.diff(kept, prepend=last)
        last = kept[-1]
        distance += np.bincount(np.minimum(steps, 399), minlength=400)
        pairs.append(np.corrcoef(steps[1:], steps[:-1])[0, 1] * len(steps) ** 0.5)
    statistic = float((((tail - window * keep) ** 2) / (window * keep * rate)).sum())
    assert 1e-4 < stats.chi2.sf(statistic, 1000) < 1 - 1e-4
    drawn = distance.sum()
    expected = 1 - (1 - keep) ** np.arange(399)
    ks = np.abs(np.cumsum(distance)[:399] / drawn - expected).max() * drawn**0.5
    assert ks < 2.2  # P = 1e-4
    assert abs(sum(pairs)) / len(pairs) ** 0.5 < 4.5
