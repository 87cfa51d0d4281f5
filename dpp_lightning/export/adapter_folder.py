"""A delta of low rank, in memory or in a folder, to the folder of a LoRA adapter."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dpp_lightning.delta.contents import DeltaInfo
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.export.peft_adapter import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, make_adapter
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.model_folder import dense_side_files, side_files
from dpp_lightning.storage.output_folder import FolderKind, output_folder
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.tensors.hf_architecture import skeleton
from dpp_lightning.tensors.names import canonical_tensors

ADAPTER = FolderKind("an adapter", (CONFIG_FILE, WEIGHTS_FILE), ("README.md",))


def export_adapter(
    delta: str | Path | SparseDelta,
    base: str | Path | PreTrainedModel | None,
    output: str | Path,
    *,
    dtype: str = "float32",
    task: str | None = None,
    architecture: str | None = None,
    lora_only: bool = False,
    force: bool = False,
    base_revision: str | None = None,
    overwrite: bool = False,
) -> PeftAdapter:
    """Write a delta of low rank as a LoRA adapter that ``peft.PeftModel.from_pretrained`` loads, whole or not at all.

    Args:
        delta: a delta folder, a hub id, or a delta in memory.
        base: folder, file or hub id of its base, or the base model in memory with the fine-tuned head; None for the one
            that the delta names.
        output: a folder that is new, empty, or with ``overwrite`` that of an older adapter; none of the inputs, nor
            inside or around one (:mod:`dpp_lightning.storage.output_folder`).
        dtype, lora_only, force: as for :func:`dpp_lightning.export.peft_adapter.make_adapter`.
        task: of a merged delta with a head for each task, the one to write.
        architecture: class of transformers; by default the one that the fine-tuned configuration names.
        base_revision: branch, tag or commit of a hub id.
        overwrite: replace an older adapter in the output folder, at once when the new one is complete.

    Returns:
        What was written.

    Raises:
        FileExistsError: the output folder holds something that is not to be replaced.
        FileNotFoundError: no such delta or base.
        ValueError: as :func:`dpp_lightning.export.peft_adapter.make_adapter`; no base is named; or the output is, holds
            or lies in an input.
        OSError: it cannot be written.
    """
    contents = delta.contents if isinstance(delta, SparseDelta) else DeltaReader.open(delta).contents
    info = contents.info()
    if base is None and not info.base_name:
        raise ValueError("the delta does not name its base: give its folder or hub id (--base BASE)")
    base, revision = (info.base_name or "", info.base_revision) if base is None else (base, base_revision)
    of_files = ("delta", delta), ("base", base)
    inputs = [(label, source) for label, source in of_files if isinstance(source, str | Path)]
    with output_folder(output, ADAPTER, overwrite=overwrite, inputs=inputs) as folder:
        if isinstance(base, PreTrainedModel):
            name, tensors, config = base.name_or_path or info.base_name, canonical_tensors(base), base.config
            architecture = architecture or type(base).__name__
        else:
            check_model(base, "base", revision)
            name, tensors = str(base), canonical_tensors(load_tensors(base, revision))
            config = _configuration(base, delta, info, revision, task)
        model = _model_of(config, architecture)
        where = "the delta" if isinstance(delta, SparseDelta) else str(delta)
        contents = contents.for_task(task)
        adapter = make_adapter(
            contents, model, tensors, dtype=dtype, lora_only=lora_only, force=force, where=where,
            base_name=name or "the base",
        )  # fmt: skip
        adapter.write(folder, name, revision)
    return adapter


def _configuration(
    base: str | Path, delta: str | Path | SparseDelta, info: DeltaInfo, revision: str | None, task: str | None
) -> PretrainedConfig:
    """The fine-tuned model's configuration: the delta's where it has one, else the base's.

    Raises:
        ValueError: neither has one of a model of transformers.
    """
    if isinstance(delta, SparseDelta):
        files = side_files(base, revision)
    else:
        files = dense_side_files(base, delta, base_revision=revision, tasks=info.tasks, task=task)
    if "config.json" not in files:
        raise ValueError(f"neither the delta nor {base} has a config.json, which says what model it is: add one")
    try:
        return AutoConfig.from_pretrained(files["config.json"], trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{files['config.json']} is of no model that transformers knows: {reason}") from error


def _model_of(config: PretrainedConfig, architecture: str | None) -> PreTrainedModel:
    """A model without values of the class that is asked for, or else of the one that the configuration names."""
    name = architecture or next(iter(config.architectures or ()), None)
    model = skeleton(name, config, asked=True) if name else None
    if model is None:
        raise ValueError("the configuration names no class of transformers: give --architecture (architecture=)")
    return model
