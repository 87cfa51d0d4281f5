"""Deltas of one base to be merged, and a delta as full tensors."""

import torch
from tiny import pair

from dpp_lightning import prune

METHODS = (("dare", {}), ("magnitude", {}), ("importance", {"q": 0.1}), ("darex-q", {"q": 0.2}))


def dense(delta, base):
    """The delta as full tensors, by name."""
    whole = {}
    for name, sparse in delta.tensors.items():
        flat = torch.zeros(torch.Size(sparse.shape).numel(), dtype=torch.float64)
        flat[sparse.indices.long()] = sparse.values.double() / delta.q
        whole[name] = flat.reshape(sparse.shape)
    return whole


def deltas_of(base, number=3, rate=0.7):
    made = {}
    for k in range(number):
        _, finetuned = pair(seed=0)
        torch.manual_seed(100 + k)
        with torch.no_grad():
            for p, q in zip(finetuned.parameters(), base.parameters(), strict=True):
                p.copy_(q + 0.01 * torch.randn_like(q))
        method, settings = METHODS[k % len(METHODS)]
        made[f"t{k}"] = prune(base, finetuned, method, rate, seed=k, **settings)
    return made
