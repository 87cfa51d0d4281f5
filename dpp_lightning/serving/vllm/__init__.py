"""vLLM: a running server switches from its base to a delta, to another delta, and back.

vLLM finds this package by the entry point group ``vllm.general_plugins``; its weight-transfer backend is ``dpp``.
"""

from __future__ import annotations


def register() -> None:
    """Make the backend known to vLLM, which calls this in each of its processes; again is harmless.

    A vLLM that has no weight transfer is left as it is: it starts whatever is installed beside it, and refuses the
    option for a backend by itself.
    """
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    if "dpp" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("dpp", "dpp_lightning.serving.vllm.engine", "DppEngine")
