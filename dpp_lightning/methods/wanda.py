"""WANDA on deltas: the entries whose change of the output is largest on calibration data."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from dpp_lightning.methods.kept_entries import KeptEntries, exact_count
from dpp_lightning.methods.tensor_pair import BLOCK, TensorPair
from dpp_lightning.methods.top_scores import ranked

Per = Literal["layer", "row"]


def wanda(pairs: Sequence[TensorPair], pruning_rate: float, seed: int, *, per: Per = "layer") -> Iterator[KeptEntries]:
    """Keep the highest scores |delta_ij| ||x_j||, exactly k = n - floor(p n) of them.

    ||x_j|| is over the calibration tokens; of the experts of a mixture in one tensor each has its own. Tensors without
    the input of a linear map (embeddings, norms, biases, convolutions) are ranked by |delta|; an embedding that is also
    the head is a linear map.

    Args:
        pairs: with the inputs of the linear maps.
        pruning_rate: p in [0, 1).
        seed: not used.
        per: ``layer`` counts n in each tensor (DAREx), ``row`` in each output row of a linear map (Sun et al. 2024).
    """
    for pair in pairs:
        if per == "row" and pair.inputs is not None and not pair.inputs.embedding:
            yield KeptEntries(_rows(pair, pruning_rate))
        else:
            yield next(ranked([pair], [exact_count(pair.numel, pruning_rate)], "wanda"))


def _rows(pair: TensorPair, pruning_rate: float) -> torch.Tensor:
    """Kept positions with an equal number in every output row, sorted; where scores are equal, the first."""
    assert pair.inputs is not None
    features_last, features = pair.inputs.axis == len(pair.shape) - 1, pair.shape[pair.inputs.axis]
    outputs = pair.shape[-2] if features_last else pair.shape[-1]  # of each expert, where there are several
    count = exact_count(features, pruning_rate)
    scores = torch.cat([score for _, _, score in pair.scores("wanda")]).view(pair.shape)
    scores = (scores if features_last else scores.transpose(-1, -2)).reshape(-1, features)
    kept, step = [], max(BLOCK // max(features, 1), 1)
    for start in range(0, len(scores), step):
        best = torch.sort(scores[start : start + step], dim=1, descending=True, stable=True).indices[:, :count]
        rows = torch.arange(start, start + len(best)).unsqueeze(1)
        first, stride = (rows * features, 1) if features_last else (_first_of_column(rows, features, outputs), outputs)
        kept.append((first + best * stride).flatten())
    return torch.cat(kept).sort().values if kept else torch.empty(0, dtype=torch.int64)


def _first_of_column(rows: torch.Tensor, features: int, outputs: int) -> torch.Tensor:
    """Flat positions of the first feature of outputs, where features come before outputs in each expert."""
    return rows // outputs * (features * outputs) + rows % outputs
