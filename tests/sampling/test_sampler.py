"""The sampler: known answers, golden vectors (they pin the file format), a slow twin, and its statistics."""

from fractions import Fraction
from hashlib import sha256
from itertools import count, islice, pairwise
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpp_lightning.sampling import philox as philox_module
from dpp_lightning.sampling import sampler
from dpp_lightning.sampling.binomial import binomial_thresholds
from dpp_lightning.sampling.sampler import (
    BLOCK,
    exact_rate,
    kept_positions,
    kept_positions_of,
    philox,
    stream_key,
    uniform_words,
)

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
    lowest, thresholds = binomial_thresholds(n, keep)
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


# Tensors of many sizes, and rates that draw by sorting, by marking, and what is dropped: SHA-256 of the first release
MIXED = [("a", 768), ("b", 0), ("c", 1), ("d", 3 * BLOCK + 5), ("e", 7), ("f", BLOCK), ("g", BLOCK - 1), ("h", 50_000)]
MIXED += [("i", 2)]
MIXED_GOLDEN = {
    0.05: "236e48309cca400c",
    0.3: "355c6b15d184cab2",
    0.8: "941bf947ce900d3f",
    0.875: "1891a4f578f4750a",
    0.95: "4c3119c5bce25585",
    0.9999: "3ffd9e637e4d4dac",
}


def digest(arrays) -> str:
    return sha256(b"".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()[:16]


@pytest.mark.parametrize(("rate", "expected"), MIXED_GOLDEN.items())
def test_golden_vectors_of_many_tensors(rate, expected):
    assert digest(kept_positions_of(MIXED, rate, 4)) == expected
    assert digest(kept_positions(name, numel, rate, 4) for name, numel in MIXED) == expected


def test_golden_vector_of_a_block_beyond_32_bits():
    positions = kept_positions("far", 2**49 + 1000, 0.99, 0, start=2**49 - 70_000)
    assert (positions[:4] - (2**49 - 70_000)).tolist() == [68, 147, 167, 405]
    assert digest([positions]) == "61e11e3f52a32119"


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40) | st.integers(500, 4000) | st.integers(BLOCK - 2, 2 * BLOCK + 2), max_size=12),
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
    ("module", "setting", "value"),
    [
        (sampler, "_BATCH_LANES", 1 << 14),  # many batches
        (sampler, "_BATCH_ENTRIES", 1 << 17),
        (philox_module, "_CHUNK_OUTPUTS", 1),  # every block computed alone
        (philox_module, "_DEVIATIONS", -6),  # nearly every block reads too far ahead and starts again
        (philox_module, "_DEVIATIONS", 10**6),  # none reads ahead
        (philox_module, "MARKED_SHARE", 1),  # sorted wherever possible
        (philox_module, "MARKED_SHARE", 10**9),  # marked
    ],
)
def test_how_the_work_is_cut_changes_nothing(monkeypatch, module, setting, value, rate):
    monkeypatch.setattr(module, setting, value)
    assert digest(kept_positions_of(MIXED, rate, 4)) == MIXED_GOLDEN[rate]


def test_philox_takes_a_key_for_every_row():
    counter = tuple(np.arange(3 * i, 3 * i + 6, dtype=np.uint64).reshape(2, 3) for i in range(4))
    keys = [(5, 2**32 - 1), (2**31, 0)]
    together = philox(counter, tuple(np.array(word, dtype=np.uint64)[:, None] for word in zip(*keys, strict=True)))
    for row, key in enumerate(keys):
        alone = philox(tuple(word[row] for word in counter), key)
        assert all(np.array_equal(a[row], b) for a, b in zip(together, alone, strict=True))


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
    assert uniform_words(name, 3, 0, 4).tolist() == [3317930282, 2291705690, 1144015453, 2943360397]
    assert uniform_words(name, 3, 1_000_003, 1_000_006).tolist() == [1422645754, 2878657008, 2566892194]


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
