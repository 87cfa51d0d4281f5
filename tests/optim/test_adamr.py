"""AdamR against the released code's numbers, torch's Adam, and the slow twin of the published algorithm."""

import copy
import io
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from adamr_twin import AdamRTwin
from safetensors.torch import load_file
from torch import nn

from dpp_lightning.optim import AdamR
from dpp_lightning.optim.adamr_step import pieces, squared_norms

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHAPES = [(5, 7), (7,), (3, 4, 2), (), (0, 3)]
table = pytest.mark.parametrize(
    ("norm", "amsgrad", "foreach"), list(itertools.product(["l2", "l1"], [False, True], [None, False]))
)
both_paths = pytest.mark.parametrize("foreach", [True, False])


def random_parameters(seed=0, dtype=torch.float32, shapes=SHAPES, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def set_gradients(parameters, seed, scale=0.1):
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in parameters:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def train(optimizer, parameters, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(parameters, step)
        optimizer.step()
    return parameters


def assert_same(actual, expected, rtol=0.0, atol=0.0):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(("case", "options"), [("l2", {}), ("l1", {"norm": "l1"}), ("l2_amsgrad", {"amsgrad": True})])
def test_equals_the_released_codes_numbers(case, options, foreach):
    tensors = load_file(FIXTURES / "adamr_reference.safetensors")
    settings = json.loads((FIXTURES / "adamr_reference.json").read_text())
    parameters = [nn.Parameter(tensors[f"adamr.{case}.pretrained.{i}"].clone()) for i in range(3)]
    options |= {name: settings[name] for name in ("lr", "betas", "eps")}
    optimizer = AdamR(parameters, delta_decay=settings["weight_decay"], foreach=foreach, **options)
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(tensors[f"adamr.{case}.init.{i}"])
    for step in range(1, settings["steps"] + 1):
        for i, p in enumerate(parameters):
            p.grad = tensors[f"adamr.{case}.grad.{step}.{i}"]
        optimizer.step()
        if step in settings["checked"]:
            assert_same(parameters, [tensors[f"adamr.{case}.param.{step}.{i}"] for i in range(3)], rtol=1e-5)


@table
def test_equals_the_twin_over_groups_gaps_and_late_parameters(norm, amsgrad, foreach):
    ours, theirs = (random_parameters(dtype=torch.float64) for _ in range(2))

    def groups(p):
        first = {"params": p[:2], "lr": 3e-3, "betas": (0.8, 0.95), "delta_decay": 0.5, "maximize": True}
        return [{**first, "norm": norm, "amsgrad": amsgrad}, {"params": p[2:3], "new": True}, {"params": p[3:]}]

    optimizer, twin = AdamR(groups(ours), foreach=foreach), AdamRTwin(groups(theirs))
    for parameters, target in ((ours, optimizer), (theirs, twin)):
        parameters += random_parameters(seed=5, dtype=torch.float64, shapes=[(4, 4), (6,)])
        parameters[-2].requires_grad_(False)
        late = {"params": parameters[-2:], "delta_decay": 0.3, "norm": norm, "amsgrad": amsgrad, "eps": 1e-6}
        (target.add_param_group if target is optimizer else target.add)(late)
    for step in range(12):
        for parameters, target in ((ours, optimizer), (theirs, twin)):
            set_gradients(parameters, step)
            if step < 4:  # the last but one is frozen
                parameters[-2].grad = None
            else:
                parameters[-2].requires_grad_(True)
            if step % 3 == 1:
                parameters[1].grad = None
            target.step()
    assert_same(ours, theirs, rtol=1e-11, atol=1e-12)
    assert [int(optimizer.state[p]["step"]) for p in ours] == [12, 8, 12, 12, 12, 8, 12]


@pytest.mark.parametrize("maximize", [False, True])
@table
def test_without_decay_it_is_torchs_adam(norm, amsgrad, foreach, maximize):
    ours, theirs = random_parameters(), random_parameters()
    adamr = AdamR(ours, lr=1e-2, delta_decay=0.0, norm=norm, amsgrad=amsgrad, foreach=foreach, maximize=maximize)
    path = {"foreach": False} if foreach is False else {"fused": True}
    adam = torch.optim.Adam(theirs, lr=1e-2, amsgrad=amsgrad, maximize=maximize, **path)
    assert_same(train(adamr, ours, 10), train(adam, theirs, 10))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_layouts_the_fused_kernel_does_not_take(norm):
    def layouts():
        a, b = random_parameters(shapes=[(4, 3, 5, 5), (6, 8)])
        return [nn.Parameter(a.detach().to(memory_format=torch.channels_last)), nn.Parameter(b.detach().t()), a]

    ours, single, theirs = layouts(), layouts(), layouts()
    train(AdamR(ours, norm=norm, foreach=True), ours, 5)
    train(AdamR(single, norm=norm, foreach=False), single, 5)
    train(AdamRTwin([{"params": theirs, "norm": norm}]), theirs, 5)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_same(single, theirs, rtol=1e-5, atol=1e-6)


@both_paths
def test_large_tensors_sum_exactly_enough(foreach):
    ours, theirs = (random_parameters(shapes=[(1100, 1000), (150, 10, 100)]) for _ in range(2))
    set_gradients(ours, 0)
    exact = torch.tensor([p.grad.double().square().sum() for p in ours])
    torch.testing.assert_close(squared_norms([p.grad for p in ours]).double(), exact, rtol=2e-6, atol=0.0)
    for norm in ("l2", "l1"):
        train(AdamR(ours, lr=1e-3, norm=norm, amsgrad=norm == "l1", foreach=foreach), ours, 1)
        train(AdamRTwin([{"params": theirs, "lr": 1e-3, "norm": norm, "amsgrad": norm == "l1"}]), theirs, 1)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(pieces(ours[0])) > 1
    assert torch.equal(torch.cat(pieces(ours[0])), ours[0])


@table
def test_sum_of_second_moments_follows_v(norm, amsgrad, foreach):
    parameters = random_parameters()
    optimizer = AdamR(parameters, norm=norm, amsgrad=amsgrad, foreach=foreach)
    train(optimizer, parameters, 30)
    for p in parameters:
        state = optimizer.state[p]
        expected = {"step", "exp_avg", "exp_avg_sq", "pretrained", "max_exp_avg_sq" if amsgrad else "exp_avg_sq_sum"}
        assert set(state) == expected
        if not amsgrad:
            torch.testing.assert_close(state["exp_avg_sq_sum"], state["exp_avg_sq"].sum(), rtol=1e-5, atol=0.0)


@both_paths
def test_new_parameters_feel_no_decay_and_keep_no_pretrained_values(foreach):
    (head,) = random_parameters(shapes=[(4, 4)])
    body, *_ = random_parameters(seed=1)
    optimizer = AdamR([{"params": [body]}, {"params": [head], "new": True}], lr=1e-2, delta_decay=10.0, foreach=foreach)
    (lone,) = random_parameters(shapes=[(4, 4)])
    train(optimizer, [head, body], 5)
    train(torch.optim.Adam([lone], lr=1e-2, foreach=foreach), [lone], 5)
    assert_same([head], [lone], rtol=1e-6, atol=1e-7)
    assert "pretrained" not in optimizer.state[head]


@both_paths
def test_only_parameters_with_a_gradient_are_touched(foreach):
    parameters = random_parameters()
    parameters[1].requires_grad_(False)
    optimizer = AdamR(parameters, foreach=foreach)
    assert parameters[1] not in optimizer.state
    before = [p.detach().clone() for p in parameters]
    optimizer.step()  # no gradient at all
    assert_same(parameters, before)
    set_gradients(parameters[:1], 0)
    optimizer.step()
    assert_same(parameters[1:], before[1:])
    assert [int(optimizer.state[p]["step"]) for p in (parameters[0], parameters[2])] == [1, 0]
    assert parameters[0].grad is not None
    optimizer.zero_grad()
    assert parameters[0].grad is None


@table
def test_zero_gradients_leave_finite_weights(norm, amsgrad, foreach):
    parameters = random_parameters()
    optimizer = AdamR(parameters, lr=0.1, delta_decay=0.5, norm=norm, amsgrad=amsgrad, foreach=foreach)
    base = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(1.0)
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(parameters, [b + 0.95 for b in base], atol=1e-6)  # v̄ = 0 divides by 1: 0.05 of the way, in both norms


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@table
def test_resumed_run_equals_the_uninterrupted_one(norm, amsgrad, foreach, dtype):
    def make(parameters):
        return AdamR(parameters, lr=1e-2, norm=norm, amsgrad=amsgrad, foreach=foreach)

    whole = random_parameters(dtype=dtype)
    base = [p.detach().clone() for p in whole]
    first = make(whole)
    train(first, whole, 6)
    resumed = [nn.Parameter(p.detach().clone()) for p in whole]
    second = make(resumed)  # made on the weights of step 6, as a framework does when it restores a checkpoint
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    assert_same([second.state[p]["pretrained"] for p in resumed], base)
    for p, q in zip(whole, resumed, strict=True):
        assert all(torch.equal(first.state[p][k], second.state[q][k]) for k in first.state[p])
        assert all(first.state[p][k].dtype == second.state[q][k].dtype for k in first.state[p])
    assert_same(train(second, resumed, 5, start=6), train(first, whole, 5, start=6))
    assert_same([second.state[p]["pretrained"] for p in resumed], base)


def test_state_dict_holds_plain_values_and_no_tensor_in_its_groups():
    parameters = random_parameters()
    optimizer = AdamR(parameters)
    saved = optimizer.state_dict()
    assert len(saved["state"]) == len(parameters)
    assert all(isinstance(v, torch.Tensor) for state in saved["state"].values() for v in state.values())
    plain = (int, float, bool, str, tuple, list, type(None))
    assert all(isinstance(v, plain) for group in saved["param_groups"] for v in group.values())


def test_loading_another_optimizers_state_is_refused_before_anything_changes():
    parameters = random_parameters()
    adam = torch.optim.Adam(parameters)
    train(adam, parameters, 1)
    optimizer = AdamR(parameters)
    before = optimizer.state[parameters[0]]["exp_avg"]
    with pytest.raises(ValueError, match=r"no 'pretrained' values for parameter 0.*make a new AdamR"):
        optimizer.load_state_dict(adam.state_dict())
    assert optimizer.state[parameters[0]]["exp_avg"] is before
    assert "delta_decay" in optimizer.param_groups[0]


def test_pickle_and_deepcopy_go_on_as_the_original():
    parameters = random_parameters()
    optimizer = AdamR(parameters)
    train(optimizer, parameters, 3)
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = clone.param_groups[0]["params"]
        assert_same(
            [clone.state[p]["pretrained"] for p in theirs], [optimizer.state[p]["pretrained"] for p in parameters]
        )
        expected = copy.deepcopy(optimizer)
        assert_same(train(clone, theirs, 2), train(expected, expected.param_groups[0]["params"], 2))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@both_paths
def test_grad_scaler_gives_the_unscaled_result_and_skips_overflow(foreach, device):
    def run(scaler):
        torch.manual_seed(0)
        model = nn.Linear(6, 3).to(device)
        optimizer = AdamR(model.parameters(), lr=1e-2, foreach=foreach)
        x = torch.randn(8, 6, device=device)
        for step in range(4):
            optimizer.zero_grad()
            loss = model(x * (float("inf") if scaler and step == 2 else 1.0)).square().mean()
            if scaler is None:
                loss.backward()
                if step != 2:
                    optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert all(int(optimizer.state[p]["step"]) == 3 for p in model.parameters())
        return list(model.parameters())

    assert_same(run(torch.amp.GradScaler(device, init_scale=1024.0)), run(None), rtol=1e-5, atol=1e-7)


@both_paths
def test_closure_runs_with_gradients_and_returns_its_loss(foreach):
    (p,) = random_parameters(shapes=[(4,)])
    optimizer = AdamR([p], lr=0.1, foreach=foreach)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert not p.grad.requires_grad


@both_paths
def test_sparse_and_complex_gradients_are_refused_before_anything_changes(foreach):
    parameters = random_parameters()
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamR([*parameters, embedding.weight], foreach=foreach)
    set_gradients(parameters, 0)
    embedding(torch.tensor([1])).sum().backward()
    before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match=r"dense real gradients, got one of torch.float32 and torch.sparse_coo"):
        optimizer.step()
    assert_same(parameters, before[1])
    for i, state in before[0].items():
        assert all(torch.equal(state[k], v) for k, v in optimizer.state_dict()["state"][i].items())
    with pytest.raises(ValueError, match=r"torch.complex64.*view_as_real"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="on meta: load the model's weights first"):
        AdamR([nn.Parameter(torch.zeros(2, device="meta"))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be a number in \[0, inf\), got -1.0"),
        ({"lr": torch.tensor([1e-3, 1e-3])}, "lr must be a number"),
        ({"lr": torch.tensor(-1.0)}, r"lr must be a number in \[0, inf\), got -1.0"),
        ({"capturable": True, "compiled": True}, "capturable=True and compiled=True exclude each other"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a number in \[0, 1.0\), got 1.0"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\]"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"eps": -1e-8}, "eps"),
        ({"delta_decay": -0.1}, "delta_decay"),
        ({"delta_decay": float("inf")}, "delta_decay"),
        ({"norm": "L2"}, r"norm must be one of \('l2', 'l1'\), got 'L2'"),
        ({"amsgrad": "yes"}, "amsgrad must be one of"),
        ({"pretrained_dtype": "float16"}, r"pretrained_dtype must be one of \(None, 'bfloat16'\), got 'float16'"),
        ({"new": "head"}, "new must be one of"),
    ],
)
def test_settings_outside_their_range_are_refused(options, message):
    parameters = random_parameters()
    with pytest.raises(ValueError, match=message):
        AdamR([{"params": parameters, **options}])
    if "new" not in options:
        with pytest.raises(ValueError, match=message):
            AdamR(parameters, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_paths
def test_half_precision_parameters_follow_the_twin(foreach, dtype):
    ours = random_parameters(dtype=dtype)
    theirs = [nn.Parameter(p.detach().double()) for p in ours]
    settings = {"lr": 1e-2, "delta_decay": 0.1, "eps": 1e-4}  # a smaller eps is 0 in float16, in torch's Adam as well
    optimizer, twin = AdamR(ours, foreach=foreach, **settings), AdamRTwin([{"params": theirs, **settings}])
    for step in range(5):
        set_gradients(ours, step, scale=10.0)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.double()
        optimizer.step()
        twin.step()
    assert_same([p.double() for p in ours], theirs, rtol=2e-2, atol=3e-2)
    for state in optimizer.state.values():
        assert {k: v.dtype for k, v in state.items()} == {
            "step": torch.float32,
            "exp_avg_sq_sum": torch.float32,
            **dict.fromkeys(("exp_avg", "exp_avg_sq", "pretrained"), dtype),
        }


def test_model_cast_after_the_optimizer_was_made():
    (p,) = random_parameters(shapes=[(4, 3)])
    optimizer = AdamR([p])
    p.data = p.data.double()
    train(optimizer, [p], 2)
    assert {k: v.dtype for k, v in optimizer.state[p].items() if k != "step"} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "exp_avg_sq_sum", "pretrained"), torch.float64
    )


