"""GLUE as data: splits, tokens, batches."""

from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL, EpochDataLoader, EpochSampler, resolve_seed
from dpp_lightning.tasks.common.splits import check_fractions, evaluation_sampler, of_module, replica
from dpp_lightning.tasks.glue.task_table import GLUETask, glue_task


class GLUEDataModule(LightningDataModule):
    """GLUE as the papers use it: train is cut into training, validation and calibration data; GLUE's validation tests.

    The hidden labels of GLUE's own test split are never read. Calibration data is neither trained on nor scored.

    Args:
        task: one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte; by default that of the module it is used with.
        path: hub id or local folder with the hub's layout (one folder of parquet files per task).
        data_revision: branch, tag or commit of the data on the hub.
        tokenizer: hub id or local folder; by default the module's ``pretrained`` at the module's ``revision``.
        batch_size: samples of a training batch on each rank.
        eval_batch_size: samples of every other batch.
        max_length: sentences, or pairs, are cut to this many tokens; within the model's limit.
        val_fraction: share of train, in [0, 1), that is scored in validation.
        calibration_fraction: share of train, in [0, 1), of :meth:`calibration_dataloader`.
        split_seed: seed of that cut, apart from ``seed``, so that runs with several seeds share their splits.
        seed: seed of the order of training data; by default the one of ``seed_everything``, else 0.
        length_grouped: batches of samples of similar length: less padding.
        num_workers: loader processes; the tokens are made in advance, so 0 is as fast.

    Raises:
        ValueError: an unknown task, or fractions that are outside [0, 1) or leave nothing to train on; in ``setup``: a
            task other than the module's, missing columns, labels outside the task's, a ``max_length`` over the limit.
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
        super().__init__()
        if task is not None:
            glue_task(task)
        check_fractions(val_fraction, calibration_fraction)
        self.task, self.path, self.data_revision, self.tokenizer = task, path, data_revision, tokenizer
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.val_fraction, self.calibration_fraction, self.split_seed = val_fraction, calibration_fraction, split_seed
        self.seed, self.length_grouped, self.num_workers = seed, length_grouped, num_workers
        self.splits: dict[str, Dataset] = {}
        self._texts: list[Dataset] = []
        self._collate: DataCollatorWithPadding | None = None

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
            _check_split(data, split, task, f"{self.path} ({self._task_name()})")
        encoded = {split: _encode(data[split], tokenizer, task.columns, self.max_length) for split in needed}
        train = encoded.pop("train")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.split_seed))
        n_val, n_calibration = (round(f * len(train)) for f in (self.val_fraction, self.calibration_fraction))
        sizes = (n_val, n_calibration, len(train) - n_val - n_calibration)
        val, calibration, rest = (part.sort().values.tolist() for part in order.split(sizes))
        if not rest:
            raise ValueError(f"{self.path} has {len(train)} training samples, too few for these fractions")
        self.splits = {"train": train.select(rest), "val": train.select(val), **encoded}
        self._texts = [data[split] for split in task.evaluation]
        self.splits["calibration"] = train.select(calibration)
        self._collate = DataCollatorWithPadding(tokenizer)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training part; the order depends on (seed, epoch) alone."""
        train = self.splits["train"]
        lengths = [len(tokens) for tokens in train["input_ids"]] if self.length_grouped else None
        sampler = EpochSampler(
            len(train), resolve_seed(self.seed), lengths=lengths, batch_size=self.batch_size, **replica(self.trainer)
        )
        return EpochDataLoader(
            _Samples(train),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The held-out part of train that is scored; no loader where ``val_fraction`` is 0."""
        return self._evaluation_loader("val", shared=True) if len(self.splits["val"]) else []

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """GLUE's validation split; MNLI has two: matched, then mismatched."""
        loaders = [self._evaluation_loader(split, shared=True) for split in glue_task(self._task_name()).evaluation]
        return loaders[0] if len(loaders) == 1 else loaders

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test data; across ranks Lightning deals it out without repetition."""
        loaders = [self._evaluation_loader(split) for split in glue_task(self._task_name()).evaluation]
        return loaders[0] if len(loaders) == 1 else loaders

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Labelled batches that are neither trained on nor scored, in a fixed order, the same on every rank."""
        if not self.splits:
            self.setup()
        if not len(self.splits["calibration"]):
            raise ValueError(
                f"calibration_fraction {self.calibration_fraction} holds out no sample; raise it, e.g. 0.05"
            )
        return self._evaluation_loader("calibration")

    def describe_prediction(self, index: int, prediction: float, dataloader_idx: int = 0) -> dict[str, Any]:
        """A predicted class, or similarity, beside its sentences and label; classes by their names where known."""
        rows, columns = self._texts[dataloader_idx], glue_task(self._task_name()).columns
        row, feature = rows[index], rows.features["label"]
        name = feature.int2str if isinstance(feature, ClassLabel) else lambda value: value
        return {**{c: row[c] for c in columns}, "label": name(row["label"]), "prediction": name(prediction)}

    def unlabelled_dataloader(self, split: str, batch_size: int) -> DataLoader[Any]:
        """Shuffled batches of a split (``val``, ``calibration``, or ``test`` for GLUE's validation) without labels."""
        data = self.splits[glue_task(self._task_name()).evaluation[0] if split == "test" else split]
        if not len(data):
            raise ValueError(f"the split {split} of {self._task_name()} holds no sample; raise its fraction, e.g. 0.1")
        return DataLoader(
            _Samples(data.remove_columns("labels")),
            batch_size=batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            collate_fn=self._collate,
        )

    def _evaluation_loader(self, split: str, shared: bool = False) -> DataLoader[Any]:
        """Batches in the split's order; ``shared`` deals them out to the ranks, and sorts them by length: half of the
        places would be padding else."""
        data = self.splits[split]
        if shared:
            lengths = [len(tokens) for tokens in data["input_ids"]]
            data = data.select(sorted(range(len(data)), key=lengths.__getitem__))
        return DataLoader(
            _Samples(data),
            batch_size=self.eval_batch_size,
            sampler=evaluation_sampler(self.trainer, len(data)) if shared else None,
            num_workers=self.num_workers,
            collate_fn=self._collate,
        )

    def _task_name(self) -> str:
        own = of_module(self.trainer, "task")
        if self.task is not None and own is not None and self.task != own:
            raise ValueError(f"data.task is {self.task!r}, model.task is {own!r}; give the task once, to the model")
        name = self.task or own
        if name is None:
            raise ValueError("GLUEDataModule needs task=..., as the module it is used with has none")
        return str(name)

    def _load_data(self) -> DatasetDict:
        task, folder = self._task_name(), Path(self.path) / self._task_name()
        if folder.is_dir() and not (Path(self.path) / "README.md").is_file():
            # the hub's layout without the card that names its files, such as validation_matched-00000-of-00001.parquet
            files = {split: str(folder / f"{split}-*.parquet") for split in ("train", *glue_task(task).evaluation)}
            return load_dataset("parquet", data_files={s: f for s, f in files.items() if glob(f)})
        return load_dataset(self.path, task, revision=self.data_revision)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is not None:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        pretrained = of_module(self.trainer, "pretrained")
        if pretrained is None:
            raise ValueError("GLUEDataModule needs tokenizer=..., as the module it is used with has no 'pretrained'")
        return AutoTokenizer.from_pretrained(pretrained, revision=of_module(self.trainer, "revision") or "main")

    def _check_length(self, tokenizer: PreTrainedTokenizerBase) -> None:
        limit = min(tokenizer.model_max_length, of_module(self.trainer, "max_length") or tokenizer.model_max_length)
        if not 1 <= self.max_length <= limit:
            raise ValueError(f"max_length is {self.max_length}, but the model takes 1 to {limit} tokens; lower it")


class _Samples(TorchDataset[Mapping[str, Any]]):
    """Rows of an encoded split. A negative index is a filler of EvaluationSampler: its row, with a label to ignore."""

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
    if split not in data:
        raise ValueError(f"{where} has the splits {sorted(data)}, expected {split!r} among them")
    if missing := sorted({*task.columns, "label"} - set(data[split].column_names)):
        raise ValueError(f"{where}, split {split}: columns {missing} are missing, found {data[split].column_names}")
    low, high = task.label_range
    allowed = None if task.num_labels == 1 else range(task.num_labels)
    labels = data[split].unique("label")
    if wrong := [y for y in labels if y is None or not low <= y <= high or (allowed is not None and y not in allowed)]:
        raise ValueError(
            f"{where}, split {split}: labels {sorted(map(str, wrong))[:5]} are outside [{low}, {high}]; "
            "a hidden test split has -1: evaluate on a labelled split"
        )


def _encode(data: Dataset, tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...], max_length: int) -> Dataset:
    """Tokens of every row, without padding, and ``labels``; cached by ``datasets`` between runs."""
    tokenizer(["a"], truncation=True, max_length=max_length)  # the first call changes the state the cache's key is of
    settings = {"tokenizer": tokenizer, "columns": columns, "max_length": max_length}
    return data.map(_tokenise, batched=True, fn_kwargs=settings, remove_columns=data.column_names)


def _tokenise(
    rows: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, columns: tuple[str, ...], max_length: int
) -> dict[str, list[Any]]:
    texts = [rows[column] for column in columns]
    return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": rows["label"]}
