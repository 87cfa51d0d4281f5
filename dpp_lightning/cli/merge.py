"""``dpp merge``: several delta folders of one base to one, and on request to dense folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpp_lightning.cli.apply import loader_of
from dpp_lightning.cli.choices import DtypeName
from dpp_lightning.cli.command import FunctionCommand, progress_bar, say
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.delta.config_file import CONFIG_FILE
from dpp_lightning.delta.folder import DeltaReader, delta_bytes
from dpp_lightning.merging.merge_deltas import merge_checkpoints
from dpp_lightning.merging.weights import read_weights
from dpp_lightning.methods.merge_rules import MERGES
from dpp_lightning.storage.locate import local_path
from dpp_lightning.storage.output_folder import DELTA, DENSE_OF_TASKS, Inputs, check_output, output_folder
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
    overwrite: bool = False,
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
        output: the delta folder, new or empty, or see --overwrite; it is none of the inputs and lies neither inside nor
            around one
        overwrite: replace what an earlier run wrote into the output folder, at once when the new is complete; a folder
            that holds any other file is refused all the same
        dense: also write dense folders that from_pretrained loads here: one folder inside for each task with a head of
            its own, else this folder itself; the same holds for it as for the output
        dtype: how kept values and the numbers of factors are held; null for float32
        method: the rule that merges
        weights: one number for all deltas, one for each, or a JSON file with one for each, or for each tensor of each,
            such as AdaMerging's coefficients.json; by default 0.4 for task arithmetic, 1 for ties
        tasks: names of the deltas; by default their folders' names
        scale: multiplies the merged delta
        trim_rate: of ties, the fraction of every tensor of each delta that is dropped first, in [0, 1); null for none
        base_revision: branch, tag or commit where the base is a hub id
    """
    weight_of_each = read_weights([str(weight) for weight in weights])
    inputs: Inputs = [("BASE", base), *(("DELTAS", delta) for delta in deltas)]
    check_output(output, DELTA, overwrite=overwrite, inputs=inputs, argument="--output")
    if dense is not None:
        inputs = [*inputs, ("--output", Path(output))]
        check_output(dense, DENSE_OF_TASKS, overwrite=overwrite, inputs=inputs, argument="--dense")
    check_model(base, "BASE", base_revision, order=_ORDER)
    for delta in deltas:
        check_delta(delta, "DELTAS", order=_ORDER)
    with (
        _naming_what_is_written(dense, output) as parts,
        output_folder(output, DELTA, overwrite=overwrite, inputs=inputs[: 1 + len(deltas)]) as folder,
    ):
        with progress_bar("merging") as progress:
            merge_checkpoints(
                base,
                deltas,
                folder,
                method,
                weight_of_each,
                tasks=tasks or None,
                scale=scale,
                trim_rate=trim_rate,
                dtype=dtype,
                base_revision=base_revision,
                progress=progress,
            )
        if dense is not None:
            parts += _write_dense(base, base_revision, folder, dense, overwrite=overwrite)
    info = DeltaReader.open(output).info
    say(
        f"{output}: {delta_bytes(local_path(output)):,} bytes, {', '.join(info.tasks)} merged by {info.method} "
        f"({CONFIG_FILE} has the settings)"
    )
    for part in parts:
        say(f"{part}: load it with {loader_of(Path(part))}")


COMMAND = FunctionCommand(
    merge_to_folder,
    example="dpp merge BASE SST2 MRPC --method ties --weights 1 0.5 --output MERGED",
    groups={"what is written": "output", "how deltas are merged": "method", "hub": "base_revision"},
)


@contextmanager
def _naming_what_is_written(dense: str | None, output: str) -> Iterator[list[str]]:
    """A list for the dense folders, which take their names before the output does.

    Raises:
        OSError: of the output; names the dense folder too, if it is written.
    """
    written: list[str] = []
    try:
        yield written
    except OSError as error:
        if not written:
            raise
        raise OSError(error.errno, f"{dense} is written; of {output}: {error.strerror or error}") from error


def _write_dense(base: str, revision: str | None, merged: Path, dense: str, *, overwrite: bool) -> list[str]:
    """Write base plus merged delta, with heads of their own one folder inside for each task; all of them or none.

    Returns:
        The folders of the models.
    """
    reader = DeltaReader.open(merged)
    with output_folder(dense, DENSE_OF_TASKS, overwrite=overwrite, argument="--dense") as folder:
        if not reader.contents.needs_task:
            apply_checkpoint(base, merged, folder, base_revision=revision)
            return [dense]
        for task in reader.info.tasks:
            apply_checkpoint(base, merged, folder / task, base_revision=revision, task=task)
        return [f"{dense}/{task}" for task in reader.info.tasks]
