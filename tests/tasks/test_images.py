"""Images as data: columns, classes, splits, transforms, augmentation, refusals; on small PNGs made here."""

import datasets
import lightning.pytorch as pl
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn

from dpp_lightning.tasks.vision import image_rows
from dpp_lightning.tasks.vision.image_transforms import data_config, make_transform
from dpp_lightning.tasks.vision.images import ImageDataModule
from dpp_lightning.tasks.vision.module import VisionModule

VIT = "vit_tiny_patch16_224"
TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NAMES = ("ant", "bee", "cow", "dog")
AUGMENT = ["shift", "flip"]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed, size=(8, 8), mode="RGB"):
    """Noise; size is (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).convert(mode)


def write(folder, image="img", label="label", feature=None, size=(8, 8), mode="RGB", **splits):
    """A folder of parquet files in the hub's layout; ``splits`` gives the labels of each."""
    features = Features({image: datasets.Image(), label: feature or ClassLabel(names=list(NAMES))})
    for split, labels in splits.items():
        rows = {image: [picture((split == "test", i), size, mode) for i in range(len(labels))], label: list(labels)}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def animals(tmp_path):
    """Sixty training images sorted by class, and twelve to test."""
    labels = [i // 15 for i in range(60)]
    return write(tmp_path / "animals", train=labels, test=[i % 4 for i in range(12)])


def ready(path, stage=None, module=None, **settings):
    data = ImageDataModule(path, **{"image_size": 8, **settings})
    if module is not None:
        data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
        data.trainer.strategy.connect(module)
    data.setup(stage)
    return data


def vit(num_classes=4, **kwargs):
    return VisionModule(VIT, num_classes, model_kwargs={**TINY, **kwargs}, seed=0)


def trainer(folder, **settings):
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **settings})


# ---------------------------------------------------------------- columns, classes, splits


@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "label"), ("img", "fine_label")])
def test_the_usual_columns_are_found(tmp_path, image, label):
    data = ready(write(tmp_path / "data", image, label, train=[0, 1] * 10, test=[2, 3]))
    sample, target = data.splits["test"][0]
    assert (sample.shape, sample.dtype, int(target)) == ((3, 8, 8), torch.float32, 2)
    assert data.class_names == NAMES


def test_columns_may_be_named(tmp_path):
    path = write(tmp_path / "data", "picture", "kind", train=[0, 1] * 10, test=[1, 0])
    assert ready(path, image_column="picture", label_column="kind").splits["test"].labels.tolist() == [1, 0]


def test_a_folder_of_images_is_data_too(tmp_path):
    for split, count in (("train", 10), ("test", 2)):
        for kind in ("bee", "ant"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            for i in range(count):
                picture(i).save(tmp_path / "data" / split / kind / f"{i}.png")
    data = ready(str(tmp_path / "data"))
    assert data.class_names == ("ant", "bee")
    assert data.splits["test"].labels.tolist() == [0, 0, 1, 1]


def test_parts_are_disjoint_and_whole_and_calibration_mixes_the_classes(animals):
    data = ready(animals, val_fraction=0.3, calibration_fraction=0.2)
    splits = [data.splits[name].positions.tolist() for name in ("train", "val", "calibration")]
    assert [len(rows) for rows in splits] == [30, 18, 12]
    assert sorted(row for rows in splits for row in rows) == list(range(60))
    first, again = (torch.cat([y for _, y in data.calibration_dataloader()]) for _ in range(2))
    assert torch.equal(first, again)
    assert len(set(first[:6].tolist())) > 2


def test_an_image_keeps_its_part_whatever_does_not_concern_it(animals):
    fractions = {"val_fraction": 0.3, "calibration_fraction": 0.2}
    plain = ready(animals, **fractions)
    some = ready(animals, classes=["dog", "ant"], **fractions)
    for split in ("train", "val", "calibration", "test"):
        rows, kept = plain.splits[split].positions.tolist(), some.splits[split].positions.tolist()
        assert kept == [row for row, y in zip(rows, plain.splits[split].labels.tolist(), strict=True) if y in (0, 3)]
    fewer = ready(animals, val_fraction=0.3, calibration_fraction=0.0, seed=5, batch_size=3)
    assert torch.equal(fewer.splits["val"].positions, plain.splits["val"].positions)
    less = ready(animals, val_fraction=0.0, calibration_fraction=0.2)
    assert torch.equal(less.splits["calibration"].positions, plain.splits["calibration"].positions)
    reseeded = ready(animals, split_seed=1, **fractions)
    assert not torch.equal(reseeded.splits["val"].positions, plain.splits["val"].positions)


@pytest.mark.parametrize("classes", [["dog", "bee"], [3, 1], ["dog", 1]])
def test_labels_are_places_in_classes_and_predictions_have_names(animals, classes):
    data = ready(animals, classes=classes)
    test = data.splits["test"]
    assert [[3, 1][y] for y in test.labels.tolist()] == [int(row) % 4 for row in test.positions]
    assert data.class_names == ("dog", "bee")
    index = test.labels.tolist().index(0)
    assert data.describe_prediction(index, torch.tensor(1)) == {"label": "dog", "prediction": "bee"}
    assert data.describe_prediction(index, 7) == {"label": "dog", "prediction": "output 7"}


def test_a_stage_reads_no_more_than_it_needs(animals):
    assert set(ready(animals, "fit").splits) == {"train", "val", "calibration"}
    data = ready(animals, "test")
    assert set(data.splits) == {"test", "calibration"}
    data.setup("fit")
    assert set(data.splits) == {"train", "val", "calibration", "test"}


def test_data_without_a_test_split(tmp_path):
    path = write(tmp_path / "data", train=[0, 1] * 10)
    assert ready(path, "fit").val_dataloader()
    data = ready(path, "test", test_split=None)
    assert data.test_dataloader() == []
    assert data.predict_dataloader() == []
    with pytest.raises(ValueError, match=r"has the splits \['train'\], expected \['test'\]"):
        ready(path, "test")


def test_parts_of_no_size(animals):
    data = ready(animals, val_fraction=0.0, calibration_fraction=0.0)
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"calibration_fraction 0\.0 holds out no sample"):
        data.calibration_dataloader()


