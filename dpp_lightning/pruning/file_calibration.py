"""Calibration data from files: a model folder, and a text or batch file to feed it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.calibration.calibration_data import Objective
from dpp_lightning.calibration.distillation import IN_A_STEP, Distillation
from dpp_lightning.calibration.input_collector import collected_inputs
from dpp_lightning.calibration.output_change import output_change
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.calibration.padding import FROM_SAMPLES, Padding
from dpp_lightning.calibration.pieces import pieces_of, samples_of, training_pieces
from dpp_lightning.calibration.streamed_blocks import stream_blocks
from dpp_lightning.calibration.teacher import CannotTrain, blocks_in
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.pruning.calibration_batch import ModelClass, one_line, prepared, read_batch
from dpp_lightning.storage.quiet_loading import without_load_report
from dpp_lightning.tensors.devices import usable_device
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import named_tensors

SAMPLES = 64  # where no number is given
_AT_ONCE = 64  # examples of one forward pass


class FileCalibration:
    """Calibration by a model folder and a file, without labels: the inputs of the layers, and what a method fits by the
    change of the fine-tuned model's output (DAREx-q, objective e).

    The output is the logits, of whatever kind the model has them, or the last hidden state of a model without a head;
    padded places do not count. An encoder-decoder that is given text has each text as source and as target.

    Args:
        finetuned: the fine-tuned model's folder or hub id; its ``config.json`` names the architecture.
        data: a text file, one example a line, or ``.tsv`` with two texts a line, for the folder's tokenizer; or a
            ``.safetensors`` file with the model's inputs by name (``input_ids``, ``attention_mask``, ``pixel_values``
            …), first dimension the examples.
        samples: how many examples are used at most; None for 64.
        max_length: tokens of a text example at most.
        revision: of a hub id.
        device: where the model runs, such as ``cuda``.
        streamed: on that device are only the blocks that run, one after the other, and what is in no block; for
            training with ``loss=block``.
        blocks: where the model's blocks are, if names do not tell.

    Raises:
        FileNotFoundError: no such file or model.
        ValueError: an unknown kind of file, an empty one, one that does not hold what the model takes, or a folder that
            names no known architecture.
    """

    def __init__(
        self,
        finetuned: str | Path,
        data: str | Path,
        *,
        samples: int | None = None,
        max_length: int = 128,
        revision: str | None = None,
        device: str = "cpu",
        streamed: bool = False,
        blocks: Sequence[str] = (),
    ) -> None:
        samples = SAMPLES if samples is None else samples
        if samples < 1:
            raise ValueError(f"calibration needs at least 1 example, got {samples}")
        self.device, self.streamed, self.data = torch.device(usable_device(device)), streamed, Path(data)
        self.blocks = blocks
        if not self.data.is_file():
            raise FileNotFoundError(f"{data}: no such calibration file")
        self.model_class = ModelClass.of(str(finetuned), revision)
        self.batch = read_batch(self.model_class, self.data, samples, max_length)

    def layer_inputs(self, *, products: bool = False) -> dict[str, InputStatistics]:
        """What every weight of the fine-tuned model sees as input; loads the whole model.

        Args:
            products: with the products of every two features of a linear map.

        Raises:
            ValueError: the model cannot run on the data.
        """
        model, batch = self._ready()
        with collected_inputs(model, products=products) as collector, torch.no_grad():
            for piece in pieces_of(batch, _AT_ONCE):
                self._outputs(model, piece)
        return collector.statistics

    def objective(self, base: Mapping[str, Tensor], *, gradients: bool, distillation: bool = False) -> Objective:
        """The change of the fine-tuned model's output; loads the whole model.

        Args:
            base: canonical name to the base's value of every tensor that is pruned or reverted.
            gradients: the fit needs gradients.
            distillation: the fit trains.

        Raises:
            ValueError: the model that ``config.json`` names lacks such a tensor, it cannot run on the data, or the data
                cannot be cut into the pieces that gradients are taken of.
        """
        model, batch = self._ready()
        pieces = pieces_of(batch, _AT_ONCE)
        with torch.no_grad():
            reference = [output for piece in pieces for output in self._outputs(model, piece)]
        output = self._gradients(model, batch) if gradients else None
        training = self._training(model, batch) if distillation else None
        _load_base(model, base)

        @torch.no_grad()
        def change(candidate: SparseDelta) -> float:
            with candidate.applied(model, force=True):
                return output_change(reference, [o for piece in pieces for o in self._outputs(model, piece)])

        return Objective(change, gradients=output, distillation=training)

    def _training(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Distillation:
        """Training toward the model as it stands, on pieces of examples of similar length."""
        self._check_rows(batch, "trains on pieces of it", "take a method that does not train, such as 'importance'")
        pieces = training_pieces(batch, IN_A_STEP)
        return Distillation(
            model, pieces, lambda piece: self._outputs(model, piece), samples=samples_of(batch), blocks=self.blocks
        )

    def _ready(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The fine-tuned model and the batch as it takes it."""
        model = load_model(self.model_class)
        text = model.config.get_text_config()  # type: ignore[union-attr,operator]
        if getattr(text, "pad_token_id", None) is None:  # a classifier would refuse more than one example
            text.pad_token_id = _padding_token(self.batch)
        batch = prepared(model, self.batch)
        if self.streamed and self.device.type != "cpu":
            stream_blocks(model, blocks_in(model, self.blocks), self.device)
        else:
            model.to(self.device)
        return model, {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _gradients(self, model: nn.Module, batch: Mapping[str, Tensor]) -> BatchGradients:
        self._check_rows(batch, "takes gradients of pieces of it", "take a method that needs none, such as 'darex-q'")

        def forward(piece: Mapping[str, Tensor]) -> Tensor:
            outputs = self._outputs(model, piece)
            classes = {output.shape[-1] for output in outputs}
            return torch.cat([o.reshape(-1, o.shape[-1]) for o in outputs]) if len(classes) == 1 else outputs[0]

        return BatchGradients(model, batch, forward)

    def _check_rows(self, batch: Mapping[str, Tensor], why: str, cure: str) -> None:
        """Refuse a batch that holds more of some things (patches, images) than examples, where it must be cut."""
        rows = {name: len(tensor) for name, tensor in batch.items() if tensor.dim()}
        if len(set(rows.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise ValueError(
                f"{self.data} cannot be cut into pieces, as its tensors differ in rows ({counts}), and the method "
                f"{why}: {cure}"
            )

    def _outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs that are compared, without the places of padding."""
        try:
            result = model(**batch)
        except CannotTrain:
            raise
        except IndexError as error:
            raise ValueError(
                f"{self.data} has indices beyond a table of {type(model).__name__}, such as token ids of a larger "
                f"vocabulary or too many positions (given are {', '.join(batch)}): {one_line(error)}"
            ) from error
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{self.data} does not hold the inputs of {type(model).__name__} (given are {', '.join(batch)}; the "
                f"model takes {self.model_class.inputs}): {one_line(error)}"
            ) from error
        of_decoder = "decoder_input_ids" in self.model_class.takes and "input_ids" in batch
        mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
        if of_decoder and mask is None and "labels" in batch:
            mask = batch["labels"] != -100
        outputs = compared_outputs(result)
        if mask is None or mask.dim() != 2 or not bool(mask.any()):
            return list(outputs.values())
        padding = Padding(mask != 0, to_frames=getattr(model, FROM_SAMPLES, None))
        return [_without_padding(output, name, padding) for name, output in outputs.items()]


def compared_outputs(result: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name to the outputs of a model that say what it does: its logits, all of several kinds of them, as a model for
    questions or for pairs of image and text has; else its first output.

    Raises:
        ValueError: the model returns no tensor of floating point.
    """
    found = {n: t for n, t in result.items() if isinstance(t, Tensor) and t.is_floating_point() and t.dim()}
    if "logits" in found:
        return {"logits": found["logits"]}
    logits = {name: tensor for name, tensor in found.items() if "logits" in name}
    if not found:
        raise ValueError(f"the model returns no tensor that could be compared, but {', '.join(result) or 'nothing'}")
    return logits or dict([next(iter(found.items()))])


def _padding_token(batch: Mapping[str, Tensor]) -> int:
    """The token that stands where a batch is padded; -1, which is none, where it is not."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or mask is None or ids.shape != mask.shape or bool(mask.all()):
        return -1
    return int(ids[mask == 0][0])


def _without_padding(output: Tensor, name: str, padding: Padding) -> Tensor:
    """(samples, tokens, ...) without what is padding; (samples, classes) as it is."""
    of_tokens = output.dim() > 2 or (output.dim() == 2 and name != "logits" and output.shape == padding.keep.shape)
    keep = padding.of_input(output, tuple(output.shape[:2])) if of_tokens else None
    return output if keep is None else output[keep]


def load_model(model_class: ModelClass) -> nn.Module:
    """The fine-tuned model, for evaluation; warns of weights that its files lack.

    Raises:
        ValueError: it cannot be loaded.
    """
    source = model_class.source
    try:
        with without_load_report(bar=False):
            settings = {"revision": model_class.revision, "output_loading_info": True}
            model, info = model_class.kind.from_pretrained(source, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source}: transformers cannot load it for calibration: {one_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        warnings.warn(
            f"{source} lacks {len(missing)} weights of a {model_class.kind.__name__}, which are random in calibration: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}",
            stacklevel=3,
        )
    return model.eval()


@torch.no_grad()
def _load_base(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Give the model the base's values; of vocabularies of two sizes the rows in common."""
    named = {n.name: n for n in named_tensors(model)}
    names = match_names(base, named)
    missing = [name for name in base if name not in names]
    if missing:
        raise ValueError(f"the model that config.json names lacks tensors of the fine-tuned weights: {missing[:5]}")
    for name, name_in_model in names.items():
        whole, values = named[name_in_model].tensor, base[name]
        target = whole
        if target.shape != values.shape:
            rows = min(len(target), len(values))
            target, values = target[:rows], values[:rows]
        target.copy_(values)
        named[name_in_model].store(whole)
