"""Which delta an engine's weights have: a switch that fails is taken back, and what is not known is said."""

from __future__ import annotations

from collections.abc import Callable

from dpp_lightning.serving.base_checkpoint import Changes
from dpp_lightning.serving.vllm.switch import RESTART


class HeldWeights:
    """The base at first.

    Args:
        write: overwrites the weights that hold the first changes of the base so that they hold the second; a ValueError
            where it fails, however much of it is written then.
    """

    def __init__(self, write: Callable[[Changes, Changes], None]) -> None:
        self._write = write
        self._present: Changes = {}
        self._lost = ""  # why the weights are neither the base nor a known delta

    def check(self) -> None:
        """Refuse to go on from weights that are not known.

        Raises:
            RuntimeError: an earlier switch could not be taken back, or was interrupted.
        """
        if self._lost:
            raise RuntimeError(f"the weights are in no known state since {self._lost}; {RESTART}")

    def switch(self, wanted: Changes) -> None:
        """Overwrite the weights.

        Raises:
            ValueError: that failed, and the weights are as before.
            RuntimeError: as :meth:`check`, or that failed and could not be taken back.
        """
        self.check()
        self._lost = "a switch was interrupted"
        try:
            self._write(self._present, wanted)
        except ValueError as error:
            self._take_back(wanted, error)
        self._present, self._lost = wanted, ""

    def _take_back(self, wanted: Changes, error: ValueError) -> None:
        try:
            self._write(wanted, self._present)
        except ValueError as second:
            self._lost = f"a switch failed ({error}) and could not be taken back"
            raise RuntimeError(f"{error}; the weights before could not be restored ({second}): {RESTART}") from error
        self._lost = ""
        raise ValueError(f"{error}; the weights are as before") from error