def test_whole_numbers_are_classes_too(tmp_path):
    path = write(tmp_path / "data", feature=Value("int64"), train=[0, 2] * 10, test=[1])
    assert ready(path, module=vit(3)).class_names == ("0", "1", "2")
    assert ready(path, classes=[2, 0]).splits["train"].labels.unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"'label' holds \['2'\], expected labels from 0 to 1"):
        ready(path, module=vit(2))


# ---------------------------------------------------------------- transforms


def test_images_are_those_of_the_file_normalised_by_the_models_config(animals):
    module = vit()
    data = ready(animals, module=module, image_size=None)
    assert module.data_config["input_size"] == (3, 8, 8)
    image = data.splits["test"][5][0]
    original = torch.from_numpy(np.array(picture((True, 5)))).permute(2, 0, 1) / 255
    assert torch.allclose(image * 0.5 + 0.5, original, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (20, 12), (5, 9)])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 3), ("P", 1)])
def test_any_image_gets_the_models_size_and_channels(tmp_path, size, mode, channels):
    path = write(tmp_path / "data", size=size, mode=mode, train=[0, 1] * 4, test=[0])
    data = ready(path, module=vit(in_chans=channels), image_size=None, augment=["crop", "shift", "flip"])
    assert {tuple(image.shape) for images in data.splits.values() for image, _ in images} == {(channels, 8, 8)}


def test_a_large_image_loses_the_border_that_the_config_says_and_a_small_one_none():
    config = {"input_size": (1, 8, 8), "interpolation": "bilinear", "mean": [0.0], "std": [1.0], "crop_mode": "center"}
    ramp = torch.arange(160, dtype=torch.uint8).expand(1, 160, 160)

    def spread(share, image=ramp, **changes):
        shown = make_transform({**config, "crop_pct": share, **changes})(image)[0, 0]
        return float(shown[-1] - shown[0]) * 255 * 8 / 7

    assert spread(1.0) == pytest.approx(160, rel=0.03)
    assert spread(0.5) == pytest.approx(80, rel=0.03)
    assert spread(0.5, crop_mode="squash") == pytest.approx(160, rel=0.03)
    assert spread(0.5, ramp[:, :4, 0:160:40]) == pytest.approx(spread(1.0, ramp[:, :4, 0:160:40]))


@pytest.mark.parametrize(("name", "channels"), [("resnet10t", 1), ("mobilenetv3_small_050", 3), ("mixer_s32_224", 1)])
def test_the_config_is_that_of_the_model_at_hand(name, channels):
    model = timm.create_model(name, num_classes=5, in_chans=channels).eval()
    config = data_config(model)
    assert config["input_size"] == (channels, *model.pretrained_cfg["input_size"][1:])
    assert len(config["mean"]) == len(config["std"]) == channels
    with torch.no_grad():
        assert model(torch.zeros(1, *config["input_size"])).shape == (1, 5)


