"""The model that dpp eval scores: a dense one, or a base with a delta put onto it, with the files of the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dpp_lightning.checkpoints import side_files
from dpp_lightning.delta import SparseDelta
from dpp_lightning.delta_reader import DeltaReader
from dpp_lightning.exporting import dense_side_files
from dpp_lightning.merge_tasks import of_task, task_names
from dpp_lightning.names import canonical_names


def read_delta(folder: str, task: str | None) -> SparseDelta:
    """The delta, of a merged one as ``task`` uses it; refused here where a task must be chosen."""
    delta = SparseDelta.from_pretrained(folder)
    of_task(delta.info, delta.carried, task)
    return delta.for_task(task) if task else delta


@contextmanager
def side_folder(model: str, delta: str | None, task: str | None) -> Iterator[str]:
    """Where configuration and tokenizer are: the model's own place, or the files that ``dpp apply`` would write.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it has no ``config.json``.
    """
    if "config.json" not in side_files(model):
        raise ValueError(f"{model} has no config.json: expected a folder in Hugging Face's layout or a hub id")
    if delta is None:
        yield model
        return
    tasks = task_names(DeltaReader.open(delta).info)
    with TemporaryDirectory() as folder:
        for name, path in dense_side_files(model, None, delta, None, tasks, task).items():
            (Path(folder) / name).write_bytes(path.read_bytes())
        yield folder


def load_tokenizer(folder: str, chat: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat and not tokenizer.chat_template:
        raise ValueError("--apply-chat-template: the tokenizer has no chat template; leave the option out")
    return tokenizer


def load_model(source: str, delta: SparseDelta | None, folder: str, dtype: str | None) -> Any:
    """A causal language model, with the delta put onto it in the checkpoint's own dtype and only then cast.

    Args:
        source: folder or hub id of the base, or of a dense model where there is no delta.
        delta: put on for good, since the model is not used as a base again.
        folder: as :func:`side_folder` gives it.
        dtype: of the weights; None for the one that the configuration names.

    Raises:
        ValueError: a delta of another base, or weights without the tensors of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    own, config = AutoConfig.from_pretrained(source), AutoConfig.from_pretrained(folder)
    final, rows = dtype or config.dtype, config.get_text_config().vocab_size
    if delta is not None:  # the base as it is: the delta is checked against its values and may add rows
        config.dtype, config.get_text_config().vocab_size = own.dtype, own.get_text_config().vocab_size
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=dtype if dtype and delta is None else "auto", output_loading_info=True
    )
    model, carried = loaded[0], delta.carried if delta else {}
    canonical = canonical_names(model)
    missing = sorted(name for name in loaded[1]["missing_keys"] if canonical.get(name) not in carried)
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}: expected a causal "
            "language model (a classifier is scored by dpp test)"
        )
    if delta is None:
        return model
    if model.get_input_embeddings().num_embeddings != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    delta.apply_(model)
    for parameter in [p for p in model.parameters() if final and p.dtype == model.dtype]:
        parameter.data = parameter.data.to(getattr(torch, str(final).removeprefix("torch.")))
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
