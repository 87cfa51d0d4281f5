"""``dpp merge``: several delta folders of one base to one, and on request to dense folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpp_lightning.cli.choices import DtypeName
from dpp_lightning.cli.command import FunctionCommand, progress_bar, say
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.delta.config_file import CONFIG_FILE
from dpp_lightning.delta.folder import DeltaReader, delta_bytes
from dpp_lightning.merging.merge_deltas import merge_checkpoints
from dpp_lightning.merging.weights import read_weights
from dpp_lightning.methods.merge_rules import MERGES
from dpp_lightning.storage.atomic_write import check_replaceable
from dpp_lightning.storage.source_kind import check_delta, check_model

_ORDER = "dpp merge BASE DELTA DELTA ..."

if TYPE_CHECKING:
    MergeName = str
else:
    MergeName = Literal[tuple(MERGES)]


def merge_to_folder(
    base: str,
    deltas: Sequence[str],
    *,
    output: str,
    dense: str | None = None,
    dtype: DtypeName | None = None,
    method: MergeName = "task-arithmetic",
    weights: Sequence[float | str] = (),
    tasks: Sequence[str] = (),
    scale: float = 1.0,
    trim_rate: float | None = None,
    base_revision: str | None = None,
) -> None:
    """Merge deltas of one base into one delta folder, tensor by tensor.

    Heads and other dense tensors that differ stay in it for each task; dpp test, dpp apply and delta.for_task choose
    one.

    Args:
        base: a folder in Hugging Face's layout, a .safetensors or .ckpt file, a sharded checkpoint, or a hub id
        deltas: delta folders or hub ids
        output: the delta folder; it is made, or an older delta in it is replaced
        dense: also write dense folders that from_pretrained loads here: one folder inside for each task with a head of
            its own, else this folder itself
        dtype: how kept values are held; null for float32
        method: the rule that merges
        weights: one number for all deltas, one for each, or a JSON file with one for each, or for each tensor of each,
            such as AdaMerging's coefficients.json; by default 0.4 for task arithmetic, 1 for ties
        tasks: names of the deltas; by default their folders' names
        scale: multiplies the merged delta
        trim_rate: of ties, the fraction of every tensor of each delta that is dropped first, in [0, 1); null for none
        base_revision: branch, tag or commit where the base is a hub id
    """
    weight_of_each = read_weights([str(weight) for weight in weights])
    dense_folder = Path(dense) if dense else None
    if dense_folder is not None:
        check_replaceable(dense_folder, empty=True)
    check_model(base, "BASE", base_revision, order=_ORDER)
    for delta in deltas:
        check_delta(delta, "DELTAS", order=_ORDER)
    with progress_bar("merging") as progress:
        folder = merge_checkpoints(
            base,
            deltas,
            output,
            method,
            weight_of_each,
            tasks=tasks or None,
            scale=scale,
            trim_rate=trim_rate,
            dtype=dtype,
            base_revision=base_revision,
            progress=progress,
        )
    reader = DeltaReader.open(folder)
    names, size = reader.info.tasks, delta_bytes(folder)
    say(f"{folder}: {size:,} bytes, {', '.join(names)} merged by {reader.info.method} ({CONFIG_FILE} has the settings)")
    if dense_folder is not None:
        choose = reader.contents.needs_task
        for task, target in [(name, dense_folder / name) for name in names] if choose else [(None, dense_folder)]:
            apply_checkpoint(base, folder, target, base_revision=base_revision, task=task)
            say(f"{target}: load it with from_pretrained")


COMMAND = FunctionCommand(
    merge_to_folder,
    example="dpp merge BASE SST2 MRPC --method ties --weights 1 0.5 --output MERGED",
    groups={"what is written": "output", "how deltas are merged": "method", "hub": "base_revision"},
)
