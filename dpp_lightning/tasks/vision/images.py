"""Images with labels as data: any data set of the hub or folder of images, prepared for the model."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from timm.data.config import resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader

from dpp_lightning.tasks.common.data import TaskDataModule, module_attribute
from dpp_lightning.tasks.common.dataset_source import DATA_PATH, check_data_source, load_data
from dpp_lightning.tasks.common.reproducible import resolve_seed
from dpp_lightning.tasks.vision.image_columns import find_columns, named_prediction
from dpp_lightning.tasks.vision.image_rows import ImageRows
from dpp_lightning.tasks.vision.image_transforms import Augmentation, make_transform

_SPLITS_OF_STAGE = {
    "fit": ("train", "val", "calibration"),
    "validate": ("val", "calibration"),
    "test": ("test", "calibration"),
    "predict": ("test", "calibration"),
}


class ImageDataModule(TaskDataModule):
    """Labelled images, such as CIFAR-100: train is cut into training, validation and calibration data.

    Size, channels, normalisation and interpolation are those of the model's own data config (``VisionModule`` has it),
    else timm's defaults. Calibration data is neither trained on nor scored. Which split an image belongs to depends on
    ``split_seed``, the split's own fraction, its row and the number of rows, not on ``classes``.

    Args:
        path: hub id, such as ``uoft-cs/cifar100``; a local folder in the hub's layout; or a folder of images
            ``train/CLASS/FILE`` and ``test/CLASS/FILE``.
        name: configuration of the data set, where it has several.
        data_revision: branch, tag or commit of the data on the hub.
        image_column: by default ``image`` or ``img``.
        label_column: by default ``label`` or ``fine_label``.
        train_split: name of the split that is cut.
        test_split: name of the split of ``test`` and ``predict``; ``None`` where there is none.
        classes: classes to keep, by number or name, at least two; labels are then indices in this list. By default all.
        image_size: height and width, in pixels, in place of those the model was made for.
        augment: augmentation of training images, any of ``crop`` (a random region), ``shift`` and ``flip`` (left and
            right); see :func:`dpp_lightning.tasks.vision.image_transforms.make_transform`.
        batch_size: samples of a training batch on each rank.
        eval_batch_size: samples of every other batch.
        val_fraction: fraction of train, in [0, 1), that is scored in validation.
        calibration_fraction: fraction of train, in [0, 1), for :meth:`calibration_dataloader`.
        split_seed: seed of that cut, apart from ``seed``, so that runs with several seeds share their splits.
        seed: seed of order and augmentation; by default the one of ``seed_everything``, else 0.
        num_workers: loader processes; results do not depend on their number.

    Attributes:
        splits: those of ``train``, ``val``, ``calibration`` and ``test`` that the stage needs, after ``setup``.
        class_names: names of the classes in the order of the labels, after ``setup``.

    Raises:
        ValueError: settings outside their range; in ``setup``: missing splits or columns, columns of another kind,
            unknown classes, labels out of range, images that cannot be read or are not of the model's size.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_revision: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        test_split: str | None = "test",
        classes: list[int | str] | None = None,
        image_size: int | None = None,
        augment: list[Augmentation] | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        val_fraction: float = 0.1,
        calibration_fraction: float = 0.05,
        split_seed: int = 0,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        fractions = {"val": val_fraction, "calibration": calibration_fraction}
        super().__init__(batch_size, eval_batch_size, fractions, split_seed, seed, num_workers=num_workers)
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size is {image_size}, expected at least 1")
        if unknown := sorted(set(augment or ()) - {"crop", "shift", "flip"}):
            raise ValueError(f"augment holds {unknown}, expected any of crop, shift and flip")
        self.path, self.name, self.data_revision = path, name, data_revision
        self.image_column, self.label_column, self.classes = image_column, label_column, classes
        self.train_split, self.test_split = train_split, test_split
        self.image_size, self.augment = image_size, list(augment or ())
        self.class_names: tuple[str, ...] = ()

    def prepare_data(self) -> None:
        """Download the data, where they are not local, in one process."""
        self._load_data()

    def setup(self, stage: str | None = None) -> None:
        """Load, check and cut what the stage needs, and run the model on one image."""
        needed = _SPLITS_OF_STAGE.get(stage or "", ("train", "val", "calibration", "test"))
        if new := [split for split in needed if split not in self.splits]:
            self._make(new)
        self._try_model()

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Labelled batches that are neither trained on nor scored, in a fixed order of mixed classes, the same on every
        rank.

        Raises:
            ValueError: no image is held out for calibration.
        """
        if "calibration" not in self.splits:
            self._make(["calibration"])
        return super().calibration_dataloader()

    def describe_prediction(self, index: int, prediction: Any, dataloader_idx: int = 0) -> dict[str, Any]:
        """Names of the true and the predicted class of one image of :meth:`predict_dataloader`.

        Args:
            index: position of the image in the test split, from 0.
            prediction: the predicted class, a number or a tensor of one, as ``VisionModule.predict_step`` gives it.
            dataloader_idx: 0, as there is one loader.
        """
        return named_prediction(self.class_names, self.splits["test"].labels[index], prediction)

    def _make(self, splits: Sequence[str]) -> None:
        """Fill some of ``splits`` from the splits of the data set, which are read and checked.

        Raises:
            ValueError: missing splits or columns, unknown classes, labels out of range, nothing left to train on.
        """
        data, train = self._load_data(), self.train_split
        sources = {split: self.test_split if split == "test" else train for split in splits}
        needed = {train, *(source for source in sources.values() if source is not None)}
        if missing := sorted(needed - set(data)):
            raise ValueError(
                f"{DATA_PATH} {self.path} has the splits {sorted(data)}, expected {missing} among them; name them by "
                "data.train_split and data.test_split (null where there is none)"
            )
        settings = (self.image_column, self.label_column, self.classes, module_attribute(self.trainer, "num_classes"))
        where = f"{DATA_PATH} {self.path}, split"
        columns = find_columns(data[train], *settings, f"{where} {train}")
        labels = {source: columns.class_indices(data[source], f"{where} {source}") for source in needed}
        self.class_names, cut = columns.names, self._cut(len(data[train]))
        for split, source in sources.items():
            rows = cut[split] if split in cut else torch.arange(0 if source is None else len(data[source]))
            source = source or train
            rows = rows[labels[source][rows] >= 0]
            self.splits[split] = self._rows(split, data[source], columns.image, rows, labels[source][rows])
        if "train" in splits and not len(self.splits["train"]):
            raise ValueError(
                f"{DATA_PATH} {self.path} has {len(data[train])} training images, too few for these fractions; "
                "lower them"
            )

    def _cut(self, size: int) -> dict[str, Tensor]:
        """Rows of the training split that ``train``, ``val`` and ``calibration`` take.

        Validation comes from the front of one order and calibration from its back, so that neither depends on the
        other's size. Calibration stays in that order, as files are often sorted by class.
        """
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self.split_seed))
        first, last = round(self.fractions["val"] * size), size - round(self.fractions["calibration"] * size)
        val, train, calibration = order[:first], order[first:last], order[last:]
        return {"train": train.sort().values, "val": val.sort().values, "calibration": calibration}

    def _rows(self, split: str, data: Dataset, column: str, positions: Tensor, labels: Tensor) -> ImageRows:
        """The images of one split, transformed to what the model takes.

        Raises:
            ValueError: the model takes images of neither one nor three channels.
        """
        defaults = {"img_size": self.image_size or 224}
        config = module_attribute(self.trainer, "data_config") or resolve_data_config(defaults)
        channels, *size = config["input_size"]
        if channels not in (1, 3):
            raise ValueError(f"the model takes images of {channels} channels, expected 1 (grey) or 3 (RGB)")
        size = [self.image_size] * 2 if self.image_size else size
        augment = self.augment if split == "train" else []
        transform = make_transform({**config, "input_size": (channels, *size)}, augment)
        seed = resolve_seed(self.seed) if augment else None
        return ImageRows(data, column, "L" if channels == 1 else "RGB", positions, labels, transform, seed)

    def _try_model(self) -> None:
        """Run the module on one image.

        Raises:
            ValueError: the module cannot take it; with the module's own error.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        images = next((images for images in self.splits.values() if len(images)), None)
        if module is None or images is None or not hasattr(module, "data_config"):
            return
        image = images[0][0][None].to(next(module.parameters()))
        modes = [(submodule, submodule.training) for submodule in module.modules()]
        try:
            with torch.no_grad():
                module.eval()(image)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the model cannot take images of {tuple(image.shape[1:])} (channels, height, width): {error}. Leave "
                "data.image_size out, or set img_size in model.model_kwargs to it"
            ) from error
        finally:
            for submodule, mode in modes:
                submodule.training = mode

    def _load_data(self) -> DatasetDict:
        check_data_source(self.path)
        return load_data(self.path, self.name, revision=self.data_revision)
