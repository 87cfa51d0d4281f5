"""A second reader of delta folders, written from the page "The delta file format" of ``dpp_lightning/README.md`` alone.

It shares no code with the package and knows nothing of torch: if the page and the program part, the tests see it.
Clear rather than fast: integers are Python's own.
"""

import bisect
import hashlib
import json
import struct
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path

import numpy as np
import xxhash
import zstandard

MASK64 = (1 << 64) - 1
BLOCK = 1 << 22
DTYPES = ("float32", "bfloat16", "float16", "int8", "int4", "float64", "int3", "int2")
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
GROUP = {"int8": 128, "int4": 32, "int3": 128, "int2": 128}
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "<u1", "I64": "<i8"}


@dataclass
class Delta:
    """What a folder holds.

    Attributes:
        config: the JSON object, its numbers with a decimal point as text.
        tensors: name to (shape, positions, values as float32).
        factors: name to (left, right) as float32 matrices, of the tensors that have them.
        reverted, unchanged, names: of the table.
        carried, new_rows: name to array.
        heads: coding of positions, dtype and form of values of every chunk.
    """

    config: dict
    tensors: dict
    factors: dict
    reverted: list
    unchanged: list
    names: dict
    carried: dict
    new_rows: dict
    heads: list


def read_delta(folder: Path) -> Delta:
    model = (folder / "delta_model.safetensors").read_bytes()
    config = json.loads((folder / "delta_config.json").read_text("utf-8"), parse_float=str)
    assert (config["format"], config["format_version"], config["sampler_version"]) == ("dpp-delta", 3, 2)
    assert config["config_checksum"] == config_checksum(folder / "delta_config.json")
    assert config["model_checksum"] == xxhash.xxh3_128_hexdigest(model)
    stored = read_safetensors(model)
    table = read_table(stored.pop("table").tobytes())
    rows = [(row[0], row[1], row[2] if len(row) == 3 else None) for row in table.get("tensors", [])]
    rate = config["pruning_rate"] if config.get("drawn_rate") is None else config["drawn_rate"]
    seed = (rate, config["seed"], config.get("rest", False)) if config["positions"] == "seed" else None
    tensors, heads = decode_chunks(stored.pop("kept").tobytes(), rows, seed)
    factors = {}
    if any(rank is not None for _, _, rank in rows):
        factors = decode_factors(stored.pop("factors").tobytes(), rows)
    dense = stored
    assert all(name.startswith(("carried.", "rows.")) for name in dense)
    return Delta(
        config,
        tensors,
        factors,
        table.get("reverted", []),
        table.get("unchanged", []),
        table.get("names", {}),
        {n.removeprefix("carried."): widened(t) for n, t in dense.items() if n.startswith("carried.")},
        {n.removeprefix("rows."): widened(t) for n, t in dense.items() if n.startswith("rows.")},
        heads,
    )


def read_table(blob: bytes) -> dict:
    size = zstandard.frame_content_size(blob)
    assert 0 <= size <= min(1 << 24, (1 << 16) + 128 * len(blob))
    data = zstandard.ZstdDecompressor().decompress(blob)
    assert len(data) == size
    return json.loads(data)


def config_checksum(path: Path) -> str:
    config = json.loads(path.read_text("utf-8"))
    del config["config_checksum"]
    return xxhash.xxh3_128_hexdigest(canonical_json(config).encode("ascii"))