# ---------------------------------------------------------------- order and augmentation


def epoch_of(path, epoch, **settings):
    data = ready(path, "fit", **{"augment": AUGMENT, "seed": 0, "batch_size": 7, **settings})
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_augmentation_is_a_function_of_seed_epoch_and_image_alone(animals):
    torch.manual_seed(1)
    images, labels = epoch_of(animals, 1)
    state = torch.get_rng_state()
    with_workers = epoch_of(animals, 1, num_workers=2)[0]
    assert torch.equal(images, with_workers)
    torch.set_rng_state(state)
    assert torch.equal(images, epoch_of(animals, 1, batch_size=20)[0])
    for other_images, other_labels in (epoch_of(animals, 2), epoch_of(animals, 1, seed=1)):
        assert sorted(other_labels.tolist()) == sorted(labels.tolist())
        assert not torch.equal(other_images.sort(0).values, images.sort(0).values)


def test_augmentation_draws_anew_for_every_image_and_leaves_the_generator_alone(tmp_path):
    data = ready(write(tmp_path / "data", train=[0, 1] * 20), "fit", augment=AUGMENT, val_fraction=0.0)
    train = data.splits["train"]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    shown = [train[i][0] for i in range(len(train))]
    assert torch.equal(torch.rand(3), expected)
    plain = ready(str(tmp_path / "data"), "fit", val_fraction=0.0).splits["train"]
    flipped = [torch.equal(a, plain[i][0].flip(-1)) for i, a in enumerate(shown)]
    unmoved = [torch.equal(a, plain[i][0]) for i, a in enumerate(shown)]
    assert 0 < sum(flipped) + sum(unmoved) < len(shown) / 2
    assert all(torch.equal(a, train[i][0]) for i, a in enumerate(shown))


def test_only_training_images_are_augmented(animals):
    plain, augmented = (ready(animals, augment=augment) for augment in ([], AUGMENT))
    for split in ("val", "calibration", "test"):
        pairs = zip(plain.splits[split], augmented.splits[split], strict=True)
        assert all(torch.equal(a, b) for (a, _), (b, _) in pairs)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_with_augmentation_and_mixup_resumed_at_an_epochs_end_is_the_whole_one(animals, tmp_path, workers):
    def run(epochs, checkpoint=None):
        settings = {"drop_rate": 0.2}
        module = VisionModule(VIT, 4, None, {**TINY, **settings}, scheduler="constant", mixup=0.4, seed=0)
        data = ImageDataModule(animals, augment=AUGMENT, batch_size=16, seed=0, num_workers=workers)
        fit = trainer(tmp_path, max_epochs=epochs)
        fit.fit(module, data, ckpt_path=checkpoint)
        fit.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.state_dict()

    run(1)
    whole = run(2)
    torch.manual_seed(99)
    resumed = run(2, tmp_path / "1.ckpt")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("limit", [0, 2**28], ids=["decoded when asked for", "decoded once"])
def test_a_filler_has_its_image_and_a_label_to_ignore(animals, monkeypatch, limit):
    monkeypatch.setattr(image_rows, "IN_MEMORY", limit)
    test = ready(animals).splits["test"]
    assert (test._decoded is None) == (limit == 0)
    (image, label), (again, filler) = test.__getitems__([3, -1 - 8])
    assert torch.equal(image, again)
    assert (int(label), int(filler)) == (3, -100)
    assert torch.equal(image, test[3][0])


def test_images_decoded_when_asked_for_are_the_same(animals, monkeypatch):
    held = epoch_of(animals, 0)
    monkeypatch.setattr(image_rows, "IN_MEMORY", 0)
    for asked, kept in zip(epoch_of(animals, 0, num_workers=1), held, strict=True):
        assert torch.equal(asked, kept)


