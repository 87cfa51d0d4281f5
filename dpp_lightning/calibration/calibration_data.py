"""Calibration data, as what pruning may ask of it: the layers' inputs, and a number to minimise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dpp_lightning.calibration.distillation import Distillation
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.input_statistics import InputStatistics


class OutputGradients(Protocol):
    """The output's error on calibration batches with its gradients; the last batch is held out.

    Attributes:
        batches: how many there are, at least 2.
    """

    batches: int

    def loss(self, delta: SparseDelta, batch: int) -> float:
        """The top-5-logit squared error of base plus delta against the fine-tuned model on one batch."""
        ...

    def gradients(self, delta: SparseDelta, batch: int) -> dict[str, Tensor]:
        """Its gradient at the kept entries, by tensor: shape (kept,); tensors that play no part may be left out."""
        ...


@dataclass(frozen=True)
class Objective:
    """What a fit goes by.

    Attributes:
        cost: a candidate delta to a number to be minimised: the output change, or minus a score.
        smooth: the cost is continuous, so that a scalar minimiser may be used; a score is a step function.
        gradients: of the output's error; None where there are none.
        distillation: trains toward the fine-tuned model's outputs; None where nothing can be trained.
    """

    cost: Callable[[SparseDelta], float]
    smooth: bool = True
    gradients: OutputGradients | None = None
    distillation: Distillation | None = None


class CalibrationSource(Protocol):
    """Where calibration data comes from: :class:`Calibration` in memory, or a model folder and a file."""

    def layer_inputs(self, *, products: bool = False) -> Mapping[str, InputStatistics] | None:
        """What every weight of the fine-tuned model sees as input, by canonical name; None where that is not known.

        Args:
            products: with the products of every two features of a linear map, for weighted factors.
        """
        ...

    def objective(self, base: Mapping[str, Tensor], *, gradients: bool, distillation: bool = False) -> Objective | None:
        """What a fit goes by; None where there is nothing to go by.

        Args:
            base: canonical name to the base's value of every tensor that is pruned or reverted.
            gradients: the fit needs gradients.
            distillation: the fit trains toward the fine-tuned model's outputs.
        """
        ...


@dataclass(frozen=True)
class Calibration:
    """Calibration data in memory, for ``prune(calibration=...)``.

    Attributes:
        cost: a candidate :class:`~dpp_lightning.SparseDelta` to a number to be minimised, such as the output change on
            one batch, or minus a score; for methods that fit q, eta or factors.
        inputs: what the layers of the fine-tuned model see, from :func:`dpp_lightning.calibration.collected_inputs`;
            for ``wanda``, ``darex-q-layer`` and ``score="activation"``.
        smooth: whether the cost is continuous (an output change) or a step function (an accuracy).
        gradients: of the output's error, for ``darex-learned``.
        distillation: trains toward the fine-tuned model's outputs, for ``refit``, ``lowrank`` and ``auto``.
    """

    cost: Callable[[SparseDelta], float] | None = None
    inputs: Mapping[str, InputStatistics] | None = None
    smooth: bool = True
    gradients: OutputGradients | None = None
    distillation: Distillation | None = None

    def layer_inputs(self, *, products: bool = False) -> Mapping[str, InputStatistics] | None:
        """See :class:`CalibrationSource`."""
        return self.inputs

    def objective(self, base: Mapping[str, Tensor], *, gradients: bool, distillation: bool = False) -> Objective | None:
        """See :class:`CalibrationSource`; whoever gave the cost knows the base."""
        return None if self.cost is None else Objective(self.cost, self.smooth, self.gradients, self.distillation)
