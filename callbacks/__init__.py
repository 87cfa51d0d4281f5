"""Lightning callbacks of dpp_lightning. The folder is mapped into the package: always import
``dpp_lightning.callbacks``."""

if __name__ != "dpp_lightning.callbacks":
    raise ImportError(
        f"this folder was imported as {__name__!r}, but it is the package 'dpp_lightning.callbacks'; "
        "install the project (pip install -e .) and write: from dpp_lightning.callbacks import DeltaPruneCallback"
    )

from dpp_lightning.callbacks.apply_delta import ApplyDelta
from dpp_lightning.callbacks.delta_prune import DeltaPruneCallback
from dpp_lightning.callbacks.write_predictions import WritePredictions

__all__ = ["ApplyDelta", "DeltaPruneCallback", "WritePredictions"]
