"""A delta that is a head alone, as linear probing gives it, is still of one base."""

import copy

import format_reader
import pytest
import tiny
import torch
from safetensors.torch import save_file

from dpp_lightning import SparseDelta, merge, prune
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.delta.checkpoint_base import check_checkpoint
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.serving.base_checkpoint import BaseCheckpoint
from dpp_lightning.serving.delta_pool import DeltaPool


def base_model():
    return tiny.pair()[0]


def probed(seed: int = 0):
    """The base with another head."""
    model = base_model()
    with torch.no_grad():
        model.head.weight.add_(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)))
    return model


def probe(seed: int = 0) -> SparseDelta:
    return prune(base_model(), probed(seed), "dare", 0.9, carry=["head.*"])


def other_base():
    """The base after all of it was trained, by little."""
    return tiny.pair(scale=1e-3)[1]


def save(model, folder):
    folder.mkdir()
    save_file({name: tensor.detach() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def use_in_pool(model):
    pool = DeltaPool(model)
    pool.add("probe", probe())
    with pool.use("probe"):
        return copy.deepcopy(model.head.weight)


IN_MEMORY = {
    "apply_": lambda model: probe().apply_(model),
    "state dict": lambda model: probe().apply_(model.state_dict()),
    "to_absolute": lambda model: list(probe().to_absolute(model)),
    "pool": use_in_pool,
    "merge": lambda model: merge(model, [probe(), probe(1)], "task-arithmetic", tasks=["a", "b"]),
}
OF_FILES = {
    "apply": lambda base, delta, folder: apply_checkpoint(base, delta, folder / "dense"),
    "eval": lambda base, delta, folder: check_checkpoint(base, DeltaReader.open(delta)),
    "serve": lambda base, delta, folder: BaseCheckpoint(base).changes(delta),
}


@pytest.mark.parametrize("way", IN_MEMORY)
def test_another_model_in_memory_is_refused(way):
    IN_MEMORY[way](base_model())
    with pytest.raises(ValueError, match=r"not the base of this delta|not pruned against the base"):
        IN_MEMORY[way](other_base())


@pytest.mark.parametrize("way", OF_FILES)
def test_another_model_in_files_is_refused(way, tmp_path):
    delta = probe().save_pretrained(tmp_path / "delta")
    base, other = save(base_model(), tmp_path / "base"), save(other_base(), tmp_path / "other")
    with pytest.raises(ValueError, match="not the base of this delta"):
        OF_FILES[way](other, delta, tmp_path)
    OF_FILES[way](base, delta, tmp_path)


def test_force_and_another_dtype_of_the_base_are_taken():
    delta, other = probe(), other_base()
    delta.apply_(other, force=True)
    assert torch.equal(other.head.weight, probed().head.weight)
    half = tiny.pair(dtype=torch.bfloat16)[0]
    tuned = copy.deepcopy(half)
    with torch.no_grad():
        tuned.head.weight.mul_(2)
    prune(half, tuned, "dare", 0.9, carry=["head.*"]).apply_(half.float())


def test_the_rest_may_be_reverted_and_buffers_differ(tmp_path):
    base, tuned = base_model(), probed()
    with torch.no_grad():
        tuned.embed.weight.add_(1)
    delta = prune(base, tuned, "dare", 0.9, include=["norm.*"], outside="revert", carry=["head.*"])
    assert "embed.weight" in delta.info.reverted
    base.register_buffer("steps", torch.zeros(2))
    delta.apply_(base)
    with pytest.raises(ValueError, match="not the base of this delta"):
        prune(base_model(), tuned, "dare", 0.9, include=["norm.*"], outside="revert", carry=["head.*"]).apply_(
            other_base()
        )


def test_streamed_and_in_memory_have_one_check_and_it_is_the_page_s(tmp_path):
    base, tuned = save(base_model(), tmp_path / "base"), save(probed(), tmp_path / "tuned")
    prune_checkpoint(base, tuned, tmp_path / "delta", PruningSpec("dare", 0.9), scope=Scope(carry=("head.*",)))
    info = SparseDelta.from_pretrained(tmp_path / "delta").info
    assert (info.base_first, probe().info.base_first) == ("", "")
    held = {n: t.detach().numpy() for n, t in base_model().state_dict().items() if not n.startswith("head")}
    assert info.base_check == probe().info.base_check == format_reader.sampled_check(held)


def test_no_kept_entry_of_many_is_checked_likewise():
    """At an extreme rate of a small model nothing may be kept at all."""
    base, tuned = tiny.pair()
    delta = prune(base, tuned, "dare", 0.9999999, carry=["head.*"])
    assert delta.num_kept == 0
    delta.apply_(base)
    with pytest.raises(ValueError, match="not the base of this delta"):
        prune(*tiny.pair(), "dare", 0.9999999, carry=["head.*"]).apply_(other_base())
