"""AdamR with θ0 in bfloat16: the same run where that holds the base exactly, a bounded difference where it does not."""

import copy
import itertools

import distcases
import distjobs
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_adamr import SHAPES, assert_same, both_paths, random_parameters, saved_and_loaded, set_gradients, table, train
from tiny import Foreign, train_loader, trainer, val_loader
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.optim import AdamR, adamr
from dpp_lightning.optim.adamr_step import PIECE

ROUNDING = 2.0**-8  # bfloat16 has eight significant bits: the most that rounding to it moves a value, relative to it
NARROW = {"pretrained_dtype": "bfloat16"}


def held(optimizer):
    return [state["pretrained"] for state in optimizer.state.values() if "pretrained" in state]


def dtypes(optimizer):
    return {tensor.dtype for tensor in held(optimizer)}


def rounded(parameters):
    """The parameters themselves, at values that bfloat16 holds exactly."""
    for p in parameters:
        p.data = p.data.bfloat16().to(p.dtype)
    return parameters


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@table
def test_a_base_that_bfloat16_holds_gives_the_same_run_bit_for_bit(norm, amsgrad, foreach, dtype, device):
    shapes = [*SHAPES, (1100, 1001)] if dtype == torch.float32 else SHAPES
    wide, narrow = (rounded(random_parameters(dtype=dtype, shapes=shapes, device=device)) for _ in range(2))
    settings = {"lr": 1e-2, "delta_decay": 0.1, "norm": norm, "amsgrad": amsgrad, "foreach": foreach}
    first, second = AdamR(wide, **settings), AdamR(narrow, **settings, **NARROW)
    base = [p.detach().clone() for p in wide]
    assert_same(train(second, narrow, 6), train(first, wide, 6))
    assert dtypes(first) == {dtype}
    assert dtypes(second) == {torch.bfloat16}
    assert_same([t.to(dtype) for t in held(second)], base)


def pulls_of(monkeypatch):
    """A list that every step's lr · delta_decay / √v̄ is added to."""
    seen = []
    real = adamr.update
    monkeypatch.setattr(adamr, "update", lambda batch, pull: seen.append(pull) or real(batch, pull))
    return seen


@both_paths
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_any_other_base_is_missed_by_its_rounding_times_the_pull_so_far(monkeypatch, norm, foreach):
    wide, narrow = (random_parameters(dtype=torch.float64) for _ in range(2))
    base = [p.detach().clone() for p in wide]
    settings = {"lr": 1e-3, "delta_decay": 3.0, "norm": norm, "foreach": foreach}
    pulls = pulls_of(monkeypatch)
    train(AdamR(wide, **settings), wide, 30)
    train(AdamR(narrow, **settings, **NARROW), narrow, 30)
    assert pulls[:30] == pulls[30:]
    drawn = 1 - torch.tensor([1 - pull for pull in pulls[:30]], dtype=torch.float64).prod()
    assert 0.1 < drawn < 0.99
    for a, b, theta0 in zip(wide, narrow, base, strict=True):
        apart = (b - a).detach()
        if norm == "l2":
            assert_same([apart], [drawn * (theta0.bfloat16().double() - theta0)], atol=1e-13)
            assert (apart.abs() <= drawn * ROUNDING * theta0.abs() + 1e-13).all()
        else:
            assert (apart.abs() <= ROUNDING * theta0.abs() + 2 * max(pulls) + 1e-13).all()


def test_it_is_a_groups_own_setting_and_narrow_parameters_keep_their_dtype():
    a, b, c, d = (random_parameters(shapes=[(3,)], dtype=t)[0] for t in [torch.float32] * 2 + [torch.float16] * 2)
    head = nn.Parameter(torch.ones(2))
    groups = [{"params": [a, c], **NARROW}, {"params": [b, d]}, {"params": [head], "new": True, **NARROW}]
    optimizer = AdamR(groups)
    train(optimizer, [a, b, c, d, head], 2)
    theta0_dtypes = {name: optimizer.state[p]["pretrained"].dtype for name, p in zip("abcd", (a, b, c, d), strict=True)}
    assert theta0_dtypes == {"a": torch.bfloat16, "b": torch.float32, "c": torch.float16, "d": torch.float16}
    assert "pretrained" not in optimizer.state[head]
    optimizer = AdamR([a], **NARROW)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert dtypes(optimizer) == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"pretrained_dtype must be one of \(None, 'bfloat16'\), got torch.bfloat16"):
        AdamR([a], pretrained_dtype=torch.bfloat16)


