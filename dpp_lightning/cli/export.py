"""``dpp export``: a trainer's checkpoint to a folder that from_pretrained loads or to a delta folder; a delta to a LoRA
adapter."""

from __future__ import annotations

import inspect
from typing import Any

from dpp_lightning.cli.choices import DtypeName, MethodName
from dpp_lightning.cli.command import FunctionCommand, progress_bar, say
from dpp_lightning.delta.folder import delta_bytes
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.output_folder import DELTA, DENSE, check_output
from dpp_lightning.storage.source_kind import check_checkpoint, check_configuration, check_delta, check_model
from dpp_lightning.tensors.dtypes import FLOATS

_ADAPTER_ORDER = "dpp export DELTA --peft --base BASE"
_ADAPTER_DTYPES = (None, "float32", "bfloat16", "float16")
_ADAPTER_SETTINGS = ("overwrite", "dtype", "architecture", "base_revision", "lora_only", "task", "force")
_OF_ADAPTERS = ("checkpoint", "output", "base", "peft", *_ADAPTER_SETTINGS)


def export_to_folder(
    checkpoint: str,
    *,
    output: str,
    overwrite: bool = False,
    dtype: DtypeName | None = None,
    max_shard_bytes: int = 5_000_000_000,
    config_from: str | None = None,
    config_revision: str | None = None,
    architecture: str | None = None,
    prefix: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    method: MethodName = "dare",
    pruning_rate: float = 0.9,
    seed: int = 0,
    q: float | None = None,
    method_settings: dict[str, float | str] | None = None,
    peft: bool = False,
    lora_only: bool = False,
    task: str | None = None,
    force: bool = False,
) -> None:
    """Write a trainer's checkpoint as a folder that from_pretrained loads, or with --base as a delta folder.

    With --peft a delta of low rank becomes a LoRA adapter.

    Taken are a Lightning .ckpt, a sharded checkpoint of Lightning (FSDP, ModelParallel) and a
    torch.distributed.checkpoint folder, block by block, without a GPU or a process group. No code in the checkpoint is
    run: pickles, .metadata too, are read for tensors and plain values alone. Optimizer states are never read.

    Args:
        checkpoint: a .ckpt file, or a folder with .metadata and *.distcp files; with --peft a delta folder or hub id
        output: the model's, delta's or adapter's folder, new or empty, or see --overwrite; it is none of the inputs and
            lies neither inside nor around one
        overwrite: replace what an earlier run wrote into the output folder, at once when the new is complete; a folder
            that holds any other file is refused all the same
        dtype: of the weights, a float; with --base, how kept values are held; null for the checkpoint's. With --peft of
            the LoRA weights: float32 (null), bfloat16 or float16
        max_shard_bytes: largest file of weights
        config_from: folder or hub id of configuration and tokenizer; by default --base, else the checkpoint's
            hyper-parameter pretrained
        config_revision: branch, tag or commit where that is a hub id
        architecture: class of transformers such as BertForTokenClassification; by default the class of the model type
            whose tensors these are
        prefix: what stands before the model's own names, where the checkpoint holds several models
        base: prune the delta to this folder or hub id, as dpp prune does; with --peft the delta's base, null for the
            one that it names
        base_revision: branch, tag or commit where the base is a hub id
        method: the pruning method
        pruning_rate: fraction of the delta's entries that is dropped, in [0, 1)
        seed: of the random selections, an integer >= 0
        q: divide kept values by this; null for the method's own
        method_settings: the method's own settings, one by one as in --method_settings.budget model
        peft: write a delta of method lowrank as an adapter that peft.PeftModel.from_pretrained loads
        lora_only: leave out biases, norms and heads, which vLLM and other engines do not load
        task: of a merged delta with a head for each task, the one to write
        force: take the base although it is another one than the delta was drawn from
    """
    values, spec = dict(locals()), None
    _check_form(values)
    if peft:
        _write_adapter(checkpoint, base, output, {name: values[name] for name in _ADAPTER_SETTINGS})
        return
    of_a_delta = {name: values[name] for name in ("method", "pruning_rate", "seed", "q", "method_settings")}
    if base is None:
        _check_dense(dtype, {**of_a_delta, "base_revision": base_revision})
    else:
        spec = PruningSpec(**{**of_a_delta, "method_settings": method_settings or {}}, dtype=dtype)
        _check_delta(spec, base, base_revision, output)
    check_checkpoint(checkpoint, "CHECKPOINT")
    check_configuration(config_from, "--config_from", config_revision)
    from dpp_lightning.export.plan import plan_export
    from dpp_lightning.export.write import export_checkpoint, export_delta

    plan = plan_export(
        checkpoint,
        config_from=config_from or base,
        config_revision=base_revision if base and not config_from else config_revision,
        architecture=architecture,
        prefix=prefix,
        dtype=None if base else dtype,
    )
    inputs = ("CHECKPOINT", checkpoint), ("--base", base), ("the configuration's source", plan.source)
    check_output(output, DELTA if base else DENSE, overwrite=overwrite, inputs=inputs, argument="--output")
    with progress_bar("exporting") as progress:
        if base is None or spec is None:
            folder = export_checkpoint(
                plan, output, max_shard_bytes=max_shard_bytes, overwrite=overwrite, progress=progress
            )
            size = sum(entry.nbytes for entry in plan.entries)
            written = f"{plan.architecture.name}, {len(plan.tensors)} tensors, {size:,} bytes; files of {plan.source}"
        else:
            folder = export_delta(
                plan, base, output, spec, base_revision=base_revision, overwrite=overwrite, progress=progress
            )
            written = f"{delta_bytes(folder):,} bytes, the delta to {base}"
    for line in (*plan.notes, f"{folder}: {written}"):
        say(line)


