"""A two-layer BERT, its tokenizer and GLUE-like data, made in a folder: everything a GLUE fit needs, without network."""

import random
from pathlib import Path

import lightning.pytorch as pl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dpp_lightning.tasks.glue.task_table import TASKS

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = tuple(f"w{i}" for i in range(40))


def make_tokenizer(folder: Path, max_length: int = 128) -> None:
    """Save a whitespace tokenizer with BERT's special tokens."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def bert_config(**settings) -> BertConfig:
    """A BERT of two layers and width 16, with weights large enough for its output to depend on its input."""
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.3,
    }
    return BertConfig(vocab_size=len(SPECIAL + WORDS), max_position_embeddings=128, **{**small, **settings})


def make_model(folder: Path, cls=BertModel, config=None, seed=0, **settings) -> str:
    """Save a seeded base and its tokenizer; returns the folder's name."""
    pl.seed_everything(seed, verbose=False)
    cls(config or bert_config(), **settings).save_pretrained(folder)
    make_tokenizer(folder)
    return str(folder)


def make_rows(task: str, n: int, seed: int) -> dict[str, list]:
    """Texts of 6 to 20 words whose label is the part of the vocabulary that the words come from: easy to learn."""
    rng = random.Random(f"{task} {seed}")
    definition = TASKS[task]
    low, high = definition.label_range
    labels = [rng.uniform(low, high) if definition.num_labels == 1 else rng.randint(low, high) for _ in range(n)]
    columns: dict[str, list] = {name: [] for name in definition.columns}
    for label in labels:
        start = int((label - low) / (high - low) * (len(WORDS) - 12))
        for texts in columns.values():
            texts.append(" ".join(rng.choices(WORDS[start : start + 12], k=rng.randint(6, 20))))
    return {**columns, "label": labels, "idx": list(range(n))}


def make_data(folder: Path, task: str, n_train: int = 80, n_test: int = 20, **columns: list) -> str:
    """Write the parquet files of one task in the hub's layout; ``columns`` replace those of every split."""
    for number, (split, n) in enumerate([("train", n_train), *((s, n_test) for s in TASKS[task].evaluation)]):
        rows = {**make_rows(task, n, number), **{name: values[:n] for name, values in columns.items()}}
        path = folder / task / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows).to_parquet(path)
    return str(folder)


def make_trainer(folder: Path, **settings) -> pl.Trainer:
    """A silent Trainer on one CPU."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": folder, **quiet, **settings})
