"""Fuzz targets, guided by coverage with atheris, or by seeded mutations alone where it is not installed.

    python tests/fuzz/fuzz_delta.py -max_total_time=600 [further flags of libFuzzer] [corpus folder]

A target is a function of bytes that raises what no input may cause. Inputs of several parts, of which one may need
checksums over another, are packed into one, and are changed part by part.
"""

import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "support")]

try:
    import atheris
except ModuleNotFoundError:
    atheris = None

_LENGTH = struct.Struct("<I")
_LIMITS = {"-timeout": 30, "-rss_limit_mb": 2048, "-max_len": 1 << 16}  # of one input; the process with torch in it


def instrumented():
    """Imports of the library inside this block are measured for coverage."""
    return atheris.instrument_imports(include=["dpp_lightning"]) if atheris else nullcontext()


def pack(parts: Sequence[bytes]) -> bytes:
    """Parts as one input."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def unpack(data: bytes, count: int) -> list[bytes]:
    """The parts of an input, always ``count`` of them, whatever the lengths say."""
    parts = []
    for _ in range(count):
        length = _LENGTH.unpack(data[:4])[0] if len(data) >= 4 else 0
        parts.append(data[4 : 4 + length])
        data = data[4 + length :]
    return parts


def fuzz(
    target: Callable[[bytes], None], seeds: Sequence[bytes], parts: int = 1, arguments: Sequence[str] = ()
) -> None:
    """Run a target until the time is over. With atheris the process then ends, with code 0 if nothing was raised.

    Args:
        target: called with one input after another.
        seeds: valid inputs to begin with.
        parts: how many parts :func:`pack` made one input of.
        arguments: flags as of libFuzzer; a name without a dash is a folder of further inputs.
    """
    if atheris is None:
        limits = {name: value for name, _, value in (flag.partition("=") for flag in arguments)}
        count = run_plain(target, seeds, parts, float(limits.get("-max_total_time", 60)), int(limits.get("-seed", 0)))
        print(f"atheris is not installed: {count:,} inputs of plain mutations, without coverage")
        return

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        return changed_part(data, parts, random.Random(seed), lambda part: atheris.Mutate(part, max_size))

    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds):
            (Path(folder) / str(number)).write_bytes(seed)
        given = {flag.split("=")[0] for flag in arguments}
        flags = [f"{flag}={limit}" for flag, limit in _LIMITS.items() if flag not in given]
        folders = [argument for argument in arguments if not argument.startswith("-")]
        others = [argument for argument in arguments if argument.startswith("-")]
        atheris.Setup([sys.argv[0], *flags, *others, *folders, folder], target, custom_mutator=mutate)
        atheris.Fuzz()


def changed_part(data: bytes, parts: int, rng: random.Random, change: Callable[[bytes], bytes]) -> bytes:
    """An input with one of its parts changed."""
    pieces = unpack(data, parts)
    number = rng.randrange(parts)
    pieces[number] = change(pieces[number])
    return pack(pieces)


def run_plain(
    target: Callable[[bytes], None], seeds: Sequence[bytes], parts: int, seconds: float, seed: int, most: int = 1 << 62
) -> int:
    """Run a target on the seeds and on mutations of them; gives how many inputs there were, ``most`` at most."""
    from mutations import mutated_bytes  # from the folder of helpers, which is on the path by now

    rng, end, count = random.Random(seed), time.monotonic() + seconds, 0
    for data in seeds:
        target(data)
    while count < most and time.monotonic() < end:
        donor = rng.choice(seeds)
        data = changed_part(rng.choice(seeds), parts, rng, lambda part, d=donor: mutated_bytes(part, d, rng))
        try:
            target(data)
        except BaseException as error:
            error.add_note(f"input {count} of seed {seed}: {data!r}")
            raise
        count += 1
    return count
