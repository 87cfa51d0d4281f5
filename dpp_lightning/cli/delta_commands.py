"""dpp prune, apply and inspect: arguments to calls, with a progress bar."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dpp_lightning.analysis import pair_report
from dpp_lightning.analysis.delta_cost import DeltaCost, TensorCost, inspect_delta
from dpp_lightning.calibration.calibration_data import CalibrationSource
from dpp_lightning.cli.command import MODEL, parser_of, progress_bar, run_command, say
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.delta.folder import delta_bytes, further_bytes
from dpp_lightning.delta.reader import DeltaReader
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.methods.registry import METHODS, get_method
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import total_bytes
from dpp_lightning.tensors.dtypes import DTYPES


def prune(arguments: list[str]) -> int:
    """``dpp prune BASE FINETUNED --output DIR``."""
    return run_command(_prune_parser(), arguments, _prune)


def apply(arguments: list[str]) -> int:
    """``dpp apply BASE DELTA --output DIR``."""
    parser = parser_of("apply", "Write base plus delta as a dense folder that from_pretrained loads.")
    parser.add_argument("base", metavar="BASE", help=MODEL)
    parser.add_argument("delta", metavar="DELTA", help="a delta folder or hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument("--force", action="store_true", help="apply the delta although the base is another one")
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, metavar="N", help="largest weights file")
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--delta-revision", metavar="REV", help="likewise")
    parser.add_argument("--task", help="of a merged delta with a head for each task, the one to write")
    return run_command(parser, arguments, _apply)


def inspect(arguments: list[str]) -> int:
    """``dpp inspect DELTA`` or ``dpp inspect BASE FINETUNED``."""
    parser = parser_of(
        "inspect",
        "Show what a delta folder holds and what it costs, tensor by tensor; or, of a base and a model fine-tuned from "
        "it, every layer's delta and what it does, with the method to take.",
    )
    parser.add_argument("delta", metavar="DELTA|BASE", help=f"a delta folder or hub id; or {MODEL}")
    parser.add_argument("finetuned", nargs="?", metavar="FINETUNED", help=MODEL)
    pair_report.add_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    return run_command(parser, arguments, _inspect)


def _prune_parser() -> argparse.ArgumentParser:
    parser = parser_of("prune", "Prune the delta between two checkpoints into a delta folder, tensor by tensor.")
    parser.add_argument("base", metavar="BASE", help=MODEL)
    parser.add_argument("finetuned", metavar="FINETUNED", help="likewise")
    parser.add_argument("--output", required=True, metavar="DIR", help="delta folder; an older delta is replaced")
    parser.add_argument("--method", default="dare", help=f"one of {', '.join(METHODS)} (default: %(default)s)")
    parser.add_argument(
        "--pruning_rate", "--pruning-rate", type=float, default=0.9, metavar="P",
        help="fraction of the delta that is dropped, in [0, 1) (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="mask seed (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="how kept values are held (default: the fine-tuned dtype)")
    parser.add_argument("--q", type=float, help="divide kept values by this (default: the method's own)")
    parser.add_argument(
        "--settings", nargs="+", default=(), metavar="NAME=VALUE",
        help="the method's own, such as budget=model, score=activation, variant=released, a=0.1",
    )  # fmt: skip
    parser.add_argument("--scope", choices=("all", "linear"), default="all", help="tensors that are pruned")
    parser.add_argument("--outside", choices=("carry", "revert"), default="carry", help="what becomes of the others")
    for name, what in (("include", "only these are pruned"), ("exclude", "never pruned"), ("carry", "stored dense")):
        parser.add_argument(f"--{name}", nargs="+", default=(), metavar="GLOB", help=f"tensor names: {what}")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text (one example a line) or a .safetensors batch, for what a method fits",
    )
    parser.add_argument("--weights-only", action="store_true", help="no configuration and tokenizer files beside it")
    parser.add_argument("--calibration-samples", type=int, default=64, metavar="N", help="examples used at most")
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--finetuned-revision", metavar="REV", help="likewise")
    return parser


def _prune(options: argparse.Namespace) -> None:
    scope = Scope(options.scope, tuple(options.include), tuple(options.exclude), options.outside, tuple(options.carry))
    settings = method_settings(options.settings)
    spec = PruningSpec(options.method, options.pruning_rate, options.seed, options.dtype, options.q, settings)
    calibration = _calibration(options, settings)
    with progress_bar("pruning") as told:
        output = prune_checkpoint(
            options.base,
            options.finetuned,
            options.output,
            spec,
            scope=scope,
            calibration=calibration,
            base_revision=options.base_revision,
            finetuned_revision=options.finetuned_revision,
            weights_only=options.weights_only,
            progress=told,
        )
    _tell(output)


def _tell(output: Path) -> None:
    """What was written, from the config and the heads of the chunks: nothing is drawn or decoded again."""
    reader = DeltaReader.open(output)
    info, size, beside = reader.info, delta_bytes(output), further_bytes(output)
    dense = {**reader.carried, **reader.new_rows}
    kept = sum(head.kept for _, head in reader.chunks.heads) + sum(t.numel() for t in dense.values())
    say(
        f"{output}: {size:,} bytes, {2 * info.entries / size:.1f} times smaller than the model in bfloat16 "
        f"({info.method}, p={info.pruning_rate:g}, q={info.q:.4g}, density {100 * kept / max(info.entries, 1):.3g} %)"
    )
    if dense:
        names = ", ".join([*dense][:6]) + (", …" if len(dense) > 6 else "")
        say(f"stored dense, {total_bytes(dense):,} bytes: {names}")
    if beside:
        say(f"beside it, {beside:,} bytes: files unlike the base's (--weights-only leaves them out)")


def method_settings(words: Sequence[str]) -> dict[str, Any]:
    """``name=value`` words as a mapping; what reads as a number is one.

    Raises:
        ValueError: a word without ``=``.
    """
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"a method setting is NAME=VALUE, such as budget=model; got {word!r}")
        try:
            settings[name] = float(value)
        except ValueError:
            settings[name] = value
    return settings


def _calibration(options: argparse.Namespace, settings: Mapping[str, Any]) -> CalibrationSource | None:
    row = get_method(options.method)
    if options.calibration is None:
        if row.needs_inputs(settings):
            raise ValueError(f"{options.method} needs the layers' inputs on calibration data: give --calibration FILE")
        return None
    if row.fit is None and not row.needs_inputs(settings):
        others = ", ".join(name for name, other in METHODS.items() if other.fit or other.inputs)
        raise ValueError(f"{options.method} has nothing to calibrate; methods that do: {others}")
    from dpp_lightning.pruning.file_calibration import FileCalibration

    return FileCalibration(
        options.finetuned,
        options.calibration,
        samples=options.calibration_samples,
        revision=options.finetuned_revision,
    )


def _apply(options: argparse.Namespace) -> None:
    with progress_bar("writing") as told:
        output = apply_checkpoint(
            options.base,
            options.delta,
            options.output,
            force=options.force,
            max_shard_bytes=options.max_shard_bytes,
            base_revision=options.base_revision,
            delta_revision=options.delta_revision,
            task=options.task,
            progress=told,
        )
    say(f"{output}: load it with from_pretrained")


def _inspect(options: argparse.Namespace) -> None:
    pair_report.check_options(options)
    if options.finetuned is not None:
        with progress_bar("reading") as told:
            report = pair_report.from_options(options, told)
        if options.json:
            sys.stdout.write(json.dumps(report.to_json(), indent=1) + "\n")
        else:
            pair_report.show(report, Console())
        return
    cost = inspect_delta(options.delta, options.revision)
    if options.json:
        sys.stdout.write(json.dumps(cost.to_json(), indent=1) + "\n")
    else:
        _show(cost, Console())


def _show(cost: DeltaCost, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("tensor", "shape", "density", "positions", "entropy", "values", "dense"):
        table.add_column(name, justify="left" if name in ("tensor", "shape") else "right", overflow="fold")
    for row in cost.tensors:
        table.add_row(*_cells(row))
    console.print(table)
    sizes = f"positions {cost.positions:,}, values {cost.values:,}, carried {cost.carried:,}"
    seed = "positions follow from the seed" if cost.coding == "seed" else ""
    apart = seed or f"positions {100 * cost.above_entropy:+.2f} % from their entropy of {cost.entropy:,.0f} bytes"
    for line in (
        f"{cost.method}, p = {cost.pruning_rate:g}, seed {cost.seed}, q = {cost.q:.6g}, base {cost.base or 'unnamed'}",
        f"{cost.kept:,} of {cost.entries:,} entries stored, density {100 * cost.density:.4g} %",
        f"{cost.total:,} bytes: {sizes}, config {cost.config:,}, heads {cost.overhead:,}",
        apart,
        f"a dense delta is {cost.ratio_fp32:.1f} times larger in float32, {cost.ratio_bf16:.1f} times in bfloat16",
        *([f"further files beside it: {cost.side_files:,} bytes"] if cost.side_files else []),
    ):
        console.print(line, highlight=False, markup=False)


def _cells(row: TensorCost) -> tuple[str, ...]:
    counts = (row.positions, row.entropy, row.values, row.carried)
    shape = "×".join(map(str, row.shape)) or "scalar"
    return (row.name, shape, f"{100 * row.density:.3g} %", *(f"{n:,.0f}" if n else "" for n in counts))
