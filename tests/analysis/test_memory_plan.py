"""The memory plan adds up, scales as shares do, and is what AdamR really holds and what the callback really moves."""

import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import distcases
import distjobs
import pytest
import strategycases
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpp_lightning import prune
from dpp_lightning.analysis.memory_plan import (
    GATHERS,
    GIB,
    LOOKS,
    MODELS,
    READS,
    ModelShape,
    fewest_devices,
    plan_memory,
    shape_of,
    table,
)
from dpp_lightning.optim import AdamR

PAGE = Path(__file__).parents[2] / "configs" / "README.md"
SHARED = ("weights", "gradients", "moments", "theta0")
ONE_LOOK = 1  # where each tensor's entries are ranked for themselves
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
    sizes = dict.fromkeys((*SHARED, "scalars", "parameters", "tensors"), 0)
    for p in net.parameters():
        state = optimizer.state[p]
        assert state.keys() == {"exp_avg", "exp_avg_sq", "pretrained", *SCALARS}
        sizes["weights"] += local_bytes(p)
        sizes["gradients"] += local_bytes(p.grad)
        sizes["moments"] += local_bytes(state["exp_avg"]) + local_bytes(state["exp_avg_sq"])
        sizes["theta0"] += local_bytes(state["pretrained"])
        sizes["scalars"] += sum(local_bytes(state[name]) for name in SCALARS)
        sizes["parameters"] += p.numel()
        sizes["tensors"] += 1
    return sizes


def agree(sizes, plan):
    assert {name: sizes[name] for name in SHARED} == {name: getattr(plan, name) for name in SHARED}
    assert sizes["scalars"] == 8 * sizes["tensors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_device_holds_what_is_planned(dtype):
    sizes = held(getattr(torch, dtype))
    plan = plan_memory(sizes["parameters"], 1, weights=dtype)
    agree(sizes, plan)
    assert plan.total == sum(sizes[name] for name in SHARED)


def test_two_ranks_of_fsdp2_hold_what_is_planned():
    for sizes in distjobs.run(held, 2, torch.float32, True).values():
        agree(sizes, plan_memory(sizes["parameters"], 2))


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


def test_what_the_callback_moves_is_the_part_that_a_device_lacks():
    plan = plan_memory(1000, 4, theta0="bfloat16", pruning_rate=0.9)
    assert plan.callback_once == GATHERS * 750 * 4
    assert plan.callback_look == 750 * 4
    assert plan.callback_kept == READS * 2 * 75 * 4  # what is kept, there and back round the ring
    assert plan.callback_ranked == LOOKS * plan.callback_look + plan.callback_kept
    narrow = plan_memory(1000, 4, weights="bfloat16", pruning_rate=0.9)
    assert (narrow.callback_once, narrow.callback_look) == (plan.callback_once / 2, plan.callback_look)
    assert narrow.callback_kept == plan.callback_kept / 2
    assert plan_memory(100, 71, pruning_rate=0.29).callback_kept == READS * 2 * 70 * 4  # 71 kept, in exact decimals
    assert plan_memory(1001, 101, pruning_rate=0.9).callback_kept == READS * 2 * 100 * 4  # 101 = n - floor(p n)
    alone = plan_memory(1000, 1)
    assert (alone.callback_once, alone.callback_look, alone.callback_kept, alone.callback_ranked) == (0, 0, 0, 0)


class Traffic(TorchDispatchMode):
    """Bytes that this rank receives in DTensor's gathers, by dtype, and for kept entries, as a ring would send them."""

    def __init__(self):
        super().__init__()
        self.gathered, self.kept = Counter(), 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it calls comes here again
        name, world = func._schema.name, dist.get_world_size() if dist.is_initialized() else 1
        if name == "_c10d_functional::all_gather_into_tensor":
            self.gathered[args[0].dtype] += (world - 1) * local_bytes(args[0])
        elif name == "c10d::allreduce_" and args[0][0].dtype == torch.uint8:
            self.kept += 2 * (world - 1) / world * local_bytes(args[0][0])
        return func(*args, **(kwargs or {}))


def even_net():
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))


