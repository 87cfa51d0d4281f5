"""Calibration data from files: a model folder, and a text or batch file to feed it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.calibration.calibration_data import Objective
from dpp_lightning.calibration.input_collector import collected_inputs
from dpp_lightning.calibration.output_change import output_change
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.tensors.names import canonical_tensors, match_names

_TEXT = (".txt", ".text", ".md")


class FileCalibration:
    """Calibration by a model folder and a file, without labels: the inputs of the layers, and what a method fits by the
    change of the fine-tuned model's output (DAREx-q, objective e).

    The output is the logits, or the last hidden state of a model without a head; padded places do not count.

    Args:
        finetuned: the fine-tuned model's folder or hub id; its ``config.json`` names the architecture.
        data: a text file, one example a line, for the folder's tokenizer; or a ``.safetensors`` file with the model's
            inputs by name (``input_ids``, ``attention_mask``, ``pixel_values`` …), first dimension the examples.
        samples: how many examples are used at most.
        max_length: tokens of a text example at most.
        revision: of a hub id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown kind of file, an empty one, or a folder that names no known architecture.
    """

    def __init__(
        self,
        finetuned: str | Path,
        data: str | Path,
        *,
        samples: int = 64,
        max_length: int = 128,
        revision: str | None = None,
    ) -> None:
        if samples < 1:
            raise ValueError(f"calibration needs at least 1 example, got {samples}")
        self.source, self.revision = str(finetuned), revision
        self.batch = read_batch(self.source, Path(data), samples, max_length, revision)

    def layer_inputs(self) -> dict[str, InputStatistics]:
        """What every weight of the fine-tuned model sees as input; loads the whole model."""
        model = load_model(self.source, self.revision)
        with collected_inputs(model) as collector:
            self._outputs(model)
        return collector.statistics

    def objective(self, base: Mapping[str, Tensor], *, gradients: bool) -> Objective:
        """The change of the fine-tuned model's output; loads the whole model.

        Args:
            base: canonical name to the base's value of every tensor that is pruned or reverted.
            gradients: the fit needs gradients.

        Raises:
            ValueError: the model that ``config.json`` names lacks such a tensor.
        """
        model = load_model(self.source, self.revision)
        reference = self._outputs(model)
        output = BatchGradients(model, self.batch, partial(_logits, model)) if gradients else None
        _load_base(model, base)

        def change(candidate: SparseDelta) -> float:
            with candidate.applied(model, force=True):
                return output_change(reference, self._outputs(model))

        return Objective(change, gradients=output)

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        output = _logits(model, self.batch)
        mask = self.batch.get("attention_mask")
        places = mask is not None and output.dim() == 3 and output.shape[:2] == mask.shape
        return [output[mask.bool()] if places and mask is not None else output]


def read_batch(source: str, data: Path, samples: int, max_length: int, revision: str | None) -> dict[str, Tensor]:
    """A model's inputs by name from a text or batch file; arguments and errors as :class:`FileCalibration`."""
    if not data.is_file():
        raise FileNotFoundError(f"{data}: no such calibration file")
    if data.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: tensor[:samples] for name, tensor in load_file(data).items()}
    if data.suffix not in _TEXT:
        raise ValueError(f"{data}: calibration data is text ({', '.join(_TEXT)}) or a batch in .safetensors")
    lines = [line.strip() for line in data.read_text(encoding="utf-8").splitlines() if line.strip()][:samples]
    if not lines:
        raise ValueError(f"{data} has no text in it")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return dict(tokenizer(lines, padding=True, truncation=True, max_length=max_length, return_tensors="pt"))


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    result = model(**batch)
    return result["logits"] if "logits" in result else next(iter(result.values()))


def load_model(source: str, revision: str | None) -> nn.Module:
    """The model that a folder's ``config.json`` names, for evaluation.

    Raises:
        ValueError: it names no architecture of transformers.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, revision=revision)
    names = getattr(config, "architectures", None) or []
    kind: Any = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(f"{source}: config.json names no architecture of transformers (architectures: {names})")
    return kind.from_pretrained(source, revision=revision).eval()


@torch.no_grad()
def _load_base(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Give the model the base's values; of vocabularies of two sizes the rows in common."""
    tensors: Mapping[str, Tensor] = canonical_tensors(model)
    names = match_names(base, tensors)
    missing = [name for name in base if name not in names]
    if missing:
        raise ValueError(f"the model that config.json names lacks tensors of the fine-tuned weights: {missing[:5]}")
    for name, name_in_model in names.items():
        target, values = tensors[name_in_model], base[name]
        if target.shape != values.shape:
            rows = min(len(target), len(values))
            target, values = target[:rows], values[:rows]
        target.copy_(values)