def test_a_model_cast_later_keeps_the_narrow_copy():
    (p,) = random_parameters(shapes=[(4, 3)])
    optimizer = AdamR([p], **NARROW)
    p.data = p.data.double()
    train(optimizer, [p], 2)
    assert {k: v.dtype for k, v in optimizer.state[p].items() if k != "step"} == {
        **dict.fromkeys(("exp_avg", "exp_avg_sq", "exp_avg_sq_sum"), torch.float64),
        "pretrained": torch.bfloat16,
    }


class Casts(TorchDispatchMode):
    """Entries of the largest tensor that was cast to float32."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_no_more_than_a_piece_is_wide_at_a_time(norm):
    parameters = random_parameters(shapes=[(3000, 1000), (100, 100), (100, 100)])
    optimizer = AdamR(parameters, norm=norm, **NARROW)
    set_gradients(parameters, 0)
    with Casts() as casts:
        optimizer.step()
    assert casts.largest <= PIECE
    assert (casts.largest > 100 * 100) == (norm == "l2")  # a sign needs no cast
    assert held(optimizer)[0].untyped_storage().nbytes() == 2 * 3_000_000


@pytest.mark.parametrize(("saved", "current"), itertools.product([None, "bfloat16"], repeat=2))
@both_paths
def test_after_loading_it_is_narrow_if_either_side_says_so(saved, current, foreach):
    whole = random_parameters()
    base = [p.detach().clone() for p in whole]
    first = AdamR(whole, pretrained_dtype=saved, foreach=foreach)
    train(first, whole, 3)
    resumed = [nn.Parameter(p.detach().clone()) for p in whole]
    second = AdamR(resumed, pretrained_dtype=current, foreach=foreach)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    expected = torch.bfloat16 if saved or current else torch.float32
    assert dtypes(second) == {expected}
    assert_same(held(second), [t.to(expected) for t in base])  # rounded once, never from the weights of step 3
    assert second.param_groups[0]["pretrained_dtype"] == (saved or current)
    if saved == (saved or current):
        assert_same(train(second, resumed, 3, start=3), train(first, whole, 3, start=3))
    else:
        train(second, resumed, 3, start=3)
    assert dtypes(second) == {expected}


@pytest.mark.parametrize("current", [None, "bfloat16"])
def test_a_state_dict_from_before_the_setting_loads(current):
    parameters = random_parameters()
    older = copy.deepcopy(AdamR(parameters).state_dict())
    del older["param_groups"][0]["pretrained_dtype"]
    optimizer = AdamR(parameters, pretrained_dtype=current)
    optimizer.load_state_dict(older)
    train(optimizer, parameters, 1)
    assert dtypes(optimizer) == {torch.bfloat16 if current else torch.float32}


# ------------------------------------------------------------------ in shards


def train_on_a_rounded_base(kind, settings):
    made = distcases.make_net

    def make_net():
        net = made()
        rounded(net.parameters())
        return net

    distcases.make_net = make_net
    try:
        return distcases.train(kind, settings)
    finally:
        distcases.make_net = made


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_in_shards_too_the_run_is_the_same_bit_for_bit(norm):
    settings = {"delta_decay": 0.05 if norm == "l2" else 0.001, "norm": norm}
    wide = distjobs.run(train_on_a_rounded_base, 2, "fsdp2", settings)
    narrow = distjobs.run(train_on_a_rounded_base, 2, "fsdp2", {**settings, **NARROW})
    for rank, result in narrow.items():
        assert all(torch.equal(result["weights"][n], t) for n, t in wide[rank]["weights"].items())
        assert all(torch.equal(result["pretrained"][n].float(), t) for n, t in wide[rank]["pretrained"].items())
        assert {t.dtype for t in result["pretrained"].values()} == {torch.bfloat16}


def resume_in_shards(saved, current, full):
    """Dtypes and placements of θ0 after a distributed checkpoint's way of loading; whether it is the first base's."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(full_state_dict=full)
    net, _, _ = distcases.share(distcases.make_net(), "fsdp2")
    base = {name: distcases.whole(p) for name, p in net.named_parameters()}
    first = AdamR(net.parameters(), pretrained_dtype=saved)
    nn.functional.mse_loss(net(torch.ones(2, 8)), torch.zeros(2, 3)).backward()
    first.step()
    weights, state = get_state_dict(net, first, options=options)
    other, _, _ = distcases.share(distcases.make_net(), "fsdp2")
    second = AdamR(other.parameters(), pretrained_dtype=current)
    set_state_dict(other, second, model_state_dict=weights, optim_state_dict=copy.deepcopy(state), options=options)
    theta0 = {name: second.state[p]["pretrained"] for name, p in other.named_parameters()}
    assert all(theta0[name].placements == p.placements for name, p in other.named_parameters())
    dtype = torch.bfloat16 if saved or current else torch.float32
    return all(torch.equal(distcases.whole(t), base[name].to(dtype)) for name, t in theta0.items())


