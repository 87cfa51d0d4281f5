"""OWL and DP: the published vectors, budgets at every rate, ties by rank; WANDA against a dense twin."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpp_lightning.methods import tensor_pair
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.layerwise_rates import budgeted_counts, dp, dp_counts, owl
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.methods.wanda import wanda
from dpp_lightning.tensors.blocks import block_of, is_linear_map

REFERENCE = load_file(Path(__file__).parents[1] / "fixtures" / "dppa_reference.safetensors")
RATES = [0.0, 0.1, 0.5, 0.9, 0.95, 0.99, 0.995, 0.999]


def pair_of(name, delta, inputs=None):
    placed = {"block": block_of(name), "linear": is_linear_map(name, delta.shape)}
    return TensorPair.of(name, torch.zeros_like(delta), delta, inputs, **placed)


def of_reference(rate):
    prefix = f"dp.{rate}.delta."
    return [pair_of(n.removeprefix(prefix), d) for n, d in REFERENCE.items() if n.startswith(prefix)]


def model(seed=0):
    """Five blocks whose deltas have tails of different weight, and tensors outside the blocks."""
    g = torch.Generator().manual_seed(seed)
    made = [pair_of("embed.weight", torch.randn(50, 16, generator=g))]
    for b in range(5):
        for name, shape in (("q", (16, 16)), ("up", (40, 16)), ("down", (16, 40))):
            delta = torch.randn(shape, generator=g) * torch.randn(shape, generator=g).abs() ** b
            made.append(pair_of(f"layers.{b}.{name}.weight", delta))
        made.append(pair_of(f"layers.{b}.q.bias", torch.randn(16, generator=g)))
    return made


def inputs(features, axis, seed=0, embedding=False):
    g = torch.Generator().manual_seed(seed)
    squares = torch.rand(features, generator=g, dtype=torch.float64) * 10
    return InputStatistics(squares / 2, squares, 10, axis, embedding)


@pytest.mark.parametrize("rate", ["0.8", "0.9"])
def test_dp_as_released_keeps_what_the_published_code_keeps(rate):
    tensors = of_reference(rate)
    for pair, count, kept in zip(
        tensors,
        dp_counts(tensors, [float(rate)], "released")[0],
        dp(tensors, float(rate), 0, variant="released"),
        strict=True,
    ):
        published = REFERENCE[f"dp.{rate}.pruned.{pair.name}"].flatten().nonzero().flatten()
        assert abs(count - len(published)) <= 1
        different = set(kept.positions.tolist()) ^ set(published.tolist())
        assert len(different) <= 1


@pytest.mark.parametrize("select", [owl, dp])
@pytest.mark.parametrize("rate", RATES)
def test_the_budget_is_kept_at_every_rate(select, rate):
    tensors = model()
    n = sum(p.numel for p in tensors)
    assert sum(len(kept.positions) for kept in select(tensors, rate, 0)) == n - int(Fraction(str(rate)) * n)


def test_the_released_formula_exceeds_its_budget_at_extreme_rates():
    """Why it is not the default (methods.md: about 20 times at 0.999)."""
    tensors = [p for p in model() if "bias" not in p.name and "embed" not in p.name]
    n = sum(p.numel for p in tensors)
    assert sum(dp_counts(tensors, [0.999], "released")[0]) > 5 * 0.001 * n


@pytest.mark.parametrize("select", [owl, dp])
def test_heavier_tails_keep_more(select):
    tensors = model()
    share = {p.name: len(k.positions) / p.numel for p, k in zip(tensors, select(tensors, 0.5, 0), strict=True)}
    # the share of entries above 5 times the mean grows with b
    assert share["layers.4.up.weight"] > share["layers.0.up.weight"] + 0.05


@pytest.mark.parametrize("select", [owl, dp])
def test_no_fluctuation_where_all_blocks_are_alike(select):
    tensors = [pair_of(f"layers.{b}.q.weight", torch.arange(40.0).view(5, 8)) for b in range(3)]
    assert [len(k.positions) for k in select(tensors, 0.9, 0)] == [4, 4, 4]


def test_owl_follows_its_formula():
    tensors = [p for p in model() if p.name.startswith("layers")]
    linears = {b: [p for p in tensors if f"layers.{b}." in p.name and p.name.endswith("weight")] for b in range(5)}
    delta = {b: torch.cat([p.finetuned for p in group]).abs() for b, group in linears.items()}
    d = torch.tensor([float((x > 5 * x.mean()).float().mean()) for x in delta.values()])
    keep = 0.5 + 0.08 * (d - d.mean()) / (d - d.mean()).abs().max()
    sizes = [p.numel for p in tensors]
    wanted = [float(keep[int(p.name.split(".")[1])]) for p in tensors]
    expected = budgeted_counts(wanted, sizes, 0.5)
    assert [len(k.positions) for k in owl(tensors, 0.5, 0)] == expected


def single(*names):
    g = torch.Generator().manual_seed(0)
    return [pair_of(name, torch.randn(30, 20, generator=g) * torch.randn(30, 20, generator=g) ** 2) for name in names]


def test_of_a_single_block_owl_keeps_the_same_share_everywhere_and_says_so():
    tensors = single("layers.0.q.weight", "layers.0.up.weight", "embed.weight")
    with pytest.warns(UserWarning, match=r"a single one \(layers\.0\.\): every tensor keeps the same share"):
        kept = list(owl(tensors, 0.9, 0))
    assert [len(k.positions) for k in kept] == [60, 60, 60]


def test_of_a_single_block_dp_tells_only_linear_maps_apart():
    tensors = single("layers.0.q.weight", "layers.0.up.weight", "embed.weight")
    (counts,) = dp_counts(tensors, [0.9])
    assert counts[0] != counts[1]
    assert sum(counts) == 180


@pytest.mark.parametrize(("select", "method"), [(owl, "owl goes"), (dp, "dp and dppa go")])
def test_tensors_without_blocks_are_refused_in_one_line_with_the_cures(select, method):
    with pytest.raises(ValueError, match=f"^{method} by the linear maps in a model's blocks, and the names") as error:
        list(select(single(*(f"tower.cells.{i}.{n}.weight" for i in range(2) for n in "qkv")), 0.9, 0))
    message = str(error.value)
    assert "tower.cells.0.q.weight, tower.cells.0.k.weight, tower.cells.0.v.weight, ..." in message
    assert "blocks='tower.cells.*' (--blocks)" in message
    assert "take a method that needs none" in message
    assert "\n" not in message


@pytest.mark.parametrize("select", [owl, dp])
def test_blocks_of_convolutions_alone_are_refused(select):
    tensors = [pair_of(f"layer1.{i}.conv.weight", torch.randn(8, 8, 1, 1)) for i in range(2)]
    with pytest.raises(ValueError, match=r"the blocks of this model \(layer1\.0\., layer1\.1\.\) hold none") as error:
        list(select(tensors, 0.9, 0))
    assert "blocks=" not in str(error.value)


@pytest.mark.parametrize("select", [owl, dp])
def test_blocks_with_few_of_the_entries_are_warned_of(select):
    tensors = [*model(), pair_of("encoder.0.weight", torch.randn(500, 500)), pair_of("table", torch.randn(900))]
    with pytest.warns(UserWarning, match=r"which have 3 % of the entries here; the largest") as warned:
        list(select(tensors, 0.9, 0))
    assert "encoder.0.weight, table, embed.weight. " in str(warned[0].message)


@pytest.mark.parametrize("select", [owl, dp])
def test_experts_in_one_tensor_are_a_linear_map_of_their_block(select):
    g = torch.Generator().manual_seed(0)
    deltas = [torch.randn(4, 8, 40, generator=g) * torch.randn(4, 8, 40, generator=g).abs() ** b for b in range(3)]
    heavy = [pair_of(f"layers.{b}.mlp.experts.down_proj", delta) for b, delta in enumerate(deltas)]
    counts = [len(k.positions) for k in select(heavy, 0.5, 0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("settings", [{"fluctuation": -0.1}, {"outlier_factor": 0}])
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match="must be a number"):
        list(owl(model(), 0.9, 0, **settings))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("keep", [[0.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.3, 0.3, 0.3], [0.0, 0.0, 2.0]])
def test_budgeted_counts_are_exact_and_possible(rate, keep):
    sizes = [1, 100, 1000]
    counts = budgeted_counts(keep, sizes, rate)
    assert sum(counts) == sum(sizes) - int(Fraction(str(rate)) * sum(sizes))
    assert all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("block", [7, 1 << 19])
def test_wanda_ranks_by_delta_times_norm(monkeypatch, axis, block):
    monkeypatch.setattr(tensor_pair, "BLOCK", block)
    delta = torch.randn(12, 9, generator=torch.Generator().manual_seed(3))
    x = inputs(delta.shape[axis], axis)
    scale = x.norm.float() if axis == 1 else x.norm.float().unsqueeze(1)
    best = (delta.abs() * scale).flatten().topk(11).indices.sort().values
    (kept,) = wanda([pair_of("layers.0.q.weight", delta, x)], 0.9, 0)
    assert torch.equal(kept.positions, best)


@pytest.mark.parametrize("axis", [0, 1])
def test_wanda_per_row_keeps_as_many_in_every_output(axis):
    delta = torch.randn(12, 10, generator=torch.Generator().manual_seed(3))
    x = inputs(delta.shape[axis], axis)
    (kept,) = wanda([pair_of("layers.0.q.weight", delta, x)], 0.8, 0, per="row")
    mask = torch.zeros(120, dtype=torch.bool)
    mask[kept.positions] = True
    outputs = mask.view(12, 10) if axis == 1 else mask.view(12, 10).T
    features = delta.shape[axis]
    assert set(outputs.sum(1).tolist()) == {features - int(Fraction("0.8") * features)}
    assert torch.equal(kept.positions, kept.positions.sort().values)


def test_wanda_takes_equal_scores_by_their_order_and_magnitude_without_inputs():
    x = InputStatistics(torch.ones(4), torch.ones(4, dtype=torch.float64), 1, 1)
    (kept,) = wanda([pair_of("layers.0.q.weight", torch.ones(3, 4), x)], 0.5, 0)
    assert kept.positions.tolist() == list(range(6))
    (row,) = wanda([pair_of("layers.0.q.weight", torch.ones(3, 4), x)], 0.5, 0, per="row")
    assert row.positions.tolist() == [0, 1, 4, 5, 8, 9]
    (plain,) = wanda([pair_of("norm.bias", torch.tensor([1.0, -3.0, 2.0, 0.5]))], 0.5, 0)
    assert plain.positions.tolist() == [1, 2]
