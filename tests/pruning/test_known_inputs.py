"""Linear maps whose inputs are not known: named in a warning, refused where they are most; experts in one tensor."""

import pytest
import torch

from dpp_lightning import prune
from dpp_lightning.calibration import Calibration
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.selections import importance
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.methods.wanda import wanda


def inputs(*shape: int, axis: int = 1) -> InputStatistics:
    squares = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    return InputStatistics(squares / 2, squares, 10, axis)


def weights(seed: int, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = {f"layers.{i}.{name}.weight": (6, 8) for i in range(4) for name in ("up", "down")}
    return {
        name: scale * torch.randn(shape, generator=generator)
        for name, shape in {**names, "embed.weight": (9, 8)}.items()
    }


BASE = weights(0, 1.0)
TUNED = {name: tensor + weights(1, 0.1)[name] for name, tensor in BASE.items()}
ALL = {name: inputs(8) for name in BASE if name.startswith("layers.")}


@pytest.mark.parametrize(
    ("method", "settings", "treated"),
    [
        ("wanda", {}, "ranked by their delta alone"),
        ("importance", {"score": "activation"}, "ranked by their delta alone"),
        ("darex-q-layer", {}, "have the mean q of the others"),
    ],
)
def test_a_few_unknown_inputs_are_warned_of_and_most_are_refused(method, settings, treated):
    few = {name: s for name, s in ALL.items() if name != "layers.1.down.weight"}
    with pytest.warns(UserWarning, match=rf"{method} .* 1 of 8 linear maps \(12.5 %.*{treated}: layers.1.down.weight$"):
        prune(BASE, TUNED, method, 0.5, calibration=Calibration(lambda _: 0.0, few), **settings)
    most = {name: s for name, s in ALL.items() if name.startswith("layers.0.")}
    with pytest.raises(
        ValueError, match=r"6 of 8 linear maps \(75 %.*layers.1.*\.safetensors.*(magnitude|darex-q)"
    ) as error:
        prune(BASE, TUNED, method, 0.5, calibration=Calibration(lambda _: 0.0, most), **settings)
    assert "\n" not in str(error.value)


def test_a_projector_outside_the_blocks_is_warned_of_and_does_not_decide():
    base = {**BASE, "projector.weight": torch.zeros(40, 8), "norm.weight": torch.zeros(8)}
    tuned = {**TUNED, "projector.weight": torch.ones(40, 8), "norm.weight": torch.ones(8)}
    with pytest.warns(UserWarning, match=r"1 of 9 linear maps .*: projector.weight$"):
        prune(base, tuned, "wanda", 0.5, calibration=Calibration(inputs=ALL))


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_all_are_known_or_nobody_asks():
    prune(BASE, TUNED, "wanda", 0.5, calibration=Calibration(inputs=ALL))
    prune(BASE, TUNED, "magnitude", 0.5, calibration=Calibration(inputs={}))
    prune(BASE, TUNED, "wanda", 0.5, include=["layers.0.*"], calibration=Calibration(inputs={
        name: s for name, s in ALL.items() if name.startswith("layers.0.")
    }))  # fmt: skip


def test_convolutions_have_no_inputs_of_a_linear_map():
    shapes = {"stem.weight": (8, 3, 3, 3), "stages.0.conv.weight": (8, 8, 3, 3), "head.weight": (2, 8)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tuned = {name: torch.randn(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"2 of 3 weights.* are convolutions or the like: .*Take method 'magnitude'"):
        prune(base, tuned, "wanda", 0.5, calibration=Calibration(inputs={"head.weight": inputs(8)}))


@pytest.mark.parametrize("other", [inputs(6), inputs(2, 8), inputs(8, axis=0)])
def test_inputs_of_another_model_are_refused(other):
    wrong = {**ALL, "layers.0.up.weight": other}
    with pytest.raises(
        ValueError, match=r"layers.0.up.weight: inputs of \(.*do not belong to a weight of shape \(6, 8\)"
    ):
        prune(BASE, TUNED, "wanda", 0.5, calibration=Calibration(inputs=wrong))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("per", ["layer", "row"])
def test_each_expert_is_scored_by_its_own_inputs(axis, per):
    shape = (3, 5, 4)
    delta, known = torch.randn(shape, generator=torch.Generator().manual_seed(3)), inputs(3, shape[axis], axis=axis)
    pair = TensorPair.of("layers.0.experts.up_proj", torch.zeros(shape), delta, known)
    kept = next(wanda([pair], 0.5, 0, per=per)).positions
    scale = (known.squares / known.tokens).sqrt().float()
    scores = delta.abs() * (scale.unsqueeze(1) if axis == 2 else scale.unsqueeze(2))
    if per == "layer":
        expected = scores.flatten().topk(30).indices.sort().values
    else:
        count = shape[axis] - shape[axis] // 2
        best = scores.topk(count, dim=axis).indices
        expected = torch.zeros(shape).scatter(axis, best, 1.0).flatten().nonzero().squeeze(1)
    assert torch.equal(kept, expected)


def test_an_expert_that_no_token_is_sent_to_keeps_a_chance():
    known = InputStatistics(torch.zeros(2, 4).double(), torch.tensor([[1.0] * 4, [0.0] * 4]).double(), 8, 2)
    pair = TensorPair.of("layers.0.experts.up_proj", torch.zeros(2, 50, 4), torch.ones(2, 50, 4), known)
    kept = next(importance([pair], 0.5, 0, score="activation")).positions
    assert 0 < int((kept >= 200).sum()) < int((kept < 200).sum())
