"""Pruning from files to a file, one pair of tensors at a time, so that models may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from dpp_lightning.calibration.calibration_data import CalibrationSource
from dpp_lightning.calibration.fit_rescaling import Report
from dpp_lightning.delta.contents import DeltaContents, SparseTensor
from dpp_lightning.delta.empty_delta import warning_if_empty
from dpp_lightning.delta.folder import set_q, write_files
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.finetuned_source import read_finetuned
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import Progress, load_tensors, total_bytes
from dpp_lightning.storage.locate import local_path
from dpp_lightning.storage.mapped_file import will_need
from dpp_lightning.storage.model_folder import changed_side_files, is_module_weights
from dpp_lightning.storage.output_folder import DELTA, output_folder
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.tensors.flat_entries import EntriesHash


def prune_checkpoint(
    base: str | Path,
    finetuned: str | Path,
    output: str | Path,
    spec: PruningSpec,
    *,
    scope: Scope | None = None,
    calibration: CalibrationSource | None = None,
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    prefix: str | None = None,
    weights_only: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Path:
    """Prune the delta between two checkpoints into a delta folder, which appears whole or not at all.

    The fine-tuned model's configuration, tokenizer and generation files, and the further modules of a
    sentence-transformers model, are put beside the delta where they are not the base's own; those of the base that it
    does not have are named in the delta.

    Args:
        base, finetuned: folders in Hugging Face's layout, files, or hub ids, see
            :func:`dpp_lightning.storage.checkpoints.load_tensors`.
        output: folder of the delta: new, empty, or with ``overwrite`` an older delta's; none of the inputs, nor inside
            or around one (:mod:`dpp_lightning.storage.output_folder`).
        spec: what is drawn.
        scope: which tensors are pruned; default all.
        calibration: data for methods that weigh by the layers' inputs, or that find q or further weights.
        base_revision, finetuned_revision: of hub ids.
        prefix: what stands before the names of the model that is meant, where the fine-tuned checkpoint holds several.
        weights_only: put no configuration, tokenizer and generation files beside the delta, only weights of further
            modules (sentence-transformers).
        overwrite: replace an older delta in the output folder, at once when the new one is complete.
        progress: called with the bytes of both models that are done, and all of them.
        report: called with what a fit tries.

    Raises:
        ValueError: as in :func:`dpp_lightning.pruning.in_memory.prune`; or the output is, holds or lies in an input.
        FileExistsError: the output folder holds something that is not to be replaced.
        OSError: it cannot be written.
    """
    spec.check_calibration(objective=calibration is not None, inputs=calibration is not None)
    inputs = ("base", base), ("finetuned", finetuned)
    with output_folder(output, DELTA, overwrite=overwrite, inputs=inputs) as folder:
        check_model(base, "base", base_revision)
        tuned = read_finetuned(finetuned, finetuned_revision, base=base, base_revision=base_revision, prefix=prefix)
        plan = PruningPlan.of(
            load_tensors(base, base_revision),
            tuned.tensors,
            scope or Scope(),
            base_name=str(base),
            base_revision=base_revision,
            files=tuned.exact,
        )
        beside: dict[str, Path | bytes | None] = {
            **changed_side_files(base, finetuned, base_revision, finetuned_revision, weights_only=weights_only),
            **({} if weights_only else tuned.files),
        }
        if not any(is_module_weights(name) for name in beside):  # else a further module was trained alone
            plan.checks.check_changed()
        plan = plan.for_spec(spec, calibration)
        if spec.streams or calibration is None:
            _stream(folder, plan, spec, beside, progress)
            q = spec.q
            if q is None and spec.fit is not None and calibration is not None:
                drawn = SparseDelta.from_pretrained(folder)
                rescaling = plan.fit(spec, drawn, calibration, report=report)
                q = rescaling.apply(drawn).q if rescaling is not None else None
            if q is not None:
                set_q(folder, q)
        else:  # the kept values get weights, which are known only when all entries are
            delta, _ = plan.draw_and_fit(spec, calibration, report=report)
            delta.save_pretrained(folder, side_files=beside)
    return local_path(output)


def _stream(
    folder: Path,
    plan: PruningPlan,
    spec: PruningSpec,
    beside: Mapping[str, Path | bytes | None],
    progress: Progress | None,
) -> None:
    """Draw and write one pair of tensors at a time."""
    check = EntriesHash()
    contents = DeltaContents(
        [(pair.name, pair.shape) for pair in plan.pairs],
        lambda: _with_hashes(plan, plan.stream(spec, final=True), check, progress),
        plan.carried,
        plan.new_rows,
        lambda: plan.info(spec, check, final=True),
    )
    contents = warning_if_empty(contents, "the pruned delta")
    write_files(
        folder,
        contents,
        seeded=spec.seeded,
        dtype=spec.dtype,
        factors_dtype=spec.factors_dtype,
        rest=spec.rest < 1,
        side_files=beside,
    )


def _with_hashes(
    plan: PruningPlan,
    stream: Iterator[tuple[str, SparseTensor, Tensor]],
    check: EntriesHash,
    progress: Progress | None,
) -> Iterator[tuple[str, SparseTensor]]:
    """The stream, while the base is hashed and both sides are checked, so that pages are read once; with progress."""
    sides = {pair.name: (pair.base, pair.finetuned) for pair in plan.pairs}
    sizes = {name: total_bytes({"base": pair[0], "finetuned": pair[1]}) for name, pair in sides.items()}
    done, total, names = 0, sum(sizes.values()), list(sizes)

    plan.checks.check_carried_finite()

    def hash_and_read_ahead(index: int) -> None:
        """Hash and check one pair while another thread draws from it, and have the next one read."""
        for tensor in sides[names[index + 1]] if index + 1 < len(names) else ():
            will_need(tensor)
        plan.read(names[index])

    with ThreadPoolExecutor(1) as hashing:
        for index in range(len(names)):
            pending = hashing.submit(hash_and_read_ahead, index)
            try:
                name, kept, base = next(stream)
            except ValueError as error:  # a method may meet NaN first; the message is the same for all
                if fault := plan.checks.not_finite():
                    raise ValueError(fault) from error
                raise
            check.update(base)
            yield name, kept
            pending.result()
            done += sizes[name]
            if progress:
                progress(done, total)