def test_fit_scores_the_whole_split_and_predicts_in_its_order(animals, tmp_path):
    module, data = vit(), ImageDataModule(animals, eval_batch_size=5)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, data)
    score = run.test(module, data, verbose=False)[0]["test_score"]
    predicted = torch.cat(run.predict(module, data))
    test = data.splits["test"]
    with torch.no_grad():
        logits = module.eval()(torch.stack([image for image, _ in test]))
    assert torch.equal(predicted, logits.argmax(-1))
    assert score == pytest.approx((predicted == test.labels).float().mean().item())
    assert len(predicted) == 12


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "photo"}, r"has the columns \['img', 'label'\], none of them 'photo'.*data\.image_column"),
        ({"label_column": "kind"}, r"none of them 'kind'.*data\.label_column"),
        ({"image_column": "label"}, r"column 'label' holds ClassLabel.*expected images"),
        ({"label_column": "img"}, r"column 'img' holds Image.*expected classes"),
        ({"train_split": "training"}, r"has the splits \['test', 'train'\], expected \['training'\]"),
        ({"classes": ["ant", "cat"]}, r"'cat' is no class .* ant, bee, cow, dog"),
        ({"classes": [0, 4]}, "4 is no class"),
        ({"classes": [0, -1]}, "-1 is no class"),
        ({"classes": ["ant"]}, "at least two different classes"),
        ({"classes": ["ant", 0]}, "at least two different classes"),
        ({"name": "nope"}, "configuration nope"),
        ({"val_fraction": 0.6, "calibration_fraction": 0.399}, "60 training images, too few"),
    ],
)
def test_what_the_data_have_not_is_refused_in_setup(animals, settings, message):
    with pytest.raises(ValueError, match=message):
        ready(animals, "fit", **settings)


@pytest.mark.parametrize(
    ("labels", "feature", "outside"),
    [
        ([0, 1, -1] * 4, ClassLabel(names=list(NAMES)), "-1"),
        ([0, 1, None] * 4, ClassLabel(names=list(NAMES)), "None"),
        ([0, 1, -7] * 4, Value("int32"), "-7"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_out_of_range_are_refused_in_setup(tmp_path, labels, feature, outside, split):
    good = [0, 1, 2, 3] * 4
    path = write(tmp_path / "data", feature=feature, **{"train": good, "test": good, split: labels})
    with pytest.raises(ValueError, match=rf"split {split}: 'label' holds \['{outside}'\], expected labels from 0 to 3"):
        ready(path, module=vit())


def test_labels_that_are_no_classes_are_refused(tmp_path):
    path = write(tmp_path / "data", feature=Value("float32"), train=[0.5] * 4, test=[0.5])
    with pytest.raises(ValueError, match=r"holds Value.*float32.*class_encode_column"):
        ready(path)


@pytest.mark.parametrize("limit", [0, 2**28])
def test_what_is_no_image_is_refused_with_its_row(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(image_rows, "IN_MEMORY", limit)
    rows = {"image": [{"bytes": b"no image", "path": None}] * 3, "label": [0, 1, 1]}
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"row 0, column 'image': no image that can be read"):
        ready(str(tmp_path), "fit", val_fraction=0.0, calibration_fraction=0.0)


def test_a_missing_image_is_refused_with_its_row(tmp_path):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [picture(0), picture(1), None], "label": [0, 1, 1]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="row 2, column 'image'"):
        ready(str(tmp_path), "fit", val_fraction=0.0, calibration_fraction=0.0)


def test_a_model_of_too_few_outputs_is_refused(animals):
    with pytest.raises(ValueError, match=r"num_classes 3 for the 4 classes.*data\.classes"):
        ready(animals, module=vit(3))
    assert ready(animals, module=vit(3), classes=[0, 1, 2]).class_names == NAMES[:3]


def test_images_that_do_not_fit_the_model_are_refused_in_setup(animals):
    module = vit()
    module.model.blocks[0].eval()
    with pytest.raises(ValueError, match=r"cannot take images of \(3, 16, 16\).*data\.image_size.*img_size"):
        ready(animals, "fit", module=module, image_size=16)
    assert (module.training, module.model.blocks[0].training, module.model.blocks[1].training) == (True, False, True)
    with pytest.raises(ValueError, match="images of 2 channels, expected 1"):
        ready(animals, "fit", module=vit(in_chans=2), image_size=None)


def test_a_wrong_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match="empty"):
        ready(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 0.8, "calibration_fraction": 0.2}, "together below 1"),
        ({"val_fraction": -0.1}, "fractions of at least 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"augment": ["rotate"]}, r"\['rotate'\], expected any of crop, shift and flip"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule("data", **settings)


def test_a_foreign_module_gets_timms_default_preparation(animals):
    class Foreign(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

    data = ready(animals, "test", module=Foreign(), image_size=None)
    assert data.splits["test"][0][0].shape == (3, 224, 224)
