"""A model's inputs by name, from a text file or a file of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.pruning.timm_model import TimmConfig, TimmModel, is_timm
from dpp_lightning.storage.locate import local_folder
from dpp_lightning.storage.safe_text import read_utf8
from dpp_lightning.storage.tokenizer_files import read_tokenizer

_TEXT, _PAIRS = (".txt", ".text", ".md"), ".tsv"
_ONE_ROW_EACH = (  # of those that go with the model's main input one by one
    "attention_mask",
    "token_type_ids",
    "labels",
    "decoder_input_ids",
    "decoder_attention_mask",
)
_TARGETS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


@dataclass(frozen=True)
class ModelClass:
    """What a folder's ``config.json`` says of the model.

    Attributes:
        source, revision: folder or hub id.
        kind: its class in transformers, or :class:`dpp_lightning.pruning.timm_model.TimmModel`.
        config: its configuration.
    """

    source: str
    revision: str | None
    kind: Any
    config: Any

    @classmethod
    def of(cls, source: str, revision: str | None) -> ModelClass:
        """Read a folder's or repository's ``config.json``.

        Raises:
            FileNotFoundError: no such folder or repository.
            ValueError: a file of weights, no ``config.json``, or one that names no architecture of transformers.
        """
        import transformers

        if Path(source).is_file():
            raise ValueError(
                f"{source} is a file of weights: calibration runs the fine-tuned model, so it must be a folder or hub "
                "id with its config.json; dpp export makes one of a checkpoint"
            )
        if not (local_folder(source, revision, ["config.json"]) / "config.json").is_file():
            raise ValueError(f"{source} has no config.json, which calibration needs to run the fine-tuned model")
        if is_timm(source, revision):
            return cls(source, revision, TimmModel, TimmConfig())
        try:
            config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source}: transformers cannot read its config.json: {one_line(error)}") from error
        names = getattr(config, "architectures", None) or []
        kind = getattr(transformers, names[0], None) if names else None
        if kind is None:
            raise ValueError(
                f"{source}: config.json names no architecture of transformers (architectures: {names}), so that "
                "calibration cannot run the model; take Calibration(...) in Python, or a method without data"
            )
        return cls(source, revision, kind, config)

    @cached_property
    def takes(self) -> list[str]:
        """Names of the inputs of its ``forward``."""
        parameters = inspect.signature(self.kind.forward).parameters.values()
        return [p.name for p in parameters if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]

    @property
    def inputs(self) -> str:
        """Those that are tensors of examples, for a message."""
        told = ("input", "mask", "pixel", "decoder_input_ids", "labels", "token_type", "grid_thw", "bbox")
        return ", ".join(name for name in self.takes if any(part in name for part in told) and "embeds" not in name)


def read_batch(model: ModelClass, data: Path, samples: int, max_length: int) -> dict[str, Tensor]:
    """A model's inputs by name from a text or batch file, at most ``samples`` examples.

    Args:
        model: what they are for.
        data: text, one example a line, ``.tsv`` with two texts a line, or a ``.safetensors`` file of tensors whose
            first dimension is the examples.
        samples: how many are used at most.
        max_length: tokens of a text example at most; the model's own limits go before it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown kind of file, an empty one, tensors that the model does not take or that do not go
            together, or text for a model that takes none or has no tokenizer.
    """
    if not data.is_file():
        raise FileNotFoundError(f"{data}: no such calibration file")
    if data.suffix == ".safetensors":
        return _first_rows(_read_tensors(model, data), model, data, samples)
    if data.suffix not in (*_TEXT, _PAIRS):
        raise ValueError(
            f"{data}: calibration data is text ({', '.join(_TEXT)}), pairs of texts ({_PAIRS}) or a batch in "
            ".safetensors"
        )
    text = read_utf8(data).replace("\r\n", "\n").replace("\r", "\n")  # other breaks are part of a text
    lines = [line.strip() for line in text.split("\n") if line.strip()][:samples]
    if not lines:
        raise ValueError(f"{data} has no text in it")
    columns = [lines] if data.suffix in _TEXT else _two_columns(lines, data)
    return _tokens(model, data, columns, max_length)


def _two_columns(lines: list[str], data: Path) -> list[list[str]]:
    """First and second texts of lines with a tab between them."""
    pairs = [line.split("\t") for line in lines]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2 or not all(text.strip() for text in pair):
            raise ValueError(
                f"{data}: text {number} has {len(pair)} columns, and {_PAIRS} holds two texts a line with a tab "
                "between; for single texts take .txt"
            )
    return [[pair[0].strip() for pair in pairs], [pair[1].strip() for pair in pairs]]


def prepared(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch as the model takes it: floating point in the model's dtype, and targets for an encoder-decoder.

    An encoder-decoder that is given no targets gets its own input as target, shifted by its start token.

    Raises:
        ValueError: it has no start token.
    """
    ready = {}
    for name, tensor in batch.items():
        whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
        ready[name] = tensor.long() if whole else tensor.to(model.dtype) if tensor.is_floating_point() else tensor  # type: ignore[arg-type]
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", getattr(model, "_shift_right", None))
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    if not encoder_decoder or shift is None or "input_ids" not in ready or any(name in ready for name in _TARGETS):
        return ready
    try:
        ready["decoder_input_ids"] = shift(ready["input_ids"])
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the decoder of {type(model).__name__} has no first token ({one_line(error)}): name a "
            "decoder_start_token_id in config.json, or give decoder_input_ids in a file of tensors"
        ) from error
    ready["decoder_attention_mask"] = ready.get("attention_mask", torch.ones_like(ready["input_ids"]))
    return ready


