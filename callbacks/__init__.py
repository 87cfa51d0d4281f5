"""Callbacks of dpp_lightning for Lightning, and one for the Hugging Face ``Trainer``. The folder is mapped into the
package: always import ``dpp_lightning.callbacks``."""

if __name__ != "dpp_lightning.callbacks":
    raise ImportError(
        f"this folder was imported as {__name__!r}, but it is the package 'dpp_lightning.callbacks'; "
        "install the project (pip install -e .) and write: from dpp_lightning.callbacks import DeltaPruneCallback"
    )

from typing import TYPE_CHECKING, Any

from dpp_lightning.callbacks.apply_delta import ApplyDelta
from dpp_lightning.callbacks.delta_prune import DeltaPruneCallback
from dpp_lightning.callbacks.sparse_training import SparseTraining
from dpp_lightning.callbacks.write_predictions import WritePredictions

if TYPE_CHECKING:
    from dpp_lightning.callbacks.hf_delta_prune import HFDeltaPruneCallback

__all__ = ["ApplyDelta", "DeltaPruneCallback", "HFDeltaPruneCallback", "SparseTraining", "WritePredictions"]


def __getattr__(name: str) -> Any:
    """The callback for the Hugging Face ``Trainer``, whose import takes long, when it is asked for."""
    if name == "HFDeltaPruneCallback":
        from dpp_lightning.callbacks.hf_delta_prune import HFDeltaPruneCallback

        return HFDeltaPruneCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
