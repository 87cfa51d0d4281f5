"""Overwriting entries by way of a loader, into any part of a packed tensor; whole tensors where it does more than copy."""

import pytest
import torch
from torch import nn

from dpp_lightning.serving.base_checkpoint import NewValues
from dpp_lightning.serving.vllm.in_place import check_loader, overwrite

LOADERS = {
    "whole": lambda place, tensor: place.copy_(tensor),
    "rows": lambda place, tensor: place[:2].copy_(tensor[3:5]),
    "columns": lambda place, tensor: place[:, 1:4].copy_(tensor.narrow(1, 2, 3)),
    "block": lambda place, tensor: place[1:4, :2].copy_(tensor[2:5, 1:3]),
    "transposed": lambda place, tensor: place.copy_(tensor.t()),
    "transposed rows": lambda place, tensor: place[:3].copy_(tensor.t()[2:5]),
    "heads": lambda place, tensor: place.copy_(tensor.view(2, 3, 6)),
    "in two": lambda place, tensor: [place[:3].copy_(tensor[:3]), place[3:].copy_(tensor[3:])],
    "a scalar": lambda place, tensor: place.copy_(tensor),
}
PLACES = {"heads": (2, 3, 6), "a scalar": (), "transposed rows": (3, 6)}
TENSORS = {"a scalar": ()}


class Model(nn.Module):
    """One place and the loader that fills it."""

    def __init__(self, loader, place=(6, 6)):
        super().__init__()
        self.loader, self.place = loader, nn.Parameter(torch.zeros(place, dtype=torch.bfloat16))

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "weight":
                self.loader(self.place.data, tensor)
            elif name != "rotary.inv_freq":
                raise KeyError(name)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("kept", [0.0, 0.3, None])
def test_the_model_is_the_one_that_is_loaded_with_the_new_tensor(name, kept):
    """``kept``: the share of entries that change, or all of them without positions."""
    torch.manual_seed(3)
    tensor = torch.randn(TENSORS.get(name, (6, 6)))
    new = torch.randn_like(tensor)
    chosen = torch.rand(tensor.numel()) < (1.0 if kept is None else kept)
    if name == "a scalar" and kept:
        chosen = torch.tensor([True])
    indices = chosen.nonzero().flatten()
    indices = indices[torch.randperm(len(indices))]
    finetuned = torch.where(chosen.view(tensor.shape), new, tensor)
    expected, model = (Model(LOADERS[name], PLACES.get(name, (6, 6))) for _ in range(2))
    expected.load_weights([("weight", finetuned)])
    model.load_weights([("weight", tensor)])
    assert not check_loader(model, {"weight": tensor})
    changed = NewValues(None, new.reshape(-1)) if kept is None else NewValues(indices, new.reshape(-1)[indices])
    overwrite(model, {"weight": tensor, "unused": tensor.clone()}, [("weight", changed)])
    assert torch.equal(model.place, expected.place)


def test_tensors_that_share_a_storage_are_told_apart():
    storage = torch.arange(72.0)
    tensors = {"first": storage[:36].view(6, 6), "weight": storage[36:].view(6, 6)}
    model = Model(LOADERS["whole"])
    overwrite(model, tensors, [("weight", NewValues(torch.tensor([7]), torch.tensor([5.0])))])
    assert model.place.nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "loader",
    [
        lambda place, tensor: place.copy_(tensor + 1),
        lambda place, tensor: place.copy_(tensor.double()),
        lambda place, tensor: place.copy_(tensor.view(2, 3, 6).transpose(0, 1).reshape(6, 6)),
        lambda place, tensor: place.copy_(tensor[:1].expand(6, 6)),
        lambda place, tensor: [place.copy_(tensor), place.copy_(-place.exp())],
    ],
)
def test_loaders_that_do_more_than_copying_are_given_whole_tensors(loader):
    torch.manual_seed(3)
    tensor, indices, values = torch.randn(6, 6), torch.tensor([30, 1, 4]), torch.randn(3)
    model, expected = Model(loader), Model(loader)
    model.load_weights([("weight", tensor)])
    before = model.place.clone()
    whole = check_loader(model, {"weight": tensor})
    assert whole == {"weight"}
    assert torch.equal(model.place, before)
    overwrite(model, {"weight": tensor}, [("weight", NewValues(indices, values))], whole)
    expected.load_weights([("weight", tensor.view(-1).index_copy(0, indices, values).view(6, 6))])
    assert torch.equal(model.place, expected.place)
    overwrite(model, {"weight": tensor}, [("weight", NewValues(None, tensor.view(-1)))], whole)
    assert torch.equal(model.place, before)


def test_a_place_of_another_form_is_refused_before_anything_is_written():
    model = Model(lambda place, tensor: place[:2].copy_(tensor))
    with pytest.raises(ValueError, match=r"cannot be given weight in place .*shape \(2, 6\), not \(6, 6\)"):
        check_loader(model, {"weight": torch.ones(6, 6)})
    assert not model.place.any()
    assert torch.zeros(2).copy_(torch.ones(2)).all()


def test_a_loader_that_changes_its_mind_is_an_error():
    model = Model(LOADERS["whole"])
    assert not check_loader(model, {"weight": torch.ones(6, 6)})
    model.loader = lambda place, tensor: place.copy_(tensor + 1)
    with pytest.raises(ValueError, match="something else than it did before"):
        overwrite(model, {"weight": torch.ones(6, 6)}, [("weight", NewValues(torch.tensor([0]), torch.ones(1)))])


def test_a_tensor_that_the_model_lacks_is_named():
    with pytest.raises(ValueError, match="Model of vLLM cannot be given value in place"):
        check_loader(Model(LOADERS["whole"]), {"value": torch.ones(3)})


def test_what_the_loader_leaves_out_is_warned_of_where_all_layers_are_there(recwarn):
    tensors = {"weight": torch.ones(6, 6), "rotary.inv_freq": torch.ones(2)}
    check_loader(Model(LOADERS["whole"]), tensors, all_layers=False)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"vLLM loads no rotary\.inv_freq"):
        check_loader(Model(LOADERS["whole"]), tensors)


def test_large_updates_are_written_in_batches(monkeypatch):
    monkeypatch.setattr("dpp_lightning.serving.vllm.in_place._BYTES", 8)
    taken = []

    def new():
        for k in range(3):
            taken.append(k)
            yield "weight", NewValues(torch.tensor([k, k + 6]), torch.tensor([1.0, 1.0]))

    model = Model(LOADERS["whole"])
    seen = []
    model.loader = lambda place, tensor: [seen.append(list(taken)), place.copy_(tensor)]
    overwrite(model, {"weight": torch.zeros(6, 6)}, new())
    assert seen == [[0], [0, 1], [0, 1, 2]]
    assert model.place[:2, :3].all()