COMMAND = FunctionCommand(
    export_to_folder,
    example="dpp export CHECKPOINT --output DENSE",
    groups={
        "what is written": "output",
        "the model": "config_from",
        "a delta folder in place of a dense one": "base",
        "a LoRA adapter of a delta": "peft",
    },
)


def _check_form(values: dict[str, Any]) -> None:
    """Refuse options of a LoRA adapter where none is written, and with --peft those of checkpoints and of pruning.

    Raises:
        ValueError: with the options' names.
    """
    defaults = {name: p.default for name, p in inspect.signature(export_to_folder).parameters.items()}
    given = [name for name, default in defaults.items() if values[name] != default]
    if not values["peft"]:
        if options := [f"--{name}" for name in given if name in ("lora_only", "task", "force")]:
            raise ValueError(f"{', '.join(options)}: only of a LoRA adapter; give --peft too, or leave it out")
        return
    if options := [f"--{name}" for name in given if name not in _OF_ADAPTERS]:
        raise ValueError(f"{', '.join(options)}: not of a LoRA adapter, which --peft writes of a delta; leave it out")
    if values["dtype"] not in _ADAPTER_DTYPES:
        raise ValueError(f"--dtype {values['dtype']}: LoRA weights are float32, bfloat16 or float16")


def _write_adapter(delta: str, base: str | None, output: str, settings: dict[str, Any]) -> None:
    """Check the sources, write the adapter's folder and say what is in it."""
    check_delta(delta, "DELTA", order=_ADAPTER_ORDER)
    if base is not None:
        check_model(base, "--base", settings["base_revision"], order=_ADAPTER_ORDER)
    from dpp_lightning.export.adapter_folder import ADAPTER, export_adapter

    inputs = ("DELTA", delta), ("--base", base)
    check_output(output, ADAPTER, overwrite=settings["overwrite"], inputs=inputs, argument="--output")
    adapter = export_adapter(delta, base, output, **{**settings, "dtype": settings["dtype"] or "float32"})
    ranks = sorted(set(adapter.ranks.values()))
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    for note in adapter.notes:
        say(note)
    whole = f", {len(adapter.saved_modules)} modules whole" if adapter.saved_modules else ""
    say(f"{output}: LoRA of {len(adapter.ranks)} modules, {span}{whole}, {adapter.num_bytes:,} bytes")


def _check_dense(dtype: str | None, of_a_delta: dict[str, Any]) -> None:
    """Refuse what is of a delta folder, where a dense one is to be written.

    Raises:
        ValueError: with the options' names.
    """
    defaults = {name: p.default for name, p in inspect.signature(export_to_folder).parameters.items()}
    given = [f"--{name}" for name, value in of_a_delta.items() if value != defaults[name]]
    if given:
        raise ValueError(f"{', '.join(given)}: only of a delta folder; give --base BASE too, or leave it out")
    if dtype not in (None, *FLOATS):
        raise ValueError(f"--dtype {dtype} is of a delta folder; weights are {', '.join(FLOATS)}")


def _check_delta(spec: PruningSpec, base: str, base_revision: str | None, output: str) -> None:
    """Refuse a method that needs data, and a base that is not there or not whole, before the checkpoint is read.

    Raises:
        ValueError: with the cure.
        FileNotFoundError: no such base.
    """
    if spec.needs_inputs:
        raise ValueError(
            f"{spec.method} needs calibration data: export without --base, then dpp prune {base} {output} "
            f"--method {spec.method} --calibration FILE"
        )
    spec.check_calibration(objective=False, inputs=False)
    check_model(base, "--base", base_revision)
    load_tensors(base, base_revision)
