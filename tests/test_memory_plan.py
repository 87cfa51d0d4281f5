"""The memory plan adds up, scales as shares do, and is what AdamR really holds, whole and in shards."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import distjobs
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dpp_lightning.memory_plan import GIB, MODELS, ModelShape, plan_memory, table
from dpp_lightning.optim import AdamR

README = Path(__file__).parent.parent / "README.md"
SHARED = ("weights", "gradients", "moments", "theta0")
SCALARS = {"step", "exp_avg_sq_sum"}


def local_bytes(x):
    x = x.to_local() if isinstance(x, DTensor) else x
    return x.numel() * x.element_size()


def held(dtype=torch.float32, shards=False):
    """Bytes that this rank holds after a step, by kind; dimensions are even, so that shares on two ranks are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).to(dtype)
    if shards:
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = AdamR(net.parameters())
    net(torch.ones(2, 6, dtype=dtype)).square().sum().backward()
    optimizer.step()
    found = dict.fromkeys((*SHARED, "scalars", "parameters", "tensors"), 0)
    for p in net.parameters():
        state = optimizer.state[p]
        assert state.keys() == {"exp_avg", "exp_avg_sq", "pretrained", *SCALARS}
        found["weights"] += local_bytes(p)
        found["gradients"] += local_bytes(p.grad)
        found["moments"] += local_bytes(state["exp_avg"]) + local_bytes(state["exp_avg_sq"])
        found["theta0"] += local_bytes(state["pretrained"])
        found["scalars"] += sum(local_bytes(state[name]) for name in SCALARS)
        found["parameters"] += p.numel()
        found["tensors"] += 1
    return found


def agree(found, plan):
    assert {name: found[name] for name in SHARED} == {name: getattr(plan, name) for name in SHARED}
    assert found["scalars"] == 8 * found["tensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_device_holds_what_is_planned(dtype):
    found = held(getattr(torch, dtype))
    plan = plan_memory(found["parameters"], 1, weights=dtype)
    agree(found, plan)
    assert plan.total == sum(found[name] for name in SHARED)


def test_two_ranks_of_fsdp2_hold_what_is_planned():
    for found in distjobs.run(held, 2, torch.float32, True).values():
        agree(found, plan_memory(found["parameters"], 2))


@pytest.mark.parametrize("devices", [1, 2, 8, 64])
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_sums_and_shares(shape, devices):
    def plan(devices, **settings):
        return plan_memory(shape.parameters, devices, blocks=shape.blocks, outside=shape.outside, **settings)

    one, many, narrow = plan(1), plan(devices), plan(devices, theta0="bfloat16")
    assert all(type(getattr(many, field.name)) is int for field in fields(many))
    assert many.total == sum(getattr(many, name) for name in (*SHARED, "gathered"))
    assert one.total == 5 * 4 * shape.parameters
    for name in SHARED:
        assert getattr(many, name) == getattr(one, name) / devices
    assert 2 * narrow.theta0 == many.theta0
    assert many.total - narrow.total == narrow.theta0
    assert (narrow.weights, narrow.moments, narrow.gathered) == (many.weights, many.moments, many.gathered)
    assert plan(devices, weights="bfloat16").total * 2 == many.total
    assert plan(devices, weights="bfloat16") == plan(devices, weights="bfloat16", theta0="bfloat16", compute="bfloat16")


def test_what_is_whole_does_not_shrink_with_devices():
    settings = {"blocks": 10, "outside": 100.0}
    assert plan_memory(1100, 1, **settings).gathered == 0
    expected = 4 * (3 * 100 + 2 * 100) + 4 * 100
    assert {plan_memory(1100, devices, **settings).gathered for devices in (2, 8, 1000)} == {expected}
    assert plan_memory(1100, 8, **settings, compute="bfloat16").gathered == 2 * (3 * 100 + 2 * 100) + 4 * 100
    assert plan_memory(1100, 8, **settings, unit=200).gathered == 4 * (3 * 200 + 2 * 100) + 4 * 200
    assert plan_memory(1000, 8).gathered == 4 * 2 * 1000  # one unit: the whole model and its whole gradient
    assert plan_memory(1000, 8, blocks=2).gathered == 4 * 3 * 500


def test_uneven_shares_are_those_of_the_fullest_device():
    plan = plan_memory(10, 4)
    assert (plan.weights, plan.moments) == (3 * 4, 3 * 8)


def test_the_callback_moves_what_rank_0_lacks_and_what_is_kept():
    plan = plan_memory(1000, 4, theta0="bfloat16", pruning_rate=0.9)
    assert plan.callback_host == 1000 * (4 + 2)
    assert plan.callback_once == 750 * (4 + 2)
    assert plan.callback_each == 100 * (4 + 4)
    assert plan_memory(1000, 4, weights="bfloat16", pruning_rate=0.9).callback_each == 100 * (4 + 2)
    assert plan_memory(100, 4, pruning_rate=0.29).callback_each == 71 * 8  # in exact decimals
    assert plan_memory(1001, 4, pruning_rate=0.9).callback_each == 101 * 8  # n - floor(p n)
    alone = plan_memory(1000, 1)
    assert (alone.callback_once, alone.callback_each, alone.callback_host) == (0, 0, 8000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameters": 0}, "parameters"),
        ({"parameters": float("inf")}, "parameters"),
        ({"parameters": float("nan")}, "parameters"),
        ({"devices": 0}, "devices"),
        ({"devices": 1.5}, "devices"),
        ({"devices": True}, "devices"),
        ({"blocks": 0}, "blocks"),
        ({"outside": 100}, "outside"),
        ({"outside": -1}, "outside"),
        ({"unit": 0}, "unit"),
        ({"unit": 51, "outside": 50}, "unit"),
        ({"pruning_rate": 1}, "pruning_rate"),
        ({"pruning_rate": -0.1}, "pruning_rate"),
        ({"weights": "int8"}, "float32, bfloat16"),
        ({"theta0": "float64"}, "float32, bfloat16"),
        ({"compute": ""}, "float32, bfloat16"),
    ],
)
def test_what_is_out_of_range_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(**{"parameters": 100, "devices": 2, **settings})


def test_the_table_is_the_plans_in_gib():
    head, rule, *rows = table().splitlines()
    assert len(rows) == 4 * 3
    assert {line.count("|") for line in (head, rule, *rows)} == {11}
    shape = MODELS["7 B"]
    plan = plan_memory(shape.parameters, 8, blocks=shape.blocks, outside=shape.outside)
    cells = [cell.strip() for cell in rows[4].strip("|").split("|")]
    assert cells[:2] == ["7 B", "8"]
    assert float(cells[2]) == pytest.approx(plan.weights / GIB, rel=0.005)
    assert float(cells[7].split("**")[1]) == pytest.approx(plan.total / GIB, rel=0.005)
    assert table({"x": ModelShape(GIB / 4, 1)}, [1]).splitlines()[-1] == (
        "| x | 1 | 1.00 | 1.00 | 2.00 | 1.00 / 0.50 | 0 | **5.00** / 4.50 | 0 | 0 |"
    )


def test_the_readme_shows_this_table():
    assert table() in README.read_text(encoding="utf-8")


def test_it_needs_no_torch():
    code = "import sys, dpp_lightning.memory_plan as m; m.table(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
