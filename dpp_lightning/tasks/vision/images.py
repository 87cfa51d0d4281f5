"""Images with labels as data: any data set of the hub or folder of images, prepared as the model wants them."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from lightning.pytorch import LightningDataModule
from timm.data.config import resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader

from dpp_lightning.tasks.common.reproducible import EpochDataLoader, EpochSampler, resolve_seed
from dpp_lightning.tasks.common.splits import check_fractions, evaluation_sampler, of_module, replica
from dpp_lightning.tasks.vision.image_columns import find_columns
from dpp_lightning.tasks.vision.image_rows import ImageRows
from dpp_lightning.tasks.vision.image_transforms import Augmentation, make_transform

_PARTS_OF_STAGE = {
    "fit": ("train", "val", "calibration"),
    "validate": ("val", "calibration"),
    "test": ("test", "calibration"),
    "predict": ("test", "calibration"),
}


class ImageDataModule(LightningDataModule):
    """Labelled images, such as CIFAR-100: train is cut into training, validation and calibration data.

    Size, channels, normalisation and interpolation are those of the model's own data config (``VisionModule`` has it),
    else timm's defaults. Calibration data is neither trained on nor scored. Which part an image belongs to depends on
    ``split_seed``, the part's own fraction, its row and the number of rows, not on ``classes``.

    Args:
        path: hub id, such as ``uoft-cs/cifar100``; a local folder in the hub's layout; or a folder of images
            ``train/CLASS/FILE`` and ``test/CLASS/FILE``.
        name: which configuration of that data set, where it has several.
        data_revision: branch, tag or commit of the data on the hub.
        image_column: by default ``image`` or ``img``.
        label_column: by default ``label`` or ``fine_label``.
        train_split: name of the split that is cut.
        test_split: name of the split of ``test`` and ``predict``; ``None`` where there is none.
        classes: those to keep, by number or name, at least two; labels are then places in this list. By default all.
        image_size: height and width, in pixels, in place of those the model was made for.
        augment: of training images, any of ``crop`` (random part), ``shift`` and ``flip`` (left and right); see
            :func:`dpp_lightning.tasks.vision.image_transforms.make_transform`.
        batch_size: samples of a training batch on each rank.
        eval_batch_size: samples of every other batch.
        val_fraction: share of train, in [0, 1), that is scored in validation.
        calibration_fraction: share of train, in [0, 1), of :meth:`calibration_dataloader`.
        split_seed: seed of that cut, apart from ``seed``, so that runs with several seeds share their splits.
        seed: seed of order and augmentation; by default the one of ``seed_everything``, else 0.
        num_workers: loader processes; they change no number.

    Attributes:
        splits: the parts ``train``, ``val``, ``calibration`` and ``test`` that the stage needs, after ``setup``.
        class_names: after ``setup``, in the order of the labels.

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
        super().__init__()
        check_fractions(val_fraction, calibration_fraction)
        if min(batch_size, eval_batch_size) < 1 or (image_size is not None and image_size < 1):
            raise ValueError(
                f"batch_size is {batch_size}, eval_batch_size {eval_batch_size}, image_size {image_size}, "
                "expected at least 1"
            )
        if unknown := sorted(set(augment or ()) - {"crop", "shift", "flip"}):
            raise ValueError(f"augment holds {unknown}, expected any of crop, shift and flip")
        self.path, self.name, self.data_revision = path, name, data_revision
        self.image_column, self.label_column, self.classes = image_column, label_column, classes
        self.train_split, self.test_split = train_split, test_split
        self.image_size, self.augment = image_size, list(augment or ())
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.val_fraction, self.calibration_fraction, self.split_seed = val_fraction, calibration_fraction, split_seed
        self.seed = seed
        self.splits: dict[str, ImageRows] = {}
        self.class_names: tuple[str, ...] = ()

    def prepare_data(self) -> None:
        """Download the data, where they are not local, in one process."""
        self._load_data()

    def setup(self, stage: str | None = None) -> None:
        """Load, check and cut what the stage needs, and try one image on the model."""
        wanted = _PARTS_OF_STAGE.get(stage or "", ("train", "val", "calibration", "test"))
        if new := [part for part in wanted if part not in self.splits]:
            self._make(new)
        self._try_model()

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training part; order and augmentation depend on (seed, epoch) alone."""
        train = self.splits["train"]
        sampler = EpochSampler(len(train), resolve_seed(self.seed), **replica(self.trainer))
        return EpochDataLoader(train, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The held-out part of train that is scored; no loader where it is empty."""
        return self._evaluation_loader("val", shared=True) if len(self.splits["val"]) else []

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test split; no loader where ``test_split`` is ``None``."""
        return self._evaluation_loader("test", shared=True) if len(self.splits["test"]) else []

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test split in its order; across ranks Lightning deals it out without repetition."""
        return self._evaluation_loader("test") if len(self.splits["test"]) else []

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Labelled batches that are neither trained on nor scored, in a fixed order of mixed classes, the same on every
        rank."""
        if "calibration" not in self.splits:
            self._make(["calibration"])
        if not len(self.splits["calibration"]):
            raise ValueError(
                f"calibration_fraction {self.calibration_fraction} holds out no image; raise it, e.g. 0.05"
            )
        return self._evaluation_loader("calibration")

    def describe_prediction(self, index: int, prediction: Any, dataloader_idx: int = 0) -> dict[str, Any]:
        """Names of the true and the predicted class of one image of :meth:`predict_dataloader`.

        Args:
            index: place of the image, from 0.
            prediction: the predicted class, a number or a tensor of one, as ``VisionModule.predict_step`` gives it.
            dataloader_idx: 0, as there is one loader.
        """
        label, predicted = int(self.splits["test"].labels[index]), int(prediction)
        names = self.class_names
        unnamed = f"output {predicted}"  # of a model with more outputs than there are classes
        return {"label": names[label], "prediction": names[predicted] if predicted < len(names) else unnamed}

    def _make(self, parts: Sequence[str]) -> None:
        """Read and check the splits that the parts are of, and take their rows out of them."""
        data, train, test = self._load_data(), self.train_split, self.test_split
        needed = {train} | ({test} if test is not None and "test" in parts else set())
        if missing := sorted(needed - set(data)):
            raise ValueError(
                f"{self.path} has the splits {sorted(data)}, expected {missing} among them; name them by "
                "data.train_split and data.test_split (null where there is none)"
            )
        settings = (self.image_column, self.label_column, self.classes, of_module(self.trainer, "num_classes"))
        columns = find_columns(data[train], *settings, f"{self.path}, split {train}")
        places = {split: columns.places(data[split], f"{self.path}, split {split}") for split in needed}
        self.class_names, rows = columns.names, self._cut(len(data[train]))
        for part in parts:
            split = train if part in rows or test is None else test
            chosen = rows.get(part, torch.arange(len(data[split]) if test is not None else 0))
            chosen = chosen[places[split][chosen] >= 0]
            self.splits[part] = self._rows(part, data[split], columns.image, chosen, places[split][chosen])
        if "train" in parts and not len(self.splits["train"]):
            raise ValueError(f"{self.path} has {len(data[train])} training images, too few for these fractions")

    def _cut(self, n: int) -> dict[str, Tensor]:
        """Rows of n that each part of train takes: from the front and the back of one order, so that a part does not
        depend on the other's size. Calibration stays in that order, as files are often sorted by class."""
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.split_seed))
        first, last = round(self.val_fraction * n), n - round(self.calibration_fraction * n)
        val, train, calibration = order[:first], order[first:last], order[last:]
        return {"train": train.sort().values, "val": val.sort().values, "calibration": calibration}

    def _rows(self, part: str, data: Dataset, column: str, positions: Tensor, labels: Tensor) -> ImageRows:
        config = of_module(self.trainer, "data_config") or resolve_data_config({"img_size": self.image_size or 224})
        channels, *size = config["input_size"]
        if channels not in (1, 3):
            raise ValueError(f"the model takes images of {channels} channels, expected 1 (grey) or 3 (RGB)")
        size = [self.image_size] * 2 if self.image_size else size
        augment = self.augment if part == "train" else []
        transform = make_transform({**config, "input_size": (channels, *size)}, augment)
        seed = resolve_seed(self.seed) if augment else None
        return ImageRows(data, column, "L" if channels == 1 else "RGB", positions, labels, transform, seed)

    def _try_model(self) -> None:
        """Refuse images that the module cannot take, by its own error on one of them."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        part = next((rows for rows in self.splits.values() if len(rows)), None)
        if module is None or part is None or not hasattr(module, "data_config"):
            return
        image = part[0][0][None].to(next(module.parameters()))
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

    def _evaluation_loader(self, part: str, shared: bool = False) -> DataLoader[Any]:
        """Batches in the part's order; ``shared`` deals them out to the ranks."""
        rows = self.splits[part]
        sampler = evaluation_sampler(self.trainer, len(rows)) if shared else None
        return DataLoader(rows, batch_size=self.eval_batch_size, sampler=sampler, num_workers=self.num_workers)

    def _load_data(self) -> DatasetDict:
        try:
            return load_dataset(self.path, self.name, revision=self.data_revision)
        except ValueError as error:  # an unknown configuration, a folder without data
            raise ValueError(f"data.path {self.path!r}, data.name {self.name!r}: {error}") from error
