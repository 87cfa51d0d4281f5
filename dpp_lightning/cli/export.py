"""dpp export: a trainer's checkpoint to a folder that from_pretrained loads, or to a delta folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dpp_lightning.cli.command import parser_of, progress_bar, run_command, say
from dpp_lightning.delta.folder import delta_bytes
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.tensors.dtypes import DTYPES, FLOATS

if TYPE_CHECKING:
    from dpp_lightning.export.write import Export

_DELTA_OPTIONS = {"method": "dare", "pruning_rate": 0.9, "seed": 0}  # and what they are if not given


def export(arguments: list[str]) -> int:
    """``dpp export CKPT --output DIR``."""
    return run_command(_parser(), arguments, _export)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(
        "export",
        "Write a Lightning .ckpt, a sharded checkpoint of Lightning (FSDP, ModelParallel) or a "
        "torch.distributed.checkpoint folder as a folder that from_pretrained loads, block by block, without a GPU or "
        "a process group; with --base as a delta folder. No code in the checkpoint is run: pickles, .metadata too, are "
        "read for tensors and plain values alone. Optimizer states are never read.",
    )
    add = parser.add_argument
    config = "of configuration and tokenizer (default: --base, else the checkpoint's hyper-parameter pretrained)"
    kind = "such as BertForTokenClassification (default: the class of the model type whose tensors these are)"
    dtype = "of the weights, a float; with --base, how kept values are held (default: the checkpoint's)"
    add("checkpoint", metavar="CKPT", help="a .ckpt file, or a folder with .metadata and *.distcp files")
    add("--output", required=True, metavar="DIR", help="a folder that is new or empty")
    add("--config-from", metavar="MODEL", help=f"folder or hub id {config}")
    add("--config-revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--architecture", metavar="CLASS", help=kind)
    add(
        "--prefix", metavar="NAME.", help="what stands before the model's own names, where the checkpoint holds several"
    )
    add("--dtype", choices=DTYPES, help=dtype)
    add("--max-shard-bytes", type=int, default=5_000_000_000, metavar="N", help="largest weights file")
    add = parser.add_argument_group("a delta folder in place of a dense one").add_argument
    add("--base", metavar="BASE", help="prune the delta to this folder or hub id, as dpp prune does")
    add("--base-revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--method", help=f"one of {', '.join(METHODS)} (default: dare)")
    add("--pruning_rate", "--pruning-rate", type=float, metavar="P", help="fraction that is dropped (default: 0.9)")
    add("--seed", type=int, help="mask seed (default: 0)")
    return parser


def _export(options: argparse.Namespace) -> None:
    _check(options)
    from dpp_lightning.export.plan import plan_export
    from dpp_lightning.export.write import export_checkpoint, export_delta

    plan = plan_export(
        options.checkpoint,
        config_from=options.config_from or options.base,
        config_revision=options.base_revision if options.base and not options.config_from else options.config_revision,
        architecture=options.architecture,
        prefix=options.prefix,
        dtype=None if options.base else options.dtype,
    )
    with progress_bar("exporting") as told:
        if options.base:
            spec = PruningSpec(options.method, options.pruning_rate, options.seed, options.dtype)
            output = export_delta(
                plan, options.base, options.output, spec, base_revision=options.base_revision, progress=told
            )
        else:
            output = export_checkpoint(plan, options.output, max_shard_bytes=options.max_shard_bytes, progress=told)
    for note in plan.notes:
        say(note)
    say(
        f"{output}: {delta_bytes(output):,} bytes, the delta to {options.base}" if options.base else _told(output, plan)
    )


def _told(output: object, plan: Export) -> str:
    size = sum(entry.nbytes for entry in plan.entries)
    return f"{output}: {plan.architecture.name}, {len(plan.tensors)} tensors, {size:,} bytes; files of {plan.source}"


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is read; fill in those of a delta."""
    names = (*_DELTA_OPTIONS, "base-revision")
    given = [f"--{name}" for name in names if getattr(options, name.replace("-", "_")) is not None]
    if not options.base:
        if given:
            raise ValueError(f"{', '.join(given)}: only of a delta folder; give --base BASE too, or leave it out")
        if options.dtype not in (None, *FLOATS):
            raise ValueError(f"--dtype {options.dtype} is of a delta folder; weights are {', '.join(FLOATS)}")
        return
    for name, default in _DELTA_OPTIONS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    spec = PruningSpec(options.method, options.pruning_rate, options.seed, options.dtype)
    if spec.needs_inputs:
        raise ValueError(
            f"{options.method} needs calibration data: export without --base, then dpp prune {options.base} "
            f"{options.output} --method {options.method} --calibration FILE"
        )
    spec.check_calibration(objective=False, inputs=False)
    load_tensors(options.base, options.base_revision)  # that it is there and whole
