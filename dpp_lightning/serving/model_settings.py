"""What belongs to a fine-tuned model beside its weights and decides what comes out: labels, generation, tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from torch import nn

from dpp_lightning.storage.file_content import read_json_object
from dpp_lightning.storage.locate import few_names
from dpp_lightning.storage.model_configuration import CONFIG, OF_ANSWERS, other_settings
from dpp_lightning.storage.model_folder import copy_files, is_tokenizer_file
from dpp_lightning.tensors.interrupts import restored_after

_GENERATION = "generation_config.json"
_TOKENIZER_SETTINGS = (
    "model_max_length", "padding_side", "truncation_side", "special_tokens_map", "chat_template", "model_input_names",
)  # fmt: skip


class Pool(Protocol):
    """What is needed of a :class:`dpp_lightning.serving.delta_pool.DeltaPool`."""

    model: nn.Module

    def use(self, name: str | None) -> AbstractContextManager[nn.Module]:
        """The model with one delta."""

    def side_files(self, name: str) -> Mapping[str, Path | None]:
        """What a delta says of the files beside its weights."""


@dataclass(frozen=True)
class ModelSettings:
    """Of a model all that decides, with its weights, what a pipeline answers.

    Attributes:
        config: attributes of its configuration: labels, problem type, padding token.
        generation: its generation settings; None where it generates nothing.
        tokenizer: of transformers; None for models of other inputs.
    """

    config: dict[str, Any]
    generation: Any
    tokenizer: Any

    @contextmanager
    def put_on(self, model: Any) -> Iterator[None]:
        """The model with these settings, but for the tokenizer, while the block runs.

        Args:
            model: of transformers.
        """
        before = {name: getattr(model.config, name, None) for name in self.config}
        generation = getattr(model, "generation_config", None)

        def put_back() -> None:
            _put(model, before, generation)

        with restored_after(put_back):
            _put(model, self.config, self.generation)
            yield


class SettingsReader:
    """Reads what the folders of a pool's deltas say of their models; each is read once.

    Args:
        pool: over a model of transformers.
        tokenizer: of the base; None for models of other inputs.
    """

    def __init__(self, pool: Pool, tokenizer: Any) -> None:
        self._pool, model = pool, pool.model
        self._config: Any = model.config
        own = {name: getattr(self._config, name, None) for name in OF_ANSWERS}
        self._base = ModelSettings(own, getattr(model, "generation_config", None), tokenizer)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        self._known: dict[str, ModelSettings] = {}

    def of(self, name: str | None) -> ModelSettings:
        """The settings of a delta, those of the base for None. Deltas with equal settings share one object.

        A delta without a ``config.json`` of its own has labels ``LABEL_0``, ``LABEL_1``, …, as many as its head has.
        What its folder says and the pool's model cannot follow, such as another activation, is a warning that names it.

        Args:
            name: one of the pool's names.

        Raises:
            ValueError: an unknown name, or files that cannot be read.
        """
        if name is None:
            return self._base
        if name not in self._known:
            read = self._read(name)
            same = [known for known in (self._base, *self._known.values()) if known == read]
            self._known[name] = same[0] if same else read
        return self._known[name]

    def _read(self, name: str) -> ModelSettings:
        files = self._pool.side_files(name)
        of_tokenizer = {file: path for file, path in files.items() if is_tokenizer_file(file)}
        rest = [f for f, path in files.items() if path and f not in (*of_tokenizer, CONFIG, _GENERATION)]
        if rest:
            warnings.warn(f"the pipeline does not use the {few_names(rest)} of the delta {name}", stacklevel=2)
        config = self._read_config(name, files.get(CONFIG))
        generation = self._base.generation
        if generation is not None and _GENERATION in files:
            generation = _read_generation(files[_GENERATION], config)
        tokenizer = self._base.tokenizer
        if tokenizer is not None and of_tokenizer:
            tokenizer = self._same_or(_with_files(tokenizer, of_tokenizer, name))
        return ModelSettings({key: getattr(config, key, None) for key in OF_ANSWERS}, generation, tokenizer)

    def _read_config(self, name: str, path: Path | None) -> Any:
        """The configuration of a fine-tuned model, of the base's class."""
        kind = type(self._config)
        if path is None:
            config = kind.from_dict(self._config.to_dict())
            config.num_labels, config.problem_type = self._count_labels(name), None
            config.id2label = {number: f"LABEL_{number}" for number in range(config.num_labels)}
            config.label2id = {label: number for number, label in config.id2label.items()}
            return config
        config = kind.from_dict(read_json_object(path))
        if others := other_settings(config.to_dict(), self._config.to_dict()):
            warnings.warn(
                f"config.json of the delta {name} has another {few_names(others)} than the pool's model, which keeps "
                "its own: answers differ from those of the fine-tuned model that dpp apply writes",
                stacklevel=2,
            )
        return config

    def _count_labels(self, name: str) -> int:
        """How many labels the head of a delta has: the rows of the tensors that in the base have one for each label."""
        labels = len(self._config.id2label)
        with self._pool.use(name) as model:
            rows = {
                len(tensor)
                for key, tensor in model.named_parameters()
                if self._shapes[key][:1] == (labels,) and tuple(tensor.shape) != self._shapes[key]
            }
        return rows.pop() if len(rows) == 1 else labels

    def _same_or(self, tokenizer: Any) -> Any:
        """A tokenizer that is known and does the same, or this one."""
        known = [self._base.tokenizer, *(settings.tokenizer for settings in self._known.values())]
        return next((other for other in known if _describe(other) == _describe(tokenizer)), tokenizer)


def _put(model: Any, config: Mapping[str, Any], generation: Any) -> None:
    for name, value in config.items():
        setattr(model.config, name, value)
    if generation is not None:
        model.generation_config = generation


def _read_generation(path: Path | None, config: Any) -> Any:
    """The generation settings of a file; where the fine-tuned model has none, what its configuration says."""
    from transformers import GenerationConfig

    if path is None:
        return GenerationConfig.from_model_config(config)
    return GenerationConfig.from_dict(read_json_object(path))


def _with_files(tokenizer: Any, files: Mapping[str, Path | None], name: str) -> Any:
    """The tokenizer that a delta's files make of the base's.

    Args:
        tokenizer: of the base.
        files: the delta's, by name; None for those of the base that are absent.
        name: of the delta, for the message.

    Raises:
        ValueError: they cannot be loaded.
    """
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        settings = files.get("tokenizer_config.json")
        if settings is not None and "chat_template" in read_json_object(settings):
            (Path(folder) / "chat_template.jinja").unlink(missing_ok=True)  # which would win over it
        for file in (file for file, path in files.items() if path is None):
            (Path(folder) / file).unlink(missing_ok=True)
        copy_files(files, Path(folder))
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer of the delta {name} cannot be loaded: {reason}") from error


def _describe(tokenizer: Any) -> tuple[Any, ...]:
    """What is equal for tokenizers that do the same."""
    if getattr(tokenizer, "is_fast", False):
        words = json.loads(tokenizer.backend_tokenizer.to_str())
        words |= {"truncation": None, "padding": None}  # which calls leave there
    else:
        words = tokenizer.get_vocab()
    return type(tokenizer), words, *(getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS)