def canonical_json(value) -> str:
    """The rule of ``config_checksum``, spelled out."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical_json(k)}:{canonical_json(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical_json, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(map(escaped, value)) + '"'
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character in "\b\t\n\f\r":
        return "\\" + "btnfr"["\b\t\n\f\r".index(character)]
    if " " <= character <= "~":
        return character
    units = np.frombuffer(character.encode("utf-16-le", "surrogatepass"), "<u2")
    return "".join(f"\\u{unit:04x}" for unit in units)


def read_safetensors(data: bytes) -> dict:
    (length,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(body[begin:end], STORED[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = (array, "bfloat16") if entry["dtype"] == "BF16" else array
    return tensors


def widened(tensor) -> np.ndarray:
    return bfloat16(tensor[0]) if isinstance(tensor, tuple) else tensor


def bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << 16).view("<f4")


def decode_factors(blob: bytes, rows: list) -> dict:
    """Every factor is a line of its own of which all entries are kept."""
    lines, shapes = [], {}
    for name, shape, rank in rows:
        first, others = (shape[0] if shape else 1), prod(shape[1:])
        if rank is not None:
            shapes[name] = (first, others, rank)
            lines.append((f"{name} left", [rank * first], None))
            if others != 1:
                lines.append((f"{name} right", [rank * others], None))
    decoded, heads = decode_chunks(blob, lines, None)
    assert all(coding == 1 for coding, _, _ in heads)
    factors = {}
    for name, (first, others, rank) in shapes.items():
        left = decoded[f"{name} left"][2].reshape(rank, first).T.astype("<f4")
        right = np.ones((1, 1), "<f4")
        if others != 1:
            right = decoded[f"{name} right"][2].reshape(rank, others).astype("<f4")
        factors[name] = (left, right)
    return factors


def decode_chunks(blob: bytes, rows: list, seed: tuple | None) -> tuple[dict, list]:
    """Positions and values of (name, shape, rank), drawn by (rate, seed, rest) where that is given."""
    sizes = {name: prod(shape) for name, shape, _ in rows}
    if seed:
        left_out = {name for name, shape, rank in rows if rank is not None and (prod(shape[1:]) == 1 or not seed[2])}
        sizes |= dict.fromkeys(left_out, 0)
    drawn = {n: sampler(n, size, *seed[:2]) for n, size in sizes.items()} if seed else {}
    positions: dict[str, list[int]] = {name: [] for name in sizes}
    values: dict[str, list[np.ndarray]] = {name: [np.empty(0, "<f4")] for name in sizes}
    heads, offset, begin, total = [], 0, 0, sum(sizes.values())
    while begin < total:
        span, kept, coding, shift, kind, form = struct.unpack_from("<QIBBBB", blob, offset)
        heads.append((coding, DTYPES[kind], form))
        streams = Streams(blob, offset + 16)
        stored = stored_positions(coding, shift, kept, span, streams)
        inside = {}  # what the chunk keeps of each tensor that it touches
        start = 0  # of the tensor in the line
        for name, size in sizes.items():
            low, high = max(begin - start, 0), min(begin + span - start, size)
            if low < high:
                candidates = drawn[name] if coding == 0 else [begin + index - start for index in stored]
                inside[name] = [position for position in candidates if low <= position < high]
            start += size
        groups = [len(kept_here) for kept_here in inside.values() if kept_here]
        assert sum(groups) == kept
        decoded = decode_values(DTYPES[kind], form, groups, streams) if kept else np.empty(0, "<f4")
        assert np.isfinite(decoded).all()
        cuts = np.cumsum([len(kept_here) for kept_here in inside.values()])[:-1]
        for (name, kept_here), piece in zip(inside.items(), np.split(decoded, cuts), strict=True):
            positions[name] += kept_here
            values[name].append(piece)
        offset, begin = streams.offset, begin + span
    assert (begin, offset) == (total, len(blob))
    return {n: (shape, positions[n], np.concatenate(values[n])) for n, shape, _ in rows}, heads


class Streams:
    """The streams of a chunk, one after the other."""

    def __init__(self, blob: bytes, offset: int) -> None:
        self.blob, self.offset = blob, offset

    def next(self) -> np.ndarray:
        stored, size = struct.unpack_from("<II", self.blob, self.offset)
        data = self.blob[self.offset + 8 : self.offset + 8 + stored]
        self.offset += 8 + stored
        if stored != size:
            assert zstandard.frame_content_size(data) == size
            data = zstandard.ZstdDecompressor().decompress(data)
        assert len(data) == size
        return np.frombuffer(data, np.uint8)

    def planes(self, width: int) -> np.ndarray:
        """Floats' bits from planes of bytes."""
        rotated = sum(self.next().astype(np.uint64) << np.uint64(8 * (width - 1 - j)) for j in range(width))
        bits = (rotated >> np.uint64(1)) | ((rotated & np.uint64(1)) << np.uint64(8 * width - 1))
        return bits.astype(f"<u{width}")


