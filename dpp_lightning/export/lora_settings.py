"""Rank and scale of every LoRA adapter in a checkpoint, as its hyper-parameter ``lora`` and peft's rules have them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MERGE_CURE = "merge them before saving, with model.merge_and_unload()"
_PATTERNS = ("rank_pattern", "alpha_pattern")
_READ = ("r", "alpha", "use_rslora", *_PATTERNS)
# What these say of targets, training and first values, the adapters in the file have in them.
_WITHOUT_EFFECT = (
    "dropout", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "bias", "lora_bias", "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "task_type", "inference_mode", "base_model_name_or_path", "revision",
    "auto_mapping", "peft_version", "runtime_config", "megatron_core", "qalora_group_size",
)  # fmt: skip


@dataclass(frozen=True)
class LoRASettings:
    """What scales W + scaling B A.

    Attributes:
        r, alpha: of all adapters but those below.
        use_rslora: the scaling is alpha / sqrt(r) rather than alpha / r.
        rank_pattern, alpha_pattern: the end of a module's name, a regular expression, to its own r or alpha.
    """

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def read(cls, hyper_parameters: Mapping[str, Any], example: str) -> LoRASettings:
        """The hyper-parameters ``lora`` of a checkpoint.

        Args:
            hyper_parameters: of the checkpoint.
            example: name of an adapted weight, for the message.

        Raises:
            ValueError: ``r`` or ``alpha`` is missing, a pattern is none, or there are settings that change what
                adapters compute in another way.
        """
        lora = hyper_parameters.get("lora")
        if not isinstance(lora, Mapping) or not all(isinstance(lora.get(n), int | float) for n in ("r", "alpha")):
            raise ValueError(
                f"the checkpoint holds LoRA adapters, of {example} for one, but not their scale, the hyper-parameters "
                f"lora = {{r, alpha}}; {MERGE_CURE}"
            )
        known = (*_READ, *_WITHOUT_EFFECT)
        for name, value in lora.items():
            if value and name not in known and not _repeats(name, value, lora):
                raise ValueError(
                    f"how adapters with the hyper-parameter lora.{name} = {value!r} are merged is not known here; "
                    f"{MERGE_CURE}, or leave it out where it changes no adapter"
                )
        patterns = [_pattern(name, lora.get(name)) for name in _PATTERNS]
        return cls(lora["r"], float(lora["alpha"]), bool(lora.get("use_rslora")), *patterns)

    def rank(self, module: str) -> int:
        """Rank of one adapter.

        Args:
            module: name of the adapted module in the model that peft has adapted.
        """
        return int(_own(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """What B A is multiplied by.

        Args:
            module: as for :meth:`rank`.
        """
        rank, alpha = self.rank(module), float(_own(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def check_patterns(self, modules: Iterable[str]) -> None:
        """Check that every pattern is of an adapted module, so that none is lost by a name that is read otherwise.

        Args:
            modules: names of all adapted modules.

        Raises:
            ValueError: a pattern of none of them.
        """
        modules = list(modules)
        for what in _PATTERNS:
            for key in getattr(self, what):
                if not any(_own({key: 1}, module, None) for module in modules):
                    raise ValueError(
                        f"the hyper-parameter lora.{what} has {key!r}, which is the name of no adapted module, such as "
                        f"{modules[0]}; {MERGE_CURE}"
                    )


def _own(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """A module's value, found as peft finds it."""
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), module), default)


def _repeats(name: str, value: Any, lora: Mapping[str, Any]) -> bool:
    """Whether a setting, as peft's configuration calls it, repeats what is known."""
    return (name == "lora_alpha" and value == lora["alpha"]) or (name == "peft_type" and str(value).endswith("LORA"))


def _pattern(name: str, value: Any) -> dict[str, Any]:
    """A pattern's keys and numbers.

    Raises:
        ValueError: it is none.
    """
    if not value:
        return {}
    try:
        numbers = {str(re.compile(key).pattern): number for key, number in value.items()}
    except (AttributeError, TypeError, re.error):
        numbers = {"": None}
    if not all(isinstance(number, int | float) and number > 0 for number in numbers.values()):
        raise ValueError(
            f"the hyper-parameter lora.{name} is {value!r}, expected names of modules and numbers above 0; {MERGE_CURE}"
        )
    return numbers
