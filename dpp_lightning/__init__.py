"""Delta parameter pruning on PyTorch Lightning: train with AdamR, prune the delta at the end of fit, ship a small file.

Importing this package costs no torch, transformers or lightning: the public names load on first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpp_lightning._version import __version__

if TYPE_CHECKING:
    from dpp_lightning.delta.sparse_delta import SparseDelta
    from dpp_lightning.merging.merge_deltas import merge
    from dpp_lightning.methods import METHODS, Method, register_method
    from dpp_lightning.pruning.in_memory import prune
    from dpp_lightning.serving.delta_pool import DeltaPool

__all__ = ["METHODS", "DeltaPool", "Method", "SparseDelta", "__version__", "merge", "prune", "register_method"]

_MODULES = {
    "DeltaPool": "dpp_lightning.serving.delta_pool",
    "METHODS": "dpp_lightning.methods",
    "Method": "dpp_lightning.methods",
    "SparseDelta": "dpp_lightning.delta.sparse_delta",
    "merge": "dpp_lightning.merging.merge_deltas",
    "prune": "dpp_lightning.pruning.in_memory",
    "register_method": "dpp_lightning.methods",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
