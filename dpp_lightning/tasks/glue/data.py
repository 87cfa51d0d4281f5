"""GLUE as data: splits, tokens, batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from dpp_lightning.storage.locate import local_path
from dpp_lightning.tasks.common.data import TaskDataModule, module_attribute
from dpp_lightning.tasks.common.dataset_source import DATA_PATH, check_data_source, load_data
from dpp_lightning.tasks.common.pretrained import PRETRAINED, load_tokenizer
from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL
from dpp_lightning.tasks.glue.task_table import GLUETask, glue_task


class GLUEDataModule(TaskDataModule):
    """GLUE as in the papers: train gives training, validation and calibration data, GLUE's validation split the test.

    GLUE's own test split, whose labels are hidden, is never read. Calibration data is neither trained on nor scored.

    Args:
        task: one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte; by default that of the module it is used with.
        path: hub id or local folder with the hub's layout (one folder of parquet files per task).
        data_revision: branch, tag or commit of the data on the hub.
        tokenizer: hub id or local folder; by default the module's ``pretrained`` at the module's ``revision``.
        batch_size: samples of a training batch on each rank.
        eval_batch_size: samples of every other batch.
        max_length: sentences, or pairs, are cut to this many tokens; within the model's limit.
        val_fraction: fraction of train, in [0, 1), that is scored in validation.
        calibration_fraction: fraction of train, in [0, 1), for :meth:`calibration_dataloader`.
        split_seed: seed of that cut, apart from ``seed``, so that runs with several seeds share their splits.
        seed: seed of the order of training data; by default the one of ``seed_everything``, else 0.
        length_grouped: batches of samples of similar length: less padding.
        num_workers: loader processes; texts are tokenised in advance, so 0 is as fast.

    Raises:
        ValueError: an unknown task, or fractions outside [0, 1) or not below 1 together; in ``setup``: a task other
            than the module's, missing columns, labels outside the task's range, too few samples for the fractions, a
            ``max_length`` over the model's limit.
    """

    def __init__(
        self,
        task: str | None = None,
        path: str = "nyu-mll/glue",
        data_revision: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        max_length: int = 128,
        val_fraction: float = 0.1,
        calibration_fraction: float = 0.05,
        split_seed: int = 0,
        seed: int | None = None,
        length_grouped: bool = False,
        num_workers: int = 0,
    ) -> None:
        fractions = {"val": val_fraction, "calibration": calibration_fraction}
        super().__init__(batch_size, eval_batch_size, fractions, split_seed, seed, length_grouped, num_workers)
        if task is not None:
            glue_task(task)
        self.task, self.path, self.data_revision, self.tokenizer = task, path, data_revision, tokenizer
        self.max_length = max_length
        self._texts: list[Dataset] = []

    def prepare_data(self) -> None:
        """Download data and tokenizer, where they are not local, in one process."""
        self._load_data()
        self._load_tokenizer()

    def setup(self, stage: str | None = None) -> None:
        """Load, check, cut and tokenise every split; the cut depends on ``split_seed`` and train's size alone."""
        if self.splits:
            return
        task = glue_task(self._task_name())
        data, tokenizer = self._load_data(), self._load_tokenizer()
        self._check_length(tokenizer)
        needed = ("train", *task.evaluation)
        for split in needed:
            _check_split(data, split, task, f"{DATA_PATH} {self.path} ({self._task_name()})")
        number = float if task.num_labels == 1 else int
        encoded = {split: _encode(data[split], tokenizer, task.columns, self.max_length, number) for split in needed}
        train = encoded.pop("train")
        self.splits = {**{split: train.select(rows) for split, rows in self._cut(len(train)).items()}, **encoded}
        self._texts = [data[split] for split in task.evaluation]
        self.collate = DataCollatorWithPadding(tokenizer)

    def samples(self, split: str, order: Sequence[int] | None = None) -> "EncodedRows":
        """The rows of a split, whose fillers have a label to ignore."""
        rows = self.splits[split]
        return EncodedRows(rows if order is None else rows.select(order))

    def lengths(self, split: str) -> list[int]:
        """Tokens of each sample of a split."""
        return [len(tokens) for tokens in self.splits[split]["input_ids"]]

    def test_splits(self) -> Sequence[str]:
        """GLUE's validation split; MNLI has two: matched, then mismatched."""
        return glue_task(self._task_name()).evaluation

    def describe_prediction(self, index: int, prediction: float, dataloader_idx: int = 0) -> dict[str, Any]:
        """A predicted class, or similarity, beside its sentences and label; classes by name where the data has names.

        Args:
            index: position of the sample in its loader, from 0.
            prediction: as ``GLUEModule.predict_step`` gives it for the sample.
            dataloader_idx: 1 for MNLI's mismatched split.
        """
        rows, columns = self._texts[dataloader_idx], glue_task(self._task_name()).columns
        row, feature = rows[index], rows.features["label"]
        name_of = feature.int2str if isinstance(feature, ClassLabel) else lambda value: value
        texts = {column: row[column] for column in columns}
        return {**texts, "label": name_of(row["label"]), "prediction": name_of(prediction)}

    def unlabelled_dataloader(self, split: str, batch_size: int) -> DataLoader[Any]:
        """Shuffled batches without labels, ``batch_size`` samples each, in an order of torch's global generator.

        Args:
            split: ``val``, ``calibration``, or ``test`` for GLUE's validation split.
            batch_size: samples of a batch.

        Raises:
            ValueError: the split holds no sample.
        """
        rows = self.splits[self.test_splits()[0] if split == "test" else split]
        if not len(rows):
            raise ValueError(f"the split {split} of {self._task_name()} holds no sample; raise its fraction, e.g. 0.1")
        return DataLoader(
            EncodedRows(rows.remove_columns("labels")),
            batch_size=batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            collate_fn=self.collate,
        )

    def _cut(self, size: int) -> dict[str, list[int]]:
        """Rows of the training set that each split takes, rising; a function of ``split_seed`` and the size alone.

        Raises:
            ValueError: no row is left to train on.
        """
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self.split_seed))
        held_out = [round(fraction * size) for fraction in self.fractions.values()]
        *pieces, rest = order.split([*held_out, size - sum(held_out)])
        if not len(rest):
            raise ValueError(
                f"{DATA_PATH} {self.path} has {size} training samples, too few for these fractions; lower them"
            )
        rows = {"train": rest, **dict(zip(self.fractions, pieces, strict=True))}
        return {split: piece.sort().values.tolist() for split, piece in rows.items()}

    def _task_name(self) -> str:
        module_task = module_attribute(self.trainer, "task")
        if self.task is not None and module_task is not None and self.task != module_task:
            raise ValueError(
                f"data.task is {self.task!r}, model.task is {module_task!r}; give the task once, to the model"
            )
        name = self.task or module_task
        if name is None:
            raise ValueError("GLUEDataModule needs task=..., as the module it is used with has none")
        return str(name)

    def _load_data(self) -> DatasetDict:
        task, place = self._task_name(), local_path(self.path)
        check_data_source(self.path)
        if not place.is_dir() or _describes(place / "README.md", task):
            return load_data(self.path, task, revision=self.data_revision)
        # without the card of the hub's layout nothing names files such as validation_matched-00000-of-00001.parquet
        splits = ("train", *glue_task(task).evaluation)
        files = {s: str(place / task / f"{s}-*.parquet") for s in splits if any((place / task).glob(f"{s}-*.parquet"))}
        if not files:
            found = ", ".join(sorted(entry.name for entry in place.iterdir())[:8])
            raise FileNotFoundError(
                f"{DATA_PATH} {self.path}: expected {task}/train-*.parquet in it, as the hub's nyu-mll/glue has them; "
                f"found {found}"
            )
        return load_data("parquet", files=files, source=self.path)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer, None, "data.tokenizer")
        pretrained = module_attribute(self.trainer, "pretrained")
        if pretrained is None:
            raise ValueError("GLUEDataModule needs tokenizer=..., as the module it is used with has no 'pretrained'")
        return load_tokenizer(pretrained, module_attribute(self.trainer, "revision"), PRETRAINED)

    def _check_length(self, tokenizer: PreTrainedTokenizerBase) -> None:
        limit = tokenizer.model_max_length
        limit = min(limit, module_attribute(self.trainer, "max_length") or limit)
        if not 1 <= self.max_length <= limit:
            raise ValueError(f"max_length is {self.max_length}, but the model takes 1 to {limit} tokens; lower it")


