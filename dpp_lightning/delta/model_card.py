"""The model card of a delta folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dpp_lightning.delta.task_heads import task_names
from dpp_lightning.methods.merge_rules import MERGES
from dpp_lightning.methods.registry import METHODS

if TYPE_CHECKING:
    from dpp_lightning.delta.contents import DeltaInfo


def model_card(
    info: DeltaInfo, num_bytes: int, scores: Mapping[str, float], carried: int = 0, carried_bytes: int = 0
) -> str:
    """Markdown with the hub's metadata block: base, method, rate, q, true size, scores.

    Args:
        info: the delta's description.
        num_bytes: true bytes of the folder's model and config files.
        scores: name to figure; left out if empty.
        carried, carried_bytes: number and bytes of the dense tensors.
    """
    row = METHODS.get(info.method) or MERGES.get(info.method)
    tasks = task_names(info)
    head = ["---", "library_name: dpp_lightning", "tags:", "- delta-parameter-pruning"]
    if info.base_name and not Path(info.base_name).is_absolute():
        head.insert(1, f"base_model: {info.base_name}")
    ratio = info.dense_bytes / max(num_bytes, 1)
    lines = [
        *head,
        "---",
        "",
        "# Merged delta" if tasks else "# Pruned delta",
        "",
        (
            f"Deltas of one base ({', '.join(tasks)}) merged with `{info.method}`; together they drop "
            f"{100 * info.pruning_rate:g} % of the entries"
            if tasks
            else f"Fine-tuned minus base weights, {100 * info.pruning_rate:g} % of them dropped with `{info.method}`"
        )
        + (f" ([{row.paper}]({row.url}))." if row else "."),
        "",
        "| | |",
        "|---|---|",
        f"| base | {info.base_name or 'unnamed'} (fingerprint `{info.base_fingerprint}`) |",
        f"| pruning rate, q, mask seed | {info.pruning_rate:g}, {info.q:.6g}, {info.seed} |",
        f"| carried dense tensors | {carried} ({carried_bytes:,} bytes) |",
        f"| bytes, ratio to the dense model | {num_bytes:,}, {ratio:.1f} |",
        *(f"| {name} | {value:.6g} |" for name, value in scores.items()),
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
