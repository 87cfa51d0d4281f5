"""What one weight sees as input on calibration data: sums over tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Sums over the calibration tokens of the inputs x of one weight.

    Attributes:
        total: sum of x_j over tokens, float64, shape (features,); for an embedding how often token j came.
        squares: sum of x_j squared, float64, shape (features,).
        tokens: number of tokens.
        axis: the weight's dimension that features index: 1 for Linear (out, in), 0 for Conv1D (in, out) and
            Embedding (tokens, width).
        embedding: the weight is a table of rows, of which each token takes one.
        largest: maximum of |x_j| over tokens, float64, shape (features,); None of an embedding.
    """

    total: Tensor
    squares: Tensor
    tokens: int
    axis: int
    embedding: bool = False
    largest: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Mean of x_j, float64, shape (features,)."""
        return self.total / max(self.tokens, 1)

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of x_j over all tokens (WANDA's), float64, shape (features,)."""
        return self.squares.sqrt()

    @property
    def rms(self) -> Tensor:
        """Root mean square of x_j, float64, shape (features,).

        Of an embedding the root of each token's share, counted as if one further token of every kind had been seen in
        as many places as the batch has, so that a token that did not come keeps a chance.
        """
        if self.embedding:
            return ((self.total + self.tokens / max(len(self.total), 1)) / max(2 * self.tokens, 1)).sqrt()
        return (self.squares / max(self.tokens, 1)).sqrt()