@pytest.mark.parametrize(
    ("saved", "current", "full"), [("bfloat16", None, True), (None, "bfloat16", True), ("bfloat16", "bfloat16", False)]
)
def test_checkpoints_of_shards_load_as_whole_ones_do(saved, current, full):
    assert distjobs.run(resume_in_shards, 2, saved, current, full) == {0: True, 1: True}


# ------------------------------------------------------------------ the callback


def narrow_adamr(parameters, lr):
    return AdamR(parameters, lr=lr, delta_decay=0.01, **NARROW)


def module_at(base=None):
    torch.manual_seed(0)
    module = Foreign(optimizer=narrow_adamr)
    if base is not None:
        module.load_state_dict(base)
    return module


def pruning(folder, **settings):
    return DeltaPruneCallback("dare", 0.5, monitor="acc", output_dir=str(folder), **settings)


def test_the_callback_keeps_the_exact_base_and_a_resumed_fit_too(tmp_path):
    module = module_at()
    base = {name: t.detach().clone() for name, t in module.state_dict().items()}
    first, second, keep = pruning(tmp_path / "a"), pruning(tmp_path / "b"), ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(first, keep, max_epochs=1, enable_checkpointing=True)
    run.fit(module, train_loader(), val_loader())
    assert dtypes(run.optimizers[0]) == {torch.bfloat16}
    trainer(second, max_epochs=2).fit(module_at(base), train_loader(), val_loader(), ckpt_path=keep.last_model_path)
    for folder in ("a", "b"):
        fresh = module_at(base)
        delta = SparseDelta.from_pretrained(tmp_path / folder / "dare-p0.5-seed0")
        delta.apply_(fresh)  # refuses a base that is off by a bit
        assert not all(torch.equal(fresh.state_dict()[n], t) for n, t in base.items())
    torch.manual_seed(1)
    elsewhere = Foreign(optimizer=narrow_adamr)
    with pytest.raises(ValueError, match=r"not the one the checkpoint's training started from.*pretrained="):
        trainer(pruning(tmp_path / "c"), max_epochs=2).fit(
            elsewhere, train_loader(), val_loader(), ckpt_path=keep.last_model_path
        )


class Unseen(pl.Callback):
    """Makes a callback's base one that is restored before it is seen, as in a module with configure_model."""

    def on_fit_start(self, trainer, pl_module):
        next(c for c in trainer.callbacks if isinstance(c, DeltaPruneCallback))._base = BaseWeights({}, explicit=False)


def test_a_rounded_base_that_nothing_else_knows_is_refused_and_pretrained_cures_it(tmp_path):
    from safetensors.torch import save_file

    module = module_at()
    save_file({name: t.detach().clone() for name, t in module.state_dict().items()}, tmp_path / "base.safetensors")
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer(keep, max_epochs=1, enable_checkpointing=True).fit(module, train_loader(), val_loader())
    data = {"train_dataloaders": train_loader(), "val_dataloaders": val_loader(), "ckpt_path": keep.last_model_path}
    with pytest.raises(ValueError, match=r"values of \d+ tensors are unknown.*Pass pretrained="):
        trainer(Unseen(), pruning(tmp_path / "a"), max_epochs=2).fit(module_at(), **data)
    cured = pruning(tmp_path / "b", pretrained=str(tmp_path / "base.safetensors"))
    trainer(cured, max_epochs=2).fit(module_at(), **data)
    assert cured.results[1].score > 0.7


@pytest.mark.parametrize("holds", [True, False])
def test_a_verified_copy_gives_the_fingerprint_if_and_only_if_it_is_exact(holds):
    module = module_at()
    if holds:
        rounded(module.parameters())
    original = BaseWeights.from_module(module).fingerprint(module, set(), ())
    optimizer = narrow_adamr(module.parameters(), 1e-2)
    parameters = [p for p in module.parameters() if p.requires_grad]
    train(optimizer, parameters, 2)
    unknown, known = BaseWeights({}, explicit=False), BaseWeights.from_module(module)
    unknown.adopt_optimizer_copies(module, [optimizer])
    assert not unknown.tensors
    tensors = dict(known.tensors)
    known.adopt_optimizer_copies(module, [optimizer], verified=True)
    assert all(known.tensors[name] is tensor for name, tensor in tensors.items())
    unknown.adopt_optimizer_copies(module, [optimizer], verified=True)
    unknown.convert_like(module)
    assert {t.dtype for t in unknown.tensors.values()} == {torch.float32}
    assert (unknown.fingerprint(module, set(), ()) == original) == holds
