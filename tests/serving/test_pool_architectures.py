"""Models of transformers in a pool: what apply_ writes, and in a mixed batch the right rows or a refusal by name."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES

from dpp_lightning import DeltaPool, prune
from dpp_lightning.serving.sparse_products import CannotMixError

MIXED = (  # those of the default run, all of which can be mixed
    "bert",
    "gpt2",
    "qwen2, tied",
    "gemma2",  # a norm that casts its weight
    "vit",  # a convolution, a class token and positions that are added
)


def finetuned_pool(architecture):
    """The base's model, two deltas of it, and a pool of both."""
    model = architecture.build()
    deltas = {}
    for seed, rate in (("a", 0.5), ("b", 0.9)):
        finetuned = copy.deepcopy(model)
        torch.manual_seed(ord(seed))
        architecture.finetune(finetuned)
        deltas[seed] = prune(model, finetuned, "dare", rate, seed=ord(seed))
    pool = DeltaPool(model)
    for name, delta in deltas.items():
        pool.add(name, delta)
    return model, deltas, pool


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


def output(model, inputs):
    """The first output of floats that has a row for each example; of pairs, where all rows meet, the embeddings."""
    with torch.no_grad():
        outputs = model(**{name: tensor.clone() for name, tensor in inputs.items()})
    if "image_embeds" in outputs:
        return outputs["image_embeds"]
    floats = (v for v in outputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
    return next(v for v in floats if v.shape[:1] == (2,))


def mixes(architecture):
    """Whether rows can have their own deltas; where they can, they are those of one delta at a time."""
    model, deltas, pool = finetuned_pool(architecture)
    before = state(model)
    alone = {}
    for name, delta in deltas.items():
        expected = copy.deepcopy(model)
        delta.apply_(expected)
        with pool.use(name):
            assert same(state(model), state(expected))
            alone[name] = output(model, architecture.inputs())
        assert same(state(model), before)
    alone[None] = output(model, architecture.inputs())
    for rows in (["a", "b"], ["b", None]):
        try:
            with pool.mixed(rows):
                together = output(model, architecture.inputs())
        except CannotMixError as refused:
            together = str(refused)
        assert same(state(model), before)
        if isinstance(together, str):
            return together
        for row, name in enumerate(rows):
            scale = float(alone[name][row].abs().max()) + 1e-6
            tolerance = 2e-4 if together.dtype == torch.float32 else 5e-2  # a change is not rounded when mixed
            assert float((together[row] - alone[name][row]).abs().max()) < tolerance * scale, (rows, row)
        assert float((together[0] - alone[None][0]).abs().max()) > 1e-3 * float(alone[None][0].abs().max())
    return True


@pytest.mark.parametrize("name", MIXED)
def test_rows_of_a_mixed_batch_are_those_of_one_delta_at_a_time(name):
    assert mixes(ARCHITECTURES[name]) is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mixed_batch_is_right_or_refused_by_name(name):
    refusal = mixes(ARCHITECTURES[name])
    if refusal is not True:
        assert refusal.endswith("use one delta at a time (pool.use, or pool.map, which groups the requests)")
        assert "\n" not in refusal
