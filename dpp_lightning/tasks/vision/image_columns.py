"""The columns of a data set that hold images and labels, and the classes: looked up and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "fine_label")


@dataclass(frozen=True)
class ImageColumns:
    """Columns and classes, which every split must hold.

    Attributes:
        image: name of the column of images.
        label: name of the column of labels.
        values: labels of the classes that are kept; a sample's label is the class's index in here.
        names: names of the classes, in the same order.
        num_labels: labels must be in [0, num_labels).
    """

    image: str
    label: str
    values: tuple[int, ...]
    names: tuple[str, ...]
    num_labels: int

    def class_indices(self, data: datasets.Dataset, where: str) -> Tensor:
        """The index in ``values`` of every row's label, -1 for classes that are not kept: (rows,).

        Args:
            data: a split.
            where: name of the split in messages.

        Raises:
            ValueError: columns that are missing or of another kind, labels outside the range.
        """
        check_columns(data.features, self.image, self.label, where)
        labels = data.unique(self.label)
        if wrong := [y for y in labels if y is None or not 0 <= y < self.num_labels]:
            raise ValueError(
                f"{where}: {self.label!r} holds {sorted(map(str, wrong))[:5]}, expected labels from 0 to "
                f"{self.num_labels - 1}; a hidden test split has -1: name a labelled one by data.test_split, "
                "or raise model.num_classes where there are more classes"
            )
        class_index = torch.full((self.num_labels,), -1)
        class_index[list(self.values)] = torch.arange(len(self.values))
        return class_index[torch.tensor(data.with_format("numpy")[self.label][:], dtype=torch.long)]


def find_columns(
    data: datasets.Dataset,
    image: str | None,
    label: str | None,
    classes: Sequence[int | str] | None,
    outputs: int | None,
    where: str,
) -> ImageColumns:
    """Look up columns and classes in the training split.

    Args:
        data: the split.
        image: its column of images; by default ``image`` or ``img``.
        label: its column of labels; by default ``label`` or ``fine_label``.
        classes: classes to keep, by number or name; by default all.
        outputs: number of the model's outputs, where it is known.
        where: name of the split in messages.

    Raises:
        ValueError: missing columns, unknown classes, or more classes than the model has outputs.
    """
    image = _find(data.column_names, image, IMAGE_COLUMNS, "image", where)
    label = _find(data.column_names, label, LABEL_COLUMNS, "label", where)
    check_columns(data.features, image, label, where)
    names = _class_names(data, label, None if classes is not None else outputs)
    values = tuple(_value(name, names, where) for name in (range(len(names)) if classes is None else classes))
    if len(values) < 2 or len(set(values)) < len(values):
        raise ValueError(f"data.classes is {classes}, expected at least two different classes of {where}: {names[:20]}")
    if outputs is not None and outputs < len(values):
        raise ValueError(
            f"the model has num_classes {outputs} for the {len(values)} classes of {where}; set model.num_classes to "
            f"{len(values)}, or keep fewer by data.classes"
        )
    return ImageColumns(image, label, values, tuple(names[v] for v in values), len(names))


def named_prediction(classes: Sequence[int | str], label: Any, prediction: Any) -> dict[str, int | str]:
    """The names of an image's ``label`` and of the ``prediction`` for it.

    Args:
        classes: names of the classes, by index.
        label: index of the true class, a number or a tensor of one.
        prediction: index of the predicted output; a model may have more outputs than there are classes.
    """
    predicted = int(prediction)
    name = classes[predicted] if predicted < len(classes) else f"output {predicted}"
    return {"label": classes[int(label)], "prediction": name}


def check_columns(features: datasets.Features, image: str, label: str, where: str) -> None:
    """Refuse a split whose columns are missing or of another kind.

    Args:
        features: of the split.
        image: name of the column that must hold images.
        label: name of the column that must hold classes.
        where: name of the split in messages.

    Raises:
        ValueError: a missing column, a column of images that holds something else, labels that are no integers.
    """
    if missing := [name for name in (image, label) if name not in features]:
        raise ValueError(f"{where}: columns {missing} are missing, it has {sorted(features)}")
    if not isinstance(features[image], datasets.Image):
        raise ValueError(
            f"{where}: column {image!r} holds {features[image]}, expected images (datasets.Image); name another by "
            "data.image_column, or cast it with cast_column"
        )
    is_integer = isinstance(features[label], datasets.Value) and "int" in features[label].dtype
    if not (is_integer or isinstance(features[label], datasets.ClassLabel)):
        raise ValueError(
            f"{where}: column {label!r} holds {features[label]}, expected classes (datasets.ClassLabel or integers); "
            "name another by data.label_column, or make it one with class_encode_column"
        )


def _find(columns: Sequence[str], given: str | None, usual: Sequence[str], what: str, where: str) -> str:
    candidates = usual if given is None else (given,)
    for name in candidates:
        if name in columns:
            return name
    raise ValueError(
        f"{where} has the columns {sorted(columns)}, none of them {' or '.join(map(repr, candidates))}; name the one "
        f"of the {what}s by data.{what}_column"
    )


def _class_names(data: datasets.Dataset, label: str, outputs: int | None) -> list[str]:
    """Names of all classes. Labels without names are named by their numbers: as many as ``outputs`` says, where it is
    given, else up to the largest label."""
    feature = data.features[label]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    largest = max((y for y in data.unique(label) if y is not None), default=0)
    limit = max(2, int(largest) + 1) if outputs is None else outputs
    return [str(value) for value in range(limit)]


def _value(given: int | str, names: Sequence[str], where: str) -> int:
    """The label of a class given by number or name.

    Raises:
        ValueError: no such class.
    """
    if isinstance(given, str) and given in names:
        return list(names).index(given)
    if isinstance(given, int) and 0 <= given < len(names):
        return given
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise ValueError(f"data.classes: {given!r} is no class of {where}, which has {shown}; numbers count from 0")
