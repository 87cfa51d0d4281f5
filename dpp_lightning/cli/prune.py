"""``dpp prune``: two checkpoints to a delta folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dpp_lightning.cli.choices import DtypeName, MethodName
from dpp_lightning.cli.command import FunctionCommand, progress_bar, say
from dpp_lightning.delta.folder import DeltaReader, delta_bytes, further_bytes
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.methods.training import Training
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.byte_count import number_of_bytes
from dpp_lightning.storage.checkpoints import total_bytes
from dpp_lightning.storage.model_folder import module_weights
from dpp_lightning.storage.output_folder import DELTA, check_output
from dpp_lightning.storage.source_kind import check_data_file, check_model

_ORDER = "dpp prune BASE FINETUNED"


def prune_to_folder(
    base: str,
    finetuned: str,
    *,
    output: str,
    overwrite: bool = False,
    dtype: DtypeName | None = None,
    weights_only: bool = False,
    method: MethodName = "dare",
    pruning_rate: float = 0.9,
    seed: int = 0,
    q: float | None = None,
    method_settings: dict[str, float | str] | None = None,
    settings: Sequence[str] = (),
    max_bytes: str | None = None,
    max_loss: float | None = None,
    scope: Literal["all", "linear"] = "all",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    carry: Sequence[str] = (),
    outside: Literal["carry", "revert"] = "carry",
    blocks: Sequence[str] = (),
    calibration: str | None = None,
    calibration_samples: int | None = None,
    device: str = "cpu",
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    prefix: str | None = None,
) -> None:
    """Prune the delta between two checkpoints into a delta folder, tensor by tensor.

    Args:
        base: a folder in Hugging Face's layout, a .safetensors or .ckpt file, a sharded checkpoint, or a hub id
        finetuned: the model that was fine-tuned from it, in any of these forms
        output: the delta folder, new or empty, or see --overwrite; it is none of the inputs and lies neither inside nor
            around one
        overwrite: replace what an earlier run wrote into the output folder, at once when the new is complete; a folder
            that holds any other file is refused all the same
        dtype: how kept values are held; null for the fine-tuned dtype, at most 32 bits
        weights_only: put no configuration and tokenizer files beside the delta, only weights of further modules
        method: the pruning method
        pruning_rate: fraction of the delta's entries that is dropped, in [0, 1)
        seed: of the random selections, an integer >= 0
        q: divide kept values by this; null for the method's own
        method_settings: the method's own settings, one by one as in --method_settings.budget model
        settings: the same in short, as in --settings rank=4 rest=0.97
        max_bytes: of method auto: bytes that the delta may have, such as 50kB
        max_loss: of method auto, in place of bytes: the loss on held-out calibration data that it may have
        scope: prune every floating-point tensor, or only the linear maps inside the model's blocks
        include: globs of tensor names: only these are pruned
        exclude: globs of tensor names: these are never pruned
        carry: globs of tensor names: these are stored dense, such as a new head
        outside: a tensor outside the scope is carried (stored dense) or reverted to the base
        blocks: where the blocks are if names do not tell: leading parts of tensor names, such as 'tower.cells.*'
        calibration: text (one example a line), .tsv (two texts a line) or a .safetensors batch, for methods that fit,
            train or weigh by data; never what the model is scored on
        calibration_samples: how many of its examples are used at most; null for 64, 512 for methods that train,
            1024 for auto
        device: where the model runs on them, such as cuda; with --settings loss=block no more of it than one block at a
            time is there
        base_revision: branch, tag or commit where the base is a hub id
        finetuned_revision: likewise of the fine-tuned model
        prefix: what stands before the names of the model that is meant, such as student., where FINETUNED is a
            trainer's checkpoint with several
    """
    limits = {"max_bytes": number_of_bytes(max_bytes, "--max_bytes") if max_bytes else None, "max_loss": max_loss}
    given = {name: value for name, value in limits.items() if value is not None}
    all_settings = _merged(method_settings or {}, _named(settings), given)
    spec = PruningSpec(method, pruning_rate, seed, dtype, q, all_settings)
    inputs = ("BASE", base), ("FINETUNED", finetuned)
    check_output(output, DELTA, overwrite=overwrite, inputs=inputs, argument="--output")
    check_model(base, "BASE", base_revision, order=_ORDER)
    check_model(finetuned, "FINETUNED", finetuned_revision, order=_ORDER, config=calibration is not None)
    place = {"device": device, "streamed": Training.of(all_settings).loss == "block", "blocks": blocks}
    data = _read_calibration(spec, calibration, calibration_samples, finetuned, finetuned_revision, **place)
    with progress_bar("pruning") as progress:
        folder = prune_checkpoint(
            base,
            finetuned,
            output,
            spec,
            scope=Scope.of(scope, include, exclude, outside, carry, blocks),
            calibration=data,
            base_revision=base_revision,
            finetuned_revision=finetuned_revision,
            prefix=prefix,
            weights_only=weights_only,
            overwrite=overwrite,
            progress=progress,
            report=progress.stage,
        )
    _report(folder)


COMMAND = FunctionCommand(
    prune_to_folder,
    example="dpp prune BASE FINETUNED --method darex-q --pruning_rate 0.99 --calibration texts.txt --output DELTA",
    groups={
        "what is written": "output",
        "how it is pruned": "method",
        "what is pruned": "scope",
        "calibration": "calibration",
        "hub": "base_revision",
    },
)


def _merged(*sources: Mapping[str, float | str]) -> dict[str, float | str]:
    """Settings from several places, of which no two may say something else.

    Raises:
        ValueError: two do.
    """
    merged: dict[str, float | str] = {}
    for source in sources:
        for name, value in source.items():
            if merged.setdefault(name, value) != value:
                raise ValueError(f"the setting {name} is given twice, as {merged[name]!r} and as {value!r}: keep one")
    return merged


def _named(settings: Sequence[str]) -> dict[str, float | str]:
    """``NAME=VALUE`` words, values as numbers where they read as numbers."""
    found: dict[str, float | str] = {}
    for word in settings:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"--settings takes NAME=VALUE, such as rank=4, got {word!r}")
        try:
            found[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            found[name] = value
    return found


def _read_calibration(
    spec: PruningSpec, file: str | None, samples: int | None, finetuned: str, revision: str | None, **place: Any
) -> Any | None:
    """The calibration data of a file; what the method cannot do without, or has no use for, is refused."""
    if file is None:
        spec.check_calibration(objective=False, inputs=False)
        if place["device"] != "cpu":
            raise ValueError("--device is where the model runs on calibration data: give --calibration too")
        return None
    if spec.row.fit is None and not spec.needs_inputs:
        calibrated = ", ".join(name for name, row in METHODS.items() if row.fit or row.inputs)
        raise ValueError(f"{spec.method} has nothing to calibrate; methods that do: {calibrated}")
    check_data_file(file, "--calibration")
    from dpp_lightning.pruning.file_calibration import FileCalibration

    if samples is None and spec.fit is not None:
        samples = spec.fit.samples
    return FileCalibration(finetuned, file, samples=samples, revision=revision, **place)


def _report(folder: Path) -> None:
    """What was written, from the config and the heads of the chunks: nothing is drawn or decoded again."""
    reader = DeltaReader.open(folder)
    info, size, side_bytes = reader.info, delta_bytes(folder), further_bytes(folder)
    dense = {**reader.carried, **reader.new_rows}
    kept = sum(head.kept for _, head in reader.chunks.heads) + sum(reader.table.factor_numbers)
    kept += sum(t.numel() for t in dense.values())
    say(
        f"{folder}: {size:,} bytes, {info.ratio(size):.1f} times smaller than the model "
        f"({info.method}, p={info.pruning_rate:g}, q={info.q:.4g}, density {100 * kept / max(info.entries, 1):.3g} %)"
    )
    if dense:
        names = ", ".join([*dense][:6]) + (", …" if len(dense) > 6 else "")
        say(f"stored dense, {total_bytes(dense):,} bytes: {names}")
    if side_bytes:
        say(f"beside it, {side_bytes:,} bytes: files unlike the base's (--weights_only leaves them out)")
    if modules := module_weights(folder):
        module_bytes = sum(path.stat().st_size for path in modules.values())
        say(f"weights of further modules as they are, {module_bytes:,} bytes: {', '.join(modules)}")
    if info.absent_files:
        say(f"absent from the fine-tuned model, so not taken from the base: {', '.join(info.absent_files)}")
