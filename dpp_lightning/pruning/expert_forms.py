"""The two forms in which the experts of a mixture are saved: a tensor for each, or all in one tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable

_ONE_EACH = re.compile(r"(^|\.)experts\.\d+\.")
_TOGETHER = re.compile(r"(^|\.)experts\.[A-Za-z_]\w*(\.weight)?$")


def check_expert_forms(finetuned: Iterable[str], base: Iterable[str]) -> None:
    """Refuse two models of which one has its experts fused and the other has not.

    Args:
        finetuned, base: names of tensors that only the one side has.

    Raises:
        ValueError: in one line, with a tensor of each side and the cure.
    """
    finetuned, base = list(finetuned), list(base)
    for together, each, which in ((finetuned, base, "fine-tuned model"), (base, finetuned, "base")):
        fused = next(filter(_TOGETHER.search, together), None)
        single = next(filter(_ONE_EACH.search, each), None)
        if fused and single:
            raise ValueError(
                f"the {which} holds its experts in one tensor ({fused}), the other model one by one ({single}): load "
                "it with transformers' from_pretrained and save it with save_pretrained, which writes them one by one"
            )