def pruning_traffic(make, dtype, method, settings, least=None):
    """What one drawn and once applied delta of two nets in shards moves; all in their dtype but the looks' float32."""
    torch.manual_seed(0)
    nets = [distcases.share(make().to(dtype), "fsdp2")[0] for _ in range(2)]
    with torch.no_grad():
        for p in nets[1].parameters():
            p.mul_(1.25)
        if least is not None:
            for net, value in zip(nets, (0.0, least), strict=True):
                net[0].weight.to_local()[0, 0] = value
    with Traffic() as traffic:
        delta = prune(*nets, method, 0.9, **settings)
        with delta.applied(nets[0], force=True):
            pass
    return dict(traffic.gathered), traffic.kept, delta.num_kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "settings", "looks", "reads"),
    [
        ("dare", {}, 0, READS),
        ("magnitude", {}, ONE_LOOK, READS),
        ("magnitude", {"budget": "model"}, LOOKS, READS),
        ("importance", {}, LOOKS, READS - 1),
        ("importance", {"budget": "tensor"}, LOOKS, READS - 1),
    ],
)
def test_two_ranks_receive_for_a_pruned_model_what_is_planned(method, settings, looks, reads, dtype):
    plan = plan_memory(114, 2, weights=dtype, pruning_rate=0.9)
    torch_dtype = getattr(torch, dtype)
    expected = Counter({torch_dtype: plan.callback_once // GATHERS})  # the delta's own; the others are the run's
    expected += Counter({torch.float32: looks * plan.callback_look})
    for gathered, kept, count in distjobs.run(pruning_traffic, 2, even_net, torch_dtype, method, settings).values():
        assert gathered == expected
        assert kept == reads * count * torch_dtype.itemsize
        assert method != "magnitude" or kept == plan.callback_kept


@pytest.mark.parametrize(("least", "looks"), [(2.0**-133, LOOKS), (2.0**-134, LOOKS + 1)])
def test_importance_looks_once_more_where_a_delta_is_next_to_nothing(least, looks):
    plan = plan_memory(114, 2)
    for gathered, _, _ in distjobs.run(pruning_traffic, 2, even_net, torch.float32, "importance", {}, least).values():
        assert gathered == {torch.float32: plan.callback_once // GATHERS + looks * plan.callback_look}


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_shards_cost_less_than_a_row_of_each_tensor_for_each_other_rank(world):
    net = distcases.make_net()
    plan = plan_memory(sum(p.numel() for p in net.parameters()), world, pruning_rate=0.9)
    rows = sum(p[0].numel() for p in net.parameters())
    for gathered, kept, count in distjobs.run(
        pruning_traffic, world, distcases.make_net, torch.float32, "magnitude", {}
    ).values():
        more = gathered[torch.float32] - plan.callback_once // GATHERS - ONE_LOOK * plan.callback_look
        assert abs(more) < (1 + ONE_LOOK) * 4 * (world - 1) * rows
        assert kept == pytest.approx(READS * 4 * count * 2 * (world - 1) / world)


def fitting_traffic(folder, carry):
    """What a fit with the callback moves, with the entries of the model and of its carried bias."""
    module = strategycases.Shared()
    module.net[5] = nn.Linear(64, 4)
    delta = strategycases.prune(folder, method=["dare", "darex-q", "magnitude"], calibration_samples=8, carry=carry)
    trainer = strategycases.make_trainer("fsdp2", [delta], enable_checkpointing=False, max_epochs=1)
    with Traffic() as traffic:
        trainer.fit(module, datamodule=strategycases.Data())
    rows = [row for row in delta.results if row.pruning_rate is not None]
    kept = [(row.num_kept, row.forwards) for row in rows]
    return dict(traffic.gathered), traffic.kept, kept, sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("carried", [0, 4])
def test_a_fit_with_the_callback_moves_what_is_planned(tmp_path, carried):
    ranks = distjobs.run(fitting_traffic, 2, str(tmp_path), ("*5.bias",) if carried else (), lightning=True)
    for gathered, traffic, kept, entries in ranks.values():
        plan = plan_memory(entries, 2)
        expected = plan.callback_once + ONE_LOOK * plan.callback_look
        expected += (len(kept) - (GATHERS - 1) - ONE_LOOK) * carried // 2 * 4  # whole for each model, else not
        assert gathered == {torch.float32: expected}
        assert traffic == sum(4 * count * (READS + tried) for count, tried in kept)
        assert [tried > 0 for _, tried in kept] == [False, True, False]


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
    assert float(cells[8]) == pytest.approx(plan.callback_once / GIB, rel=0.005)
    moved = [float(cell) for cell in cells[9].split(" / ")]
    assert moved == pytest.approx([plan.callback_kept / GIB, plan.callback_ranked / GIB], rel=0.005)
    assert table({"x": ModelShape(GIB / 4, 1)}, [1]).splitlines()[-1] == (
        "| x | 1 | 1.00 | 1.00 | 2.00 | 1.00 / 0.50 | 0 | **5.00** / 4.50 | 0 | 0 / 0 |"
    )


def test_the_page_of_the_recipes_shows_this_table():
    assert table() in PAGE.read_text(encoding="utf-8")


def test_a_model_s_shape_from_its_tensors():
    entries = {"embed.weight": 50, "layers.0.a": 10, "layers.0.b": 5, "layers.1.a": 20, "head.weight": 7}
    assert shape_of(entries) == ModelShape(92, 2, 57, 20)
    assert shape_of({"net.0.weight": 8, "net.0.bias": 2}) == ModelShape(10, 1)
    assert shape_of({f"encoder.layer.{i}.w": 4 for i in range(3)}) == ModelShape(12, 3, 0, 4)


@pytest.mark.parametrize("theta0", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_one_device_fewer_than_the_fewest_is_too_few(shape, theta0):
    def total(devices):
        settings = {"blocks": shape.blocks, "outside": shape.outside, "unit": shape.unit, "theta0": theta0}
        return plan_memory(shape.parameters, devices, **settings).total

    least = fewest_devices(shape, 24, theta0=theta0)
    assert total(least) <= 24 * GIB
    assert least == 1 or total(least - 1) > 24 * GIB
    assert fewest_devices(shape, 24, theta0=theta0, most=least - 1) is None
    assert fewest_devices(shape, 1e-3, theta0=theta0) is None


def test_it_needs_no_torch():
    code = "import sys, dpp_lightning.analysis.memory_plan as m; m.table(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
