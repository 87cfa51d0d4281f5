"""What one weight sees as input on calibration data: sums over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Sums over the calibration tokens of the inputs x of one weight.

    Attributes:
        total: sum of x_j over tokens, float64, shape (features,); for an embedding how often token j came. Of a weight
            that holds several experts, each with inputs of its own, shape (experts, features).
        squares: sum of x_j squared, float64, of the same shape.
        tokens: number of tokens, of all experts together.
        axis: the weight's dimension that features index: 1 for Linear (out, in), 0 for Conv1D (in, out) and
            Embedding (tokens, width); 1 or 2 for experts (experts, in, out) or (experts, out, in).
        embedding: the weight is a table of rows, of which each token takes one.
        largest: maximum of |x_j| over tokens, float64, of the same shape; None of an embedding.
        products: sum of x_j x_k, float64, shape (features, features), of the weight of one linear map; None where they
            were not asked for.
    """

    total: Tensor
    squares: Tensor
    tokens: int
    axis: int
    embedding: bool = False
    largest: Tensor | None = None
    products: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Mean of x_j, float64, of the shape of ``total``."""
        return self.total / max(self.tokens, 1)

    @property
    def covariance(self) -> Tensor:
        """Centred second moment of x, float64, shape (features, features); only with :attr:`products`."""
        assert self.products is not None
        return self.products / max(self.tokens, 1) - self.mean[:, None] * self.mean[None]

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of x_j over all tokens (WANDA's), float64, of the shape of ``total``."""
        return self.squares.sqrt()

    @property
    def rms(self) -> Tensor:
        """Root mean square of x_j, float64, of the shape of ``total``; of an expert the mean is over all experts'
        tokens, so that one which is seldom asked weighs less.

        Of an embedding the root of each token's share, counted as if one further token of every kind had been seen in
        as many places as the batch has, so that a token that did not come keeps a chance.
        """
        if self.embedding:
            return ((self.total + self.tokens / max(len(self.total), 1)) / max(2 * self.tokens, 1)).sqrt()
        return (self.squares / max(self.tokens, 1)).sqrt()

    @property
    def of_one_map(self) -> bool:
        """Whether the weight is one linear map: no embedding, and not several experts."""
        return not self.embedding and self.total.dim() == 1

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether these can be the inputs of a weight of this shape."""
        experts = tuple(shape[: self.total.dim() - 1])
        known = len(shape) == self.total.dim() + 1 and len(experts) <= self.axis < len(shape)
        return known and tuple(self.total.shape) == (*experts, shape[self.axis])
