"""Questions and answers from the hub, a local folder, or a JSON, JSONL or parquet file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict

from dpp_lightning.storage.locate import local_path
from dpp_lightning.tasks.common.dataset_source import DATA_PATH, check_data_source, load_data

QUESTIONS = ("question", "query", "instruction", "problem", "prompt")
ANSWERS = ("answer", "response", "output", "solution", "completion")

FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_CONFIGURATIONS = {"openai/gsm8k": "main"}  # of several on the hub, the one that the papers use


@dataclass(frozen=True)
class Source:
    """Where questions and answers are read from.

    Attributes:
        path: hub id, folder in the hub's layout, or a ``.json``, ``.jsonl`` or ``.parquet`` file.
        name: configuration of the data set, such as ``main`` of GSM8K; by default its only one.
        revision: branch, tag or commit on the hub.
        question_column, answer_column: by default the first of :data:`QUESTIONS` and :data:`ANSWERS` that is there.
        argument: what the user calls ``path``, for messages.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    argument: str = DATA_PATH

    @property
    def where(self) -> str:
        """How messages begin: the argument and the path."""
        return f"{self.argument} {self.path}"

    def load(self) -> DatasetDict:
        """Every split; a file is the split ``train``, or ``test`` where its name says so.

        Raises:
            FileNotFoundError, ConnectionError: there is no such source, see
                :func:`dpp_lightning.tasks.common.dataset_source.load_data`.
            ValueError: it cannot be read.
        """
        check_data_source(self.path, self.argument, suffixes=tuple(FILES))
        file, builder = local_path(self.path), FILES.get(Path(self.path).suffix)
        if builder is None or not file.is_file():
            name = self.name or _CONFIGURATIONS.get(self.path)
            return load_data(self.path, name, revision=self.revision, argument=self.argument)
        split = "test" if "test" in re.split(r"[^a-z]+", file.stem.lower()) else "train"
        return load_data(builder, files={split: str(file)}, source=self.path, argument=self.argument)

    def texts(self, data: DatasetDict, split: str) -> Dataset:
        """The rows of one split with the two columns ``question`` and ``answer``, as texts, none of them empty.

        Args:
            data: what :meth:`load` returns.
            split: a key of it.

        Raises:
            ValueError: no such split or column, or a row without question or answer, with its number.
        """
        where = f"{self.where}, split {split}"
        if split not in data:
            raise ValueError(f"{self.where} has the splits {sorted(data)}, expected {split!r} among them")
        rows = data[split]
        columns = rows.column_names
        question = _column(self.question_column, QUESTIONS, columns, "question", where)
        answer = _column(self.answer_column, ANSWERS, columns, "answer", where)
        rows = rows.select_columns([question, answer])
        for new, old in (("question", question), ("answer", answer)):
            rows = rows if new == old else rows.rename_column(old, new)
        for column in ("question", "answer"):
            _check_texts(rows[column], column, where)
        return rows


def _column(given: str | None, usual: Sequence[str], columns: Sequence[str], what: str, where: str) -> str:
    column = next((name for name in ([given] if given else usual) if name in columns), None)
    if column is None:
        expected = repr(given) if given else f"one of {', '.join(usual)}"
        raise ValueError(f"{where}: found the columns {list(columns)}, expected {expected}; set data.{what}_column")
    return column


def _check_texts(texts: Sequence[object], column: str, where: str) -> None:
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{where}: row {number} has the {column} {text!r}, expected a text that is not empty; remove the row"
            )


def load_splits(
    source: Source,
    test_source: Source | None,
    fractions: Mapping[str, float],
    limits: Mapping[str, int | None],
    seed: int,
) -> dict[str, Dataset]:
    """The splits that a data set has: ``train`` and what is held out of it, and ``test``.

    Args:
        source: where ``train`` is read from, and ``test`` too where it has no source of its own.
        test_source: where ``test`` is read from.
        fractions: name of a split that is held out of train, to its fraction of train.
        limits: name of a split, ``test`` too, to the most samples of it; ``None`` for all.
        seed: seed of the cut, which depends on nothing else but train's size.

    Returns:
        Name to rows with the columns ``question`` and ``answer``, in the order of the source.

    Raises:
        ValueError: no split to train on, or nothing left of it.
    """
    data = source.load()
    if "train" not in data and (test_source is not None or "test" not in data):
        raise ValueError(f"{source.where} has the splits {sorted(data)}, expected 'train' among them")
    splits = _cut_train(source.texts(data, "train"), source.where, fractions, limits, seed) if "train" in data else {}
    tested, data = (test_source, test_source.load()) if test_source else (source, data)
    if "test" in data or test_source is not None:
        if "test" not in data and len(data) > 1:
            raise ValueError(
                f"{tested.where} has the splits {sorted(data)} and no 'test' among them: give the file of the one that "
                "is to be scored"
            )
        test = tested.texts(data, "test" if "test" in data else next(iter(data)))
        splits["test"] = test.select(sorted(_shuffled(len(test), seed)[: limits.get("test")]))
    return splits


def _cut_train(
    train: Dataset, path: str, fractions: Mapping[str, float], limits: Mapping[str, int | None], seed: int
) -> dict[str, Dataset]:
    order, splits = _shuffled(len(train), seed), {}
    for split, fraction in fractions.items():
        count = round(fraction * len(train))
        held_out, order = order[:count], order[count:]
        splits[split] = train.select(sorted(held_out[: limits.get(split)]))
    if not order:
        raise ValueError(
            f"{path} has {len(train)} training samples, too few for the fractions {dict(fractions)}; lower them"
        )
    return {**splits, "train": train.select(sorted(order))}


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
