"""Training of kept values in a run: on the calibration data that it has, by one process for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dpp_lightning.calibration.distillation import IN_A_STEP, Distillation, Report, TrainingSettings
from dpp_lightning.calibration.pieces import samples_of, training_pieces
from dpp_lightning.calibration.teacher import Forward
from dpp_lightning.delta.sparse_delta import SparseDelta

FromFirst = Callable[[Callable[[], Any]], Any]


class SharedDistillation(Distillation):
    """Training by the first process, with its numbers on all of them, so that all hold one delta and decide alike.

    Args:
        module: holds the fine-tuned weights now, and the base's when a method is called.
        batch: of calibration data, as ``forward`` takes it; it is cut into pieces.
        forward: a piece to the outputs that are compared, without padding.
        from_first: calls a function in the first process and gives what it returns to all.
        blocks: where the module's blocks are, if names do not tell.

    Raises:
        ValueError: a batch that cannot be cut into two pieces.
    """

    def __init__(
        self, module: nn.Module, batch: Any, forward: Forward, from_first: FromFirst, blocks: Sequence[str] = ()
    ) -> None:
        samples = samples_of(batch)
        if not samples:
            raise ValueError(
                "the calibration batch cannot be cut into pieces to train on, as its tensors do not have one row for "
                "each sample: leave out the methods that train, or give other calibration data"
            )
        super().__init__(module, training_pieces(batch, IN_A_STEP), forward, samples=samples, blocks=blocks)
        self._from_first = from_first

    def loss(self, delta: SparseDelta) -> float:
        """See :class:`Distillation`; all processes must call."""
        return float(self._from_first(lambda: super(SharedDistillation, self).loss(delta)))

    def train(
        self, delta: SparseDelta, settings: TrainingSettings, report: Report | None = None
    ) -> tuple[SparseDelta, tuple[tuple[float, float], ...]]:
        """See :class:`Distillation`; all processes must call."""

        def numbers() -> tuple[Any, ...]:
            trained, tried = super(SharedDistillation, self).train(delta, settings, report)
            return trained.tensors, trained.info, tried

        tensors, info, tried = self._from_first(numbers)
        return SparseDelta(tensors, delta.carried, info, delta.new_rows), tried


def without_padding(output: Tensor, mask: Any) -> Tensor:
    """(samples, tokens, ...) as (tokens that are no padding, ...), where the mask is of these tokens."""
    if not isinstance(mask, Tensor) or output.dim() < 3 or output.shape[:2] != mask.shape:
        return output
    return output[mask.to(output.device).bool()]
