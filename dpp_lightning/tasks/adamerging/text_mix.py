"""Plain texts of several tasks as unlabelled batches, for AdaMerging of any model with a tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from dpp_lightning.storage.locate import local_path
from dpp_lightning.storage.source_kind import check_data_file
from dpp_lightning.tasks.common.data import module_attribute
from dpp_lightning.tasks.common.dataset_source import load_data
from dpp_lightning.tasks.common.pretrained import PRETRAINED, load_tokenizer

_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class TextMixDataModule(LightningDataModule):
    """Unlabelled texts for AdaMergingModule: a training batch is task to a batch of tokens.

    Args:
        files: task to a file: ``.txt`` (one text in each line), ``.json``, ``.jsonl`` or ``.parquet``.
        column: column of JSON and parquet files that holds the text.
        tokenizer: hub id or local folder; by default the module's ``pretrained``.
        batch_size: texts of each task in a batch.
        max_length: texts are cut to this many tokens.
        num_workers: loader processes.

    Raises:
        ValueError: a file of another kind; in ``setup``: a missing column, a file without texts, no tokenizer.
        FileNotFoundError: a file that does not exist.
    """

    def __init__(
        self,
        files: dict[str, str],
        column: str = "text",
        tokenizer: str | None = None,
        batch_size: int = 16,
        max_length: int = 128,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for task, file in files.items():
            if Path(file).suffix not in _LOADERS:
                raise ValueError(f"data.files.{task} {file}: expected a file ending in {', '.join(_LOADERS)}")
            check_data_file(file, f"data.files.{task}")
        self.files, self.column, self.tokenizer = files, column, tokenizer
        self.batch_size, self.max_length, self.num_workers = batch_size, max_length, num_workers
        self.texts: dict[str, Dataset] = {}
        self._collate: DataCollatorWithPadding | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise every file."""
        if self.texts:
            return
        tokenizer = self._load_tokenizer()
        for task, file in self.files.items():
            argument, files = f"data.files.{task}", {"train": str(local_path(file))}
            data = load_data(_LOADERS[Path(file).suffix], files=files, source=file, argument=argument)["train"]
            if self.column not in data.column_names:
                raise ValueError(f"{argument} {file} has the columns {data.column_names}, expected {self.column!r}")
            data = data.filter(lambda row: bool(row[self.column] and row[self.column].strip()))
            if not len(data):
                raise ValueError(f"{argument} {file} holds no text")
            self.texts[task] = data.map(
                lambda rows: dict(tokenizer(rows[self.column], truncation=True, max_length=self.max_length)),
                batched=True,
                remove_columns=data.column_names,
            )
        self._collate = DataCollatorWithPadding(tokenizer)

    def train_dataloader(self) -> Mapping[str, DataLoader[Any]]:
        """Shuffled batches (``input_ids``, ``attention_mask``) of every task; smaller files start again until the
        largest ends."""
        return {
            task: DataLoader(
                data,  # type: ignore[arg-type]
                batch_size=self.batch_size,
                shuffle=True,
                num_workers=self.num_workers,
                collate_fn=self._collate,
            )
            for task, data in self.texts.items()
        }

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        pretrained = module_attribute(self.trainer, "pretrained")
        if self.tokenizer is None and pretrained is None:
            raise ValueError("TextMixDataModule needs tokenizer=..., as the module it is used with has no 'pretrained'")
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer, None, "data.tokenizer")
        else:
            tokenizer = load_tokenizer(pretrained, module_attribute(self.trainer, "revision"), PRETRAINED)
        if tokenizer.pad_token is None:  # padding is masked, so that any token will do
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