def bit(data: np.ndarray, i: int) -> int:
    return int(data[i // 8]) >> (i % 8) & 1


def stored_positions(coding: int, shift: int, kept: int, span: int, streams: Streams) -> list[int]:
    if coding == 0:
        return []
    if coding == 1:
        assert kept == span
        return list(range(span))
    if coding == 3:
        marks = streams.next()
        assert len(marks) == -(-span // 8)
        return [i for i in range(span) if bit(marks, i)]
    assert coding == 2
    high, low = streams.next().tolist(), streams.next()
    assert len(low) == -(-kept * shift // 8)
    positions, upper, last = [], 0, -1
    for byte in high:
        upper += byte
        if byte < 255:
            first = len(positions) * shift
            gap = (upper << shift) + sum(bit(low, first + j) << j for j in range(shift))
            last += gap + 1
            positions.append(last)
            upper = 0
    assert len(positions) == kept
    return positions


def decode_values(dtype: str, form: int, groups: list[int], streams: Streams) -> np.ndarray:
    """float32 values of a chunk that keeps ``groups`` entries of its tensors."""
    if dtype in GROUP:
        assert form == 0
        integers = streams.next().view(np.int8)
        if dtype != "int8":
            halves = [half for byte in integers.view(np.uint8).tolist() for half in (byte % 16, byte // 16)]
            integers = np.array([half - 16 if half > 7 else half for half in halves[: sum(groups)]], dtype=np.int8)
        scales = bfloat16(streams.planes(2)).tolist()
        values, begin = [], 0
        for count in groups:
            for first in range(0, count, GROUP[dtype]):
                piece = integers[begin + first : begin + min(first + GROUP[dtype], count)]
                values.append(piece.astype("<f4") * np.float32(scales.pop(0)))
            begin += count
        assert not scales
        return np.concatenate(values)
    width, kept = WIDTH[dtype], sum(groups)
    if form == 0:
        return floats(streams.planes(width), dtype)
    signs, differs = streams.next(), streams.next()
    usual, others = streams.planes(width).tolist(), streams.planes(width).tolist()
    owner = [g for g, count in enumerate(groups) for _ in range(count)]
    bits, same = [], 0
    for i in range(kept):
        if bit(differs, i):
            bits.append(others.pop(0))
        else:
            bits.append(usual[owner[i]] | bit(signs, same) << (8 * width - 1))
            same += 1
    assert not others
    return floats(np.array(bits, f"<u{width}"), dtype)


def floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return bfloat16(bits)
    if dtype == "float64":
        return bits.view("<f8")
    return bits.view("<f4" if dtype == "float32" else "<f2").astype("<f4")


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (second >> 64) ^ c1 ^ k0, second & MASK64, (first >> 64) ^ c3 ^ k1, first & MASK64
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK64, (k1 + 0xBB67AE8584CAA73B) & MASK64
    return c0, c1, c2, c3


def sampler(name: str, entries: int, pruning_rate: str, seed: int) -> list[int]:
    """Kept positions of a tensor; the rate as the text that stands in the config."""
    keep = 1 - Fraction(pruning_rate)
    if keep == 1:
        return list(range(entries))
    (key,) = struct.unpack("<Q", hashlib.sha256(f"dpp2:keep:{seed}:{name}".encode()).digest()[:8])
    thresholds, kept = gap_thresholds(1 - min(keep, 1 - keep)), []
    for block in range(-(-entries // BLOCK)):
        n, x, output, drawn = min(BLOCK, entries - block * BLOCK), -1, 0, set()
        while x < n - 1:
            output += 1
            for word in philox((output, block, 0, 0), (key, 0)):
                for half in (word & 0xFFFFFFFF, word >> 32):
                    gap = bisect.bisect_right(thresholds, half) + 1
                    x += min(gap, len(thresholds))
                    if gap <= len(thresholds) and x < n:
                        drawn.add(x)
        kept += [block * BLOCK + i for i in range(n) if (i in drawn) == (2 * keep <= 1)]
    return kept


def gap_thresholds(undrawn: Fraction) -> list[int]:
    share, found = 1 << 128, []
    while len(found) < 4096 and found[-1:] != [2**32 - 1]:
        share = share * undrawn.numerator // undrawn.denominator
        found.append(((1 << 128) - share) >> 96)
    return found


def applied(base: np.ndarray, positions: list[int], values: np.ndarray, q: float) -> np.ndarray:
    """A float32 base with the kept entries changed."""
    flat = base.reshape(-1).copy()
    flat[positions] = flat[positions] + values / np.float32(q)
    return flat.reshape(base.shape)


def base_check(bases: list[np.ndarray], positions: list[list[int]]) -> tuple[str, str]:
    """``base_check`` and ``base_first``, from the base's tensors and kept positions in the order of ``tensors``."""
    digest, first = xxhash.xxh3_128(), ""
    for base, kept in zip(bases, positions, strict=True):
        digest.update(base.reshape(-1)[kept].astype("<f4").tobytes())
        if kept and not first:
            first = digest.hexdigest()
    return digest.hexdigest(), first


def sampled_check(bases: dict[str, np.ndarray]) -> str:
    """``base_check`` where no entry changes, from the tensors of ``tensors``, ``reverted`` and ``unchanged``."""
    digest = xxhash.xxh3_128()
    for name in sorted(bases):
        flat = bases[name].reshape(-1)
        if name.split(".")[-1] == "weight" and bases[name].ndim >= 2 and flat.dtype.kind == "f":
            digest.update(flat[:: max(1, -(-len(flat) // 1024))].astype("<f4").tobytes())
    return digest.hexdigest()


def base_fingerprint(bases: dict[str, np.ndarray]) -> str:
    """From the float32 tensors of the base that are not carried."""
    digests = []
    for name in sorted(bases):
        base = np.ascontiguousarray(bases[name], "<f4")
        head = f"{name}|float32|{tuple(bases[name].shape)}|".encode()
        digests.append(xxhash.xxh3_128_hexdigest(head + base.tobytes()))
    return xxhash.xxh3_128_hexdigest("".join(digests).encode("ascii"))
