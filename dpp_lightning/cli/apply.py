"""``dpp apply``: base plus delta to a dense folder."""

from __future__ import annotations

from pathlib import Path

from dpp_lightning.cli.command import FunctionCommand, progress_bar, say
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.pruning.timm_model import is_timm
from dpp_lightning.storage.model_configuration import CONFIG
from dpp_lightning.storage.output_folder import DENSE, check_output
from dpp_lightning.storage.source_kind import check_delta, check_model

_ORDER = "dpp apply BASE DELTA"


def write_dense(
    base: str,
    delta: str,
    *,
    output: str,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    task: str | None = None,
    force: bool = False,
    base_revision: str | None = None,
    delta_revision: str | None = None,
) -> None:
    """Write base plus delta as a dense folder that from_pretrained loads.

    Args:
        base: a folder in Hugging Face's layout, a .safetensors or .ckpt file, a sharded checkpoint, or a hub id
        delta: a delta folder or hub id
        output: the model's folder, new or empty, or see --overwrite; it is none of the inputs and lies neither inside
            nor around one
        overwrite: replace what an earlier run wrote into the output folder, at once when the new is complete; a folder
            that holds any other file is refused all the same
        max_shard_bytes: largest file of weights
        task: of a merged delta with a head for each task, the one to write
        force: apply the delta although the base is another one than it was drawn from
        base_revision: branch, tag or commit where the base is a hub id
        delta_revision: likewise of the delta
    """
    inputs = ("BASE", base), ("DELTA", delta)
    check_output(output, DENSE, overwrite=overwrite, inputs=inputs, argument="--output")
    check_model(base, "BASE", base_revision, order=_ORDER)
    check_delta(delta, "DELTA", delta_revision, order=_ORDER)
    with progress_bar("writing") as progress:
        folder = apply_checkpoint(
            base,
            delta,
            output,
            force=force,
            max_shard_bytes=max_shard_bytes,
            base_revision=base_revision,
            delta_revision=delta_revision,
            task=task,
            overwrite=overwrite,
            progress=progress,
        )
    say(f"{folder}: load it with {loader_of(folder)}")


def loader_of(folder: Path) -> str:
    """What loads a dense folder, as its ``config.json`` tells."""
    if is_timm(str(folder), None):
        return f"timm.create_model('local-dir:{folder}', pretrained=True)"
    return "from_pretrained" if (folder / CONFIG).is_file() else f"safetensors.torch.load_file, as there is no {CONFIG}"


COMMAND = FunctionCommand(
    write_dense,
    example="dpp apply BASE DELTA --output DENSE",
    groups={"what is written": "output", "what is applied": "task", "hub": "base_revision"},
)
