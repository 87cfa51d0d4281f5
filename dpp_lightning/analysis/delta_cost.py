"""What a delta folder holds and what it costs: bytes by kind, density, distance to the entropy limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import lgamma, log, prod
from pathlib import Path
from typing import Any

from dpp_lightning.delta.config_file import CONFIG_FILE
from dpp_lightning.delta.folder import DeltaReader, delta_bytes, further_bytes
from dpp_lightning.storage.mapped_file import map_safetensors
from dpp_lightning.storage.model_folder import module_weights


@dataclass
class TensorCost:
    """One tensor of a delta.

    Attributes:
        name: canonical name.
        shape: of the tensor.
        kind: ``pruned``, ``carried`` (dense), ``new rows`` (dense) or ``further module`` (dense, a file of its own).
        kept: stored entries, and numbers of factors.
        density: ``kept`` over all entries.
        rank: of the tensor's factors; None without.
        positions, values, factors, carried: bytes. What a chunk of several tensors takes is shared out by what they
            have in it, so that the totals are exact.
        entropy: bytes that no coding of the positions of independent entries can undercut, log2 C(entries, kept) / 8;
            0 where a seed gives them.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    kept: int = 0
    density: float = 0.0
    rank: int | None = None
    positions: float = 0.0
    values: float = 0.0
    factors: float = 0.0
    carried: int = 0
    entropy: float = 0.0


@dataclass(frozen=True)
class DeltaCost:
    """A whole delta folder.

    Attributes:
        method, pruning_rate, seed, q, base, coding: from the config; ``coding`` is that of the positions.
        tensors: one row each.
        entries, kept, density: of the fine-tuned model without further modules; stored numbers, of factors and carried
            ones too; their share.
        positions, values, factors, carried, config, overhead, total: bytes of the delta by kind, with the weights of
            further modules among those carried; ``overhead`` is the table of tensors and the heads of files and chunks.
        side_files: bytes of the configuration and tokenizer files beside the delta, not in the total.
        entropy: bytes of entropy of the positions, 0 where the seed gives them.
        above_entropy: bytes of positions over their entropy, minus 1; 0 where nothing is stored.
        dense_bytes: of the fine-tuned model in its own dtype.
        ratio: dense bytes over the total.
    """

    method: str
    pruning_rate: float
    seed: int
    q: float
    base: str | None
    coding: str
    tensors: list[TensorCost] = field(repr=False)
    entries: int
    kept: int
    density: float
    positions: int
    values: int
    factors: int
    carried: int
    config: int
    overhead: int
    total: int
    side_files: int
    entropy: float
    above_entropy: float
    dense_bytes: int
    ratio: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def inspect_delta(source: str | Path, revision: str | None = None) -> DeltaCost:
    """Read a delta folder or hub id, checking all of it.

    Raises:
        FileNotFoundError: no such folder, or a folder without a delta.
        ValueError: a damaged or hostile delta.
    """
    reader = DeltaReader.open(source, revision)
    pruned, positions, values = _pruned_rows(reader)
    factors = _add_factors(reader, pruned)
    unpruned = list(_dense_rows(reader))
    total, config = delta_bytes(reader.folder), (reader.folder / CONFIG_FILE).stat().st_size
    kept = sum(row.kept for row in (*pruned, *unpruned))
    unpruned += _module_rows(reader)
    carried, entropy = sum(row.carried for row in unpruned), sum(row.entropy for row in pruned)
    info = reader.info
    return DeltaCost(
        method=info.method,
        pruning_rate=info.pruning_rate,
        seed=info.seed,
        q=info.q,
        base=info.base_name,
        coding="seed" if reader.chunks.seeded else "index",
        tensors=[*pruned, *unpruned],
        entries=info.entries,
        kept=kept,
        density=kept / max(info.entries, 1),
        positions=positions,
        values=values,
        factors=factors,
        carried=carried,
        config=config,
        overhead=total - config - positions - values - factors - carried,
        total=total,
        side_files=further_bytes(reader.folder),
        entropy=entropy,
        above_entropy=positions / entropy - 1 if entropy else 0.0,
        dense_bytes=info.dense_bytes,
        ratio=info.ratio(total),
    )


def _pruned_rows(reader: DeltaReader) -> tuple[list[TensorCost], int, int]:
    """One row for each pruned tensor, and the bytes of all positions and values."""
    pruned = [TensorCost(name, shape, "pruned") for name, shape in reader.chunks.table]
    positions = values = 0
    for first, chunk in reader.chunks.chunks():
        sizes = chunk.head.stored(values=False), chunk.head.stored(values=True)
        positions, values = positions + sizes[0], values + sizes[1]
        for row, kept_positions in zip(pruned[first:], chunk.positions, strict=False):
            share = len(kept_positions) / max(chunk.head.kept, 1)
            row.kept += len(kept_positions)
            row.positions += share * sizes[0]
            row.values += share * sizes[1]
    for row in pruned:
        row.density = row.kept / max(prod(row.shape), 1)
        row.entropy = 0.0 if reader.chunks.seeded else position_entropy(prod(row.shape), row.kept) / 8
    return pruned, positions, values


def _add_factors(reader: DeltaReader, pruned: Sequence[TensorCost]) -> int:
    """Put rank, numbers and bytes of factors into the tensors' rows; returns the bytes of all."""
    if reader.factors is None:
        return 0
    total = 0
    for first, chunk in reader.factors.chunks.chunks():
        size = chunk.head.stored(values=True)
        total += size
        for owner, positions in zip(reader.factors.owners[first:], chunk.positions, strict=False):
            pruned[owner].factors += size * len(positions) / chunk.head.kept
    for row, rank, numbers in zip(pruned, reader.table.ranks, reader.table.factor_numbers, strict=True):
        row.rank = rank
        row.kept += numbers
        row.density = row.kept / max(prod(row.shape), 1)
    return total


def position_entropy(entries: int, kept: int) -> float:
    """log2 of the number of ways to keep ``kept`` of ``entries``, in bits."""
    return (lgamma(entries + 1) - lgamma(kept + 1) - lgamma(entries - kept + 1)) / log(2)


def _dense_rows(reader: DeltaReader) -> Iterator[TensorCost]:
    for kind, tensors in (("carried", reader.carried), ("new rows", reader.new_rows)):
        for name, tensor in tensors.items():
            yield TensorCost(name, tuple(tensor.shape), kind, tensor.numel(), 1.0, carried=tensor.nbytes)


def _module_rows(reader: DeltaReader) -> Iterator[TensorCost]:
    for file, path in module_weights(reader.folder).items():
        for name, tensor in map_safetensors(path).items():
            in_file = f"{file.rpartition('/')[0]}/{name}"
            yield TensorCost(in_file, tuple(tensor.shape), "further module", tensor.numel(), 1.0, carried=tensor.nbytes)
