"""The digits: splits, labels, order and refusals."""

import pytest
import torch
from sklearn.datasets import load_digits

from dpp_lightning.tasks.vision.digits import DigitsDataModule

SPLITS = ("train", "val", "calibration", "test")


def digits(**settings):
    data = DigitsDataModule(**settings)
    data.setup()
    return data


@pytest.mark.parametrize("classes", [None, [5, 6, 7, 8, 9], [9, 3]])
def test_splits_are_disjoint_complete_and_stratified(classes):
    data, truth = digits(classes=classes), torch.from_numpy(load_digits().target)
    chosen = torch.cat([data.splits[split].positions for split in SPLITS])
    kept = list(range(10)) if classes is None else classes
    assert sorted(chosen.tolist()) == torch.isin(truth, torch.tensor(kept)).nonzero().flatten().tolist()
    for digit in kept:
        total = int((truth == digit).sum())
        for split, fraction in zip(SPLITS, (0.6, 0.2, 0.1, 0.1), strict=True):
            assert abs(int((truth[data.splits[split].positions] == digit).sum()) - fraction * total) <= 1.5


def test_labels_are_indices_in_classes_and_images_are_those_of_the_file():
    data, bundled = digits(classes=[9, 3]), load_digits()
    train = data.splits["train"]
    assert [[9, 3][label] for label in train.labels.tolist()] == bundled.target[train.positions.numpy()].tolist()
    image, label = train[4]
    assert image.shape == (1, 8, 8)
    assert label.dtype == torch.long
    original = torch.from_numpy(bundled.images[train.positions[4]]).float()
    assert torch.allclose((image[0] * 0.3761 + 0.3055) * 16, original, atol=1e-4)
    pixels = torch.cat([digits().splits[split].images for split in SPLITS])
    assert pixels.mean().abs() < 1e-3
    assert abs(pixels.std() - 1) < 1e-3


def test_an_image_keeps_its_split_whatever_the_other_classes():
    some, everything = digits(classes=[0, 1, 2, 3, 4]), digits()
    reseeded = digits(split_seed=1)
    for split in SPLITS:
        positions = set(everything.splits[split].positions.tolist())
        assert set(some.splits[split].positions.tolist()) <= positions
        assert set(reseeded.splits[split].positions.tolist()) != positions


def test_calibration_comes_in_a_fixed_order_of_mixed_classes():
    data = digits(classes=[5, 6, 7, 8, 9], eval_batch_size=20)
    first, again = (torch.cat([y for _, y in data.calibration_dataloader()]) for _ in range(2))
    assert torch.equal(first, again)
    assert set(first[:20].tolist()) == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match="calibration_fraction"):
        digits(calibration_fraction=0.0).calibration_dataloader()


def test_predictions_are_described_as_digits():
    data = digits(classes=[9, 3])
    index = data.splits["test"].labels.tolist().index(1)
    assert data.describe_prediction(index, torch.tensor(0)) == {"label": 3, "prediction": 9}
    assert data.describe_prediction(index, 4) == {"label": 3, "prediction": "output 4"}


@pytest.mark.parametrize("settings", [{"classes": [1]}, {"classes": [1, 1]}, {"classes": [0, 10]}, {"classes": []}])
def test_bad_classes_are_refused(settings):
    with pytest.raises(ValueError, match="at least two different digits from 0 to 9"):
        DigitsDataModule(**settings)


@pytest.mark.parametrize(
    "settings", [{"val_fraction": -0.1}, {"val_fraction": 0.8}, {"test_fraction": 1.0}, {"val_fraction": float("nan")}]
)
def test_bad_fractions_are_refused(settings):
    with pytest.raises(ValueError, match="expected fractions of at least 0, together below 1"):
        DigitsDataModule(**settings)


def test_fractions_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ValueError, match="leave no image of digit"):
        digits(val_fraction=0.9, calibration_fraction=0.05, test_fraction=0.0499)
