"""dpp merge: several delta folders of one base to one, and on request to dense folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpp_lightning.cli.command import MODEL, parser_of, progress_bar, run_command, say
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.delta.config_file import CONFIG_FILE
from dpp_lightning.delta.folder import delta_bytes
from dpp_lightning.delta.reader import DeltaReader
from dpp_lightning.delta.task_heads import need_choice, task_names
from dpp_lightning.merging.merge_deltas import merge_checkpoints
from dpp_lightning.merging.weights import read_weights
from dpp_lightning.methods.merge_rules import MERGES
from dpp_lightning.tensors.dtypes import DTYPES


def merge(arguments: list[str]) -> int:
    """``dpp merge BASE DELTA DELTA … --output DIR``."""
    return run_command(_parser(), arguments, _merge)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "merge",
        "Merge deltas of one base into one delta folder, tensor by tensor. Heads and other dense tensors that differ "
        "stay in it for each task; dpp test, dpp apply and delta.for_task choose one.",
    )
    parser.add_argument("base", metavar="BASE", help=MODEL)
    parser.add_argument("deltas", nargs="+", metavar="DELTA", help="delta folders or hub ids")
    parser.add_argument("--output", required=True, metavar="DIR", help="delta folder; an older delta is replaced")
    parser.add_argument("--method", default="task-arithmetic", choices=MERGES, help="default: %(default)s")
    parser.add_argument(
        "--weights", nargs="+", default=(), metavar="W",
        help="one number for all deltas, one for each, or a JSON file with one for each, or for each tensor of each, "
        "such as AdaMerging's coefficients.json (default: 0.4 for task arithmetic, 1 for ties)",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", metavar="T", help="names of the deltas (default: their folders' names)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the merged delta (default: %(default)s)")
    parser.add_argument(
        "--trim_rate", "--trim-rate", type=float, metavar="P",
        help="ties: first drop this fraction of every tensor of each delta, in [0, 1) (default: none)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="how kept values are held (default: float32)")
    parser.add_argument(
        "--dense", metavar="DIR",
        help="also write dense folders that from_pretrained loads: DIR/TASK for each task with a head of its own, "
        "else DIR itself",
    )  # fmt: skip
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of a hub id")
    return parser


def _merge(options: argparse.Namespace) -> None:
    weights = read_weights(options.weights)
    dense = Path(options.dense) if options.dense else None
    if dense is not None and dense.exists() and (not dense.is_dir() or any(dense.iterdir())):
        raise FileExistsError(f"{dense} exists and is not empty; choose another folder, it is not overwritten")
    with progress_bar("merging") as told:
        output = merge_checkpoints(
            options.base,
            options.deltas,
            options.output,
            options.method,
            weights,
            tasks=options.tasks,
            scale=options.scale,
            trim_rate=options.trim_rate,
            dtype=options.dtype,
            base_revision=options.base_revision,
            progress=told,
        )
    reader = DeltaReader.open(output)
    tasks, size = task_names(reader.info), delta_bytes(output)
    say(f"{output}: {size:,} bytes, {', '.join(tasks)} merged by {reader.info.method} ({CONFIG_FILE} has the settings)")
    if dense is not None:
        apart = need_choice(tasks, reader.carried)
        for task, folder in [(t, dense / t) for t in tasks] if apart else [(None, dense)]:
            apply_checkpoint(options.base, output, folder, base_revision=options.base_revision, task=task)
            say(f"{folder}: load it with from_pretrained")