def test_stronger_decay_keeps_the_weights_nearer_to_the_pretrained_ones():
    def distance(delta_decay):
        parameters = random_parameters(shapes=[(50, 20)])
        base = parameters[0].detach().clone()
        train(AdamR(parameters, lr=1e-3, delta_decay=delta_decay), parameters, 50)
        return (parameters[0] - base).abs().mean().item()

    distances = [distance(d) for d in (0.0, 0.3, 3.0)]
    assert distances[0] > distances[1] > distances[2]


def test_named_parameters_and_schedulers():
    model = nn.Linear(3, 2)
    optimizer = AdamR(model.named_parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(optimizer, list(model.parameters()), 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] != 1e-2
    train(optimizer, list(model.parameters()), 1)
    assert saved_and_loaded(optimizer.state_dict())["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_distributed_checkpoint_form_of_the_state_keeps_everything():
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def make():
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return model, AdamR(model.parameters())

    (model, optimizer), (other, restored) = make(), make()
    train(optimizer, list(model.parameters()), 3)
    weights, state = get_state_dict(model, optimizer)
    assert all(int(v) == 3 for k, v in state["state"]["0.weight"].items() if k == "step")
    set_state_dict(other, restored, model_state_dict=weights, optim_state_dict=copy.deepcopy(state))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(v, restored.state[q][k]) for k, v in optimizer.state[p].items())
    assert_same(train(restored, list(other.parameters()), 2), train(optimizer, list(model.parameters()), 2))
