"""Which columns of a data set are images and labels, and which classes there are: found, checked, or refused."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import torch
from torch import Tensor

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "fine_label")


@dataclass(frozen=True)
class ImageColumns:
    """What a split of images must hold.

    Attributes:
        image: name of the column of images.
        label: name of the column of labels.
        values: the labels that are kept; a label becomes its place in here.
        names: their names, in the same order.
        num_labels: labels are to be in [0, num_labels).
    """

    image: str
    label: str
    values: tuple[int, ...]
    names: tuple[str, ...]
    num_labels: int

    def places(self, data: datasets.Dataset, where: str) -> Tensor:
        """The place of every row's label in ``values``, -1 for the classes that are not kept: (rows,).

        Args:
            data: a split.
            where: what it is called in messages.

        Raises:
            ValueError: columns that are missing or of another kind, labels outside the range.
        """
        check_columns(data.features, self.image, self.label, where)
        found = data.unique(self.label)
        if wrong := [y for y in found if y is None or not 0 <= y < self.num_labels]:
            raise ValueError(
                f"{where}: {self.label!r} holds {sorted(map(str, wrong))[:5]}, expected labels from 0 to "
                f"{self.num_labels - 1}; a hidden test split has -1: name a labelled one by data.test_split, "
                "or raise model.num_classes where there are more classes"
            )
        place = torch.full((self.num_labels,), -1)
        place[list(self.values)] = torch.arange(len(self.values))
        return place[torch.tensor(data.with_format("numpy")[self.label][:], dtype=torch.long)]


def find_columns(
    data: datasets.Dataset,
    image: str | None,
    label: str | None,
    classes: Sequence[int | str] | None,
    outputs: int | None,
    where: str,
) -> ImageColumns:
    """Find columns and classes in the training split.

    Args:
        data: the split.
        image: its column of images; by default ``image`` or ``img``.
        label: its column of labels; by default ``label`` or ``fine_label``.
        classes: to keep, by number or name; by default all.
        outputs: of the model, where it is known.
        where: what the split is called in messages.

    Raises:
        ValueError: missing columns, unknown classes, or more classes than the model has outputs.
    """
    image = _find(data.column_names, image, IMAGE_COLUMNS, "image", where)
    label = _find(data.column_names, label, LABEL_COLUMNS, "label", where)
    check_columns(data.features, image, label, where)
    feature = data.features[label]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if names is None:  # bare numbers, whose names they are
        largest = max((y for y in data.unique(label) if y is not None), default=0)
        limit = outputs if outputs is not None and classes is None else max(2, int(largest) + 1)
        names = [str(value) for value in range(limit)]
    values = tuple(_value(name, names, where) for name in (range(len(names)) if classes is None else classes))
    if len(values) < 2 or len(set(values)) < len(values):
        raise ValueError(f"data.classes is {classes}, expected at least two different classes of {where}: {names[:20]}")
    if outputs is not None and outputs < len(values):
        raise ValueError(
            f"the model has num_classes {outputs} for the {len(values)} classes of {where}; set model.num_classes to "
            f"{len(values)}, or keep fewer by data.classes"
        )
    return ImageColumns(image, label, values, tuple(names[v] for v in values), len(names))


def check_columns(features: datasets.Features, image: str, label: str, where: str) -> None:
    """Refuse a split whose columns are not there or hold something else.

    Raises:
        ValueError: as said.
    """
    if missing := [name for name in (image, label) if name not in features]:
        raise ValueError(f"{where}: columns {missing} are missing, found {sorted(features)}")
    if not isinstance(features[image], datasets.Image):
        raise ValueError(
            f"{where}: column {image!r} holds {features[image]}, expected images (datasets.Image); name another by "
            "data.image_column, or cast it with cast_column"
        )
    whole = isinstance(features[label], datasets.Value) and "int" in features[label].dtype
    if not (whole or isinstance(features[label], datasets.ClassLabel)):
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


def _value(wanted: int | str, names: Sequence[str], where: str) -> int:
    """The label of a class given by number or name."""
    if isinstance(wanted, str) and wanted in names:
        return list(names).index(wanted)
    if isinstance(wanted, int) and 0 <= wanted < len(names):
        return wanted
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise ValueError(f"data.classes: {wanted!r} is no class of {where}, which has {shown}; numbers count from 0")