class EncodedRows(TorchDataset[Mapping[str, Any]]):
    """Rows of an encoded split; a negative index, EvaluationSampler's filler, gives its row with a label to ignore.

    Args:
        rows: with ``labels`` and what the tokenizer gives.
    """

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        rows = self.rows.__getitems__([i % len(self.rows) for i in indices])
        return [
            row if i >= 0 else {**row, "labels": type(row["labels"])(IGNORED_LABEL)}
            for i, row in zip(indices, rows, strict=True)
        ]


def _check_split(data: DatasetDict, split: str, task: GLUETask, where: str) -> None:
    """Refuse a split that is missing, lacks a column, or has labels outside the task's range.

    Raises:
        ValueError: the first of these, beginning with ``where``.
    """
    if split not in data:
        raise ValueError(f"{where} has the splits {sorted(data)}, expected {split!r} among them")
    if missing := sorted({*task.columns, "label"} - set(data[split].column_names)):
        raise ValueError(f"{where}, split {split}: columns {missing} are missing, found {data[split].column_names}")
    low, high = task.label_range
    allowed = None if task.num_labels == 1 else range(task.num_labels)
    labels = data[split].unique("label")
    if others := [y for y in labels if y is not None and not isinstance(y, int | float)]:
        raise ValueError(f"{where}, split {split}: labels are numbers, found {others[0]!r}")
    for column in task.columns:
        if None in (texts := data[split][column]):
            row = list(texts).index(None)
            raise ValueError(f"{where}, split {split}: row {row} has no {column}; remove the row")
    if wrong := [y for y in labels if y is None or not low <= y <= high or (allowed is not None and y not in allowed)]:
        raise ValueError(
            f"{where}, split {split}: labels {sorted(map(str, wrong))[:5]} are outside [{low}, {high}]; "
            "a hidden test split has -1: evaluate on a labelled split"
        )


def _describes(card: Path, task: str) -> bool:
    """Whether a data set's card says which files a task has, as the hub's does; a README of one's own does not."""
    return card.is_file() and f"config_name: {task}" in card.read_text(encoding="utf-8", errors="replace")


def _encode(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...], max_length: int, number: type
) -> Dataset:
    """Tokens of every row, without padding, and ``labels``, each such a number; cached by ``datasets`` between runs."""
    # the first call changes the tokenizer's state, which is hashed into the key of the cache
    tokenizer(["a"], truncation=True, max_length=max_length)
    settings = {"tokenizer": tokenizer, "columns": columns, "max_length": max_length, "number": number}
    return data.map(_tokenise, batched=True, fn_kwargs=settings, remove_columns=data.column_names)


def _tokenise(
    rows: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...], max_length: int,
    number: type,
) -> dict[str, list[Any]]:  # fmt: skip
    texts = [rows[column] for column in columns]
    labels = [number(label) for label in rows["label"]]
    return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": labels}
