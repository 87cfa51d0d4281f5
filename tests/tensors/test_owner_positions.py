"""Positions in tensors as files hold them, as positions in the parameters they are parts of or consist of."""

import torch

from dpp_lightning.tensors.hf_layout import FilePlace
from dpp_lightning.tensors.names import NamedTensor
from dpp_lightning.tensors.owner_positions import positions_in_owners


def named(name, owner, place, *more):
    return NamedTensor(name, name, name, owner, place, more=more)


def check(tensors, positions):
    """Entries marked through the parts of the owners are those at the positions that are found."""
    marks = {id(owner): torch.zeros(owner.shape) for n in tensors for owner, _ in n.pieces}
    for n in tensors:
        parts, start = [place.of(marks[id(owner)]) for owner, place in n.pieces], 0
        for part in parts:
            flat = torch.zeros(part.numel())
            inside = [
                p - start for p in positions.get(n.name, torch.empty(0)).tolist() if 0 <= p - start < part.numel()
            ]
            flat[inside] = 1
            part += flat.view(part.shape)
            start += part.numel()
    found = positions_in_owners(tensors, positions)
    assert {id(owner) for owner in found} == marks.keys()
    for owner, kept in found.items():
        assert kept.tolist() == marks[id(owner)].flatten().nonzero().flatten().tolist()


def test_parts_of_one_tensor_also_transposed():
    owner = torch.empty(2, 3, 4)
    first = named("experts.0", owner, FilePlace("w", (3, 4), (4, 1), 0))
    second = named("experts.1", owner, FilePlace("w", (4, 3), (1, 4), 12))
    check([first, second], {"experts.0": torch.tensor([0, 5, 11]), "experts.1": torch.tensor([1, 2, 7])})


def test_a_tensor_of_several_and_one_without_kept_entries():
    query, key, bias = torch.empty(2, 3), torch.empty(1, 3), torch.empty(4)
    joined = named("qk", query, FilePlace("q"), (key, FilePlace("k")))
    check([joined, named("bias", bias, FilePlace("bias"))], {"qk": torch.tensor([0, 5, 6, 8])})