def one_line(error: BaseException) -> str:
    """What an error says, its first sentences in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def _read_tensors(model: ModelClass, data: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        batch = load_file(data)
    except SafetensorError as error:
        raise ValueError(f"{data} is no file of tensors: {one_line(error)}") from error
    if not batch:
        raise ValueError(f"{data} holds no tensor; {model.kind.__name__} takes {model.inputs}")
    unknown = [name for name in batch if name not in model.takes]
    if unknown:
        raise ValueError(
            f"{data} holds {', '.join(unknown)}, which {model.kind.__name__} does not take; it takes {model.inputs}"
        )
    return batch


def _first_rows(batch: dict[str, Tensor], model: ModelClass, data: Path, samples: int) -> dict[str, Tensor]:
    """The first examples; of a batch that holds more of some things (patches, images) than examples all of it."""
    rows = {name: len(tensor) for name, tensor in batch.items() if tensor.dim()}
    main = model.kind.main_input_name if model.kind.main_input_name in rows else next(iter(rows), "")
    for name in _ONE_ROW_EACH:
        if main and rows.get(name, rows[main]) != rows[main]:
            raise ValueError(
                f"{data}: {main} has {rows[main]} rows and {name} {rows[name]}; the first dimension is the examples"
            )
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in model.takes
    if encoder_decoder and "input_ids" not in batch and not any(name in batch for name in _TARGETS):
        raise ValueError(
            f"{data} holds {', '.join(batch)}, and {model.kind.__name__} is an encoder-decoder: it needs "
            "decoder_input_ids or labels too"
        )
    if len(set(rows.values())) <= 1:
        return {name: tensor[:samples] if tensor.dim() else tensor for name, tensor in batch.items()}
    if rows[main] > samples:
        counts = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise ValueError(
            f"{data} holds {rows[main]} examples, of which {samples} would be used, but its tensors differ in rows "
            f"({counts}), so that it cannot be cut: raise --calibration_samples, or give a batch of as many"
        )
    return batch


def _tokens(model: ModelClass, data: Path, columns: list[list[str]], max_length: int) -> dict[str, Tensor]:
    cure = f"give a .safetensors batch with the model's inputs by name ({model.inputs})"
    if "input_ids" not in model.takes:
        raise ValueError(f"{data} is text, which {model.kind.__name__} does not take: {cure}")
    try:
        tokenizer = read_tokenizer(model.source, model.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{data} is text, and {model.source} has no tokenizer that transformers can load: {cure}; "
            f"transformers says: {one_line(error)}"
        ) from error
    if tokenizer.pad_token is None:  # which token it is plays no part, since padding is masked
        tokenizer.pad_token = (
            tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [max_length, tokenizer.model_max_length, *([positions] if positions else [])]
    length = min(limit for limit in limits if limit > 0)  # XLNet's is -1: it has none
    batch = tokenizer(*columns, padding=True, truncation=True, max_length=length, return_tensors="pt")
    if set(batch["input_ids"].flatten().tolist()) <= set(tokenizer.all_special_ids):  # transformers may make one up
        raise ValueError(
            f"{data} is text, of which the tokenizer of {model.source} knows no word; if its files are missing there, "
            f"copy them to the model's, or {cure}"
        )
    return {name: tensor for name, tensor in batch.items() if name in model.takes}
