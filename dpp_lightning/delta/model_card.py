"""The model card of a delta folder: a metadata block that the hub reads, and a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpp_lightning.delta.contents import DeltaInfo
from dpp_lightning.methods.merge_rules import MERGES
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.storage.locate import hub_id
from dpp_lightning.storage.safe_text import markdown_code, markdown_text


def card_text(
    info: DeltaInfo,
    num_bytes: int,
    *,
    ranks: Sequence[int] = (),
    factor_numbers: int = 0,
    carried: int = 0,
    carried_bytes: int = 0,
    module_bytes: Mapping[str, int] | None = None,
    scores: Mapping[str, float] | None = None,
    reference_scores: Mapping[str, float] | None = None,
) -> str:
    """Markdown with the hub's metadata block: base, method, rate, q, true size, scores.

    Of a base on this machine only the last part of its path is shown, and the metadata do not name it.

    Args:
        info: the delta's description.
        num_bytes: true bytes of the delta in its folder.
        ranks: of the tensors that have factors.
        factor_numbers: how many numbers these factors are.
        carried, carried_bytes: number and bytes of the dense tensors.
        module_bytes: files of weights of further modules (sentence-transformers) to their bytes.
        scores: name to figure of base plus delta; they are in the metadata too, as ``model-index``.
        reference_scores: name to figure of other models, such as the base and the fine-tuned one.
    """
    tasks = info.tasks
    rows = {
        "base": f"{_base(info)} (fingerprint {markdown_code(info.base_fingerprint)})",
        "pruning rate, q, mask seed": f"{info.pruning_rate:g}, {info.q:.6g}, {info.seed}",
        **_factors(info, ranks, factor_numbers),
        **_training(info),
        "carried dense tensors": f"{carried} ({carried_bytes:,} bytes)",
        "bytes, ratio to the dense model": f"{num_bytes:,}, {info.ratio(num_bytes):.1f}",
    }
    if module_bytes:
        rows["weights of further modules, dense"] = ", ".join(
            f"{markdown_code(n)} ({size:,} bytes)" for n, size in module_bytes.items()
        )
    figures = [(name, f"{value:.6g}") for named in (scores, reference_scores) for name, value in (named or {}).items()]
    lines = [
        "---",
        _metadata(info, scores or {}),
        "---",
        "",
        "# Merged delta" if tasks else "# Pruned delta",
        "",
        _summary(info, tasks),
        "",
        "| | |",
        "|---|---|",
        *(f"| {markdown_text(name)} | {value} |" for name, value in (*rows.items(), *figures)),
        "",
        "```python",
        "from dpp_lightning import SparseDelta",
        "",
        'delta = SparseDelta.from_pretrained("this/folder")' + (f'.for_task("{tasks[0]}")' if tasks else ""),
        "delta.apply_(base_model)   # and delta.revert_(base_model) restores it bit for bit",
        "```",
        "",
    ]
    return "\n".join(lines)


def _summary(info: DeltaInfo, tasks: Sequence[str]) -> str:
    row = METHODS.get(info.method) or MERGES.get(info.method)
    method = markdown_code(info.method)
    rate, paper = f"{100 * info.pruning_rate:g} %", f" ([{row.paper}]({row.url}))" if row else ""
    if tasks:
        merged = f"Deltas of one base ({markdown_text(', '.join(tasks))}) merged with {method}"
        return f"{merged}; together they drop {rate} of the entries{paper}."
    return f"Fine-tuned minus base weights, {rate} of them dropped with {method}{paper}."


def _factors(info: DeltaInfo, ranks: Sequence[int], numbers: int) -> dict[str, str]:
    """The row of factors, where there are any."""
    if not ranks:
        return {}
    rank = f"rank {min(ranks)} to {max(ranks)}" if min(ranks) != max(ranks) else f"rank {ranks[0]}"
    held = f"{numbers:,} numbers in {info.factors_dtype or 'float32'}"
    return {"tensors with factors": f"{len(ranks)}, {rank}, {held}"}


def _training(info: DeltaInfo) -> dict[str, str]:
    """The row of what was trained, as far as the description says it."""
    told = info.training
    before, after = (_number(told.get(key)) for key in ("held_out_before", "held_out_after"))
    parts = [f"on {texts} unlabelled texts"] if (texts := _number(told.get("texts"))) else []
    parts += [f"{steps} steps"] if (steps := _number(told.get("steps"))) else []
    parts += [f"held-out loss {before} → {after}"] if before and after else []
    return {"values trained": ", ".join(parts)} if parts else {}


def _number(value: object) -> str:
    """A number for people; empty for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _metadata(info: DeltaInfo, scores: Mapping[str, float]) -> str:
    """The YAML block. A delta is put onto its base as an adapter is, which is what the hub's ``adapter`` says."""
    from huggingface_hub import EvalResult, ModelCardData  # takes a quarter of a second to import

    base = None if info.base_name is None else hub_id(info.base_name)
    results = [
        EvalResult("other", "unknown", "unknown", metric_type=name, metric_value=value, metric_name=name)
        for name, value in scores.items()
    ]
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="dpp_lightning",
        tags=["delta-parameter-pruning", info.method, *(["merge"] if info.tasks else [])],
        model_name=f"{info.method}-p{info.pruning_rate:g}-seed{info.seed}" if results else None,
        eval_results=results or None,
    )
    return data.to_yaml(line_break="\n")


def _base(info: DeltaInfo) -> str:
    """The base as strangers may read of it: its hub id, or the last part of a local path."""
    if not info.base_name:
        return "unnamed"
    if hub_id(info.base_name):
        return info.base_name
    return f"{markdown_code(info.base_name.replace(chr(92), '/').rstrip('/').rpartition('/')[2])}, not on the hub"
