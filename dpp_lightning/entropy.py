"""The entropy of predictions, which AdaMerging minimises."""

from torch import Tensor


def prediction_entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of -sum_c p_c log p_c over the predictions, p the softmax of the logits; in nats.

    Args:
        logits: (samples, classes); or, of a causal language model, (samples, tokens, vocabulary).
        mask: for the latter, 1 at real tokens and 0 at padding, (samples, tokens): a prediction counts where the next
            token is real.

    Returns:
        A scalar, differentiable; 0 where no prediction counts.
    """
    logs = logits.float().log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    if mask is None:
        return entropy.mean()
    counts = mask[:, 1:].to(entropy.dtype)
    return (entropy[:, :-1] * counts).sum() / counts.sum().clamp(min=1)
