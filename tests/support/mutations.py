"""Bytes changed at random: flips, numbers, inserted, deleted and doubled pieces, pieces of other bytes."""

ODD_BYTES = [0, 1, 0x7F, 0xFF, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 60]


def mutated_bytes(data, donor, rng):
    """Some bytes changed, pieces of a donor among them; the same for the same state of ``rng``."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 8])
        kind = rng.randrange(8)
        if kind < 3 and data:
            data[at - 1] ^= 1 << rng.randrange(8)
        elif kind < 5:
            number = rng.choice([*ODD_BYTES, rng.getrandbits(63)]) & ((1 << 8 * length) - 1)
            data[at : at + length] = number.to_bytes(length, "little")
        elif kind == 5:
            data[at:at] = rng.choice([rng.randbytes(length), data[at : at + 5 * length]])
        elif kind == 6:
            del data[at : at + length]
        else:
            start = rng.randrange(len(donor))
            data[at : at + 5 * length] = donor[start : start + 5 * length]
    return bytes(data)
