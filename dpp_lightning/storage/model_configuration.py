"""What of a model's configuration changes its answers, apart from what its weights say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONFIG = "config.json"
OF_ANSWERS = ("id2label", "label2id", "problem_type", "pad_token_id")  # what pipelines and heads read
# What does not change the answers of a model that is there: notes, training, special tokens of generation.
_IDLE = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "vocab_size", "use_cache",
    "initializer_range", "gradient_checkpointing", "finetuning_task", "bos_token_id", "eos_token_id",
    "task_specific_params", "output_attentions", "output_hidden_states",
)  # fmt: skip


def other_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Names of the settings by which a model computes in another way, such as its activation, sorted.

    Args:
        theirs, ours: two configurations as plain values; what only one of them has is not compared.
    """
    idle = {*OF_ANSWERS, *_IDLE}
    return sorted(
        key for key in theirs.keys() & ours.keys() if theirs[key] != ours[key] and key not in idle and "drop" not in key
    )
