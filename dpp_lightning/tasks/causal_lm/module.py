"""Fine-tuning a decoder on worked answers, scored by what it generates: the papers' math task."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpp_lightning.calibration.output_change import resolve_layer
from dpp_lightning.optim import AdamR
from dpp_lightning.storage.quiet_loading import without_load_report
from dpp_lightning.tasks.causal_lm.generation import generate_texts
from dpp_lightning.tasks.causal_lm.packing import check_packing_isolates
from dpp_lightning.tasks.causal_lm.sample_log import log_samples
from dpp_lightning.tasks.causal_lm.scores import CausalScores, answer_loss, final_answers
from dpp_lightning.tasks.common.lora import LoRA
from dpp_lightning.tasks.common.module import FineTuningModule
from dpp_lightning.tasks.common.optimization import Schedule
from dpp_lightning.tasks.common.pretrained import PRETRAINED, check_pretrained, load_tokenizer, loading
from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL

_CALIBRATION_SAMPLES = 8  # in one forward: the logits of a large vocabulary take much memory


class CausalLMModule(FineTuningModule):
    """A pre-trained decoder, trained on the answers to questions and scored by exact match of what it generates.

    Logs ``val_score`` (fraction of generated final answers that equal the reference's, in [0, 1]), its standard error
    ``val_score_stderr``, ``val_answered`` (fraction with a final answer at all) and ``val_loss`` (cross entropy per
    token of the answers), over the whole split and all ranks; the same as ``test_...``.

    Args:
        pretrained: hub id or local folder of the base; with ``dpp validate`` or ``test`` the model that is scored.
        revision: branch, tag or commit on the hub.
        tokenizer: hub id or local folder; by default the base's.
        dtype: dtype of the weights in memory; AdamW and AdamR lose small updates in bfloat16, so train in float32 with
            ``trainer.precision: bf16-mixed``.
        attention: transformers' name of the attention, such as ``sdpa`` or ``flash_attention_2``; default its choice.
        optimizer: makes the optimizer from the groups of ``dpp_lightning.tasks.common.optimization.parameter_groups``.
        scheduler: ``linear`` (warm-up, then down to 0), ``constant`` (neither), or what makes a scheduler.
        scheduler_interval: whether a scheduler that you name is stepped each ``step`` or each ``epoch``.
        warmup_fraction: fraction of all steps, in [0, 1], that ``linear`` warms up in.
        lora: train adapters with the base frozen; by default everything is trained.
        gradient_checkpointing: compute activations twice to save memory.
        compile: train through ``torch.compile``.
        evaluate_by: ``generation`` scores by exact match; ``loss`` logs the loss alone, which is fast.
        max_new_tokens: most tokens of a generated answer, at least 1.
        stop_strings: texts that end a generated answer.
        logged_samples: generated texts of each validation that go to the loggers.
        seed: seed of dropout and adapters; by default the one of ``seed_everything``, else 0.

    Attributes:
        new_parameter_names: empty; AdamR pulls adapters to their initial values, as it does the base's parameters.
        output_layer: submodule whose output is the last hidden representation, e.g. ``model.model.norm``.

    Raises:
        ValueError: a base without all of the decoder's weights, or that cannot compute activations twice; a setting
            outside its range; adapters for layers that the base does not have.
        FileNotFoundError: no such base or tokenizer.
    """

    def __init__(
        self,
        pretrained: str = "Qwen/Qwen2-0.5B",
        revision: str | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: str | None = None,
        optimizer: OptimizerCallable = AdamR,
        scheduler: Schedule = "linear",
        scheduler_interval: Literal["step", "epoch"] = "step",
        warmup_fraction: float = 0.03,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        evaluate_by: Literal["generation", "loss"] = "generation",
        max_new_tokens: int = 512,
        stop_strings: list[str] | None = None,
        logged_samples: int = 4,
        seed: int | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, scheduler_interval, warmup_fraction, seed)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1, such as 512")
        self.pretrained, self.revision = pretrained, revision
        self.evaluate_by, self.max_new_tokens = evaluate_by, max_new_tokens
        self.stop_strings, self.logged_samples = list(stop_strings or ()), logged_samples
        self.save_hyperparameters("pretrained", "revision", "seed")
        self.lora = LoRA.from_setting(lora)
        self.hparams["lora"] = self.lora.plain() if self.lora else None  # a checkpoint holds plain values alone
        source = check_pretrained(pretrained, revision)
        named = (pretrained, revision, PRETRAINED) if tokenizer is None else (tokenizer, None, "model.tokenizer")
        self.tokenizer = load_tokenizer(*named)
        model = _load(source, revision, dtype, attention)
        self.set_model(model, (), _last_hidden_layer(model), gradient_checkpointing, self.lora, "CAUSAL_LM")
        # in a list: as a submodule it would give every parameter a second name. Generation uses the plain model, as the
        # compiler would start again for each of its many shapes
        self._trained = [torch.compile(self.model) if compile else self.model]
        self.metrics = nn.ModuleDict({split: CausalScores() for split in ("val", "test")})
        self._generated: list[dict[str, Any]] = []

    @property
    def max_length(self) -> int | None:
        """Most tokens that the model takes; ``None`` where its config does not say."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return limit if limit and limit > 0 else None

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits (samples, tokens, vocabulary) of a batch of tokens, 0 at padding."""
        logits = self.model(**_inputs(batch), use_cache=False).logits
        mask = batch.get("attention_mask")
        return cast(Tensor, logits if mask is None else logits.masked_fill(mask[..., None] == 0, 0.0))

    def on_fit_start(self) -> None:
        """Check, where the data packs samples, that none attends to another in this model."""
        if getattr(self.trainer.datamodule, "packing", False):  # type: ignore[attr-defined]
            tokens = range(min(5, cast(Any, self.model).config.vocab_size))
            with self.trainer.precision_plugin.forward_context():
                check_packing_isolates(self.model, [*tokens], [*reversed(tokens)])

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy per token of the answers."""
        logits = self._trained[0](**_inputs(batch), use_cache=False).logits
        total, count = answer_loss(logits, batch["labels"])
        loss = total / count.clamp(min=1)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[str]:
        """Generated answers, one text for each sample."""
        return self.generate(batch)

    def generate(self, batch: Mapping[str, Any]) -> list[str]:
        """Greedy answers to the prompts of a batch, one text for each sample."""
        return generate_texts(
            self.model,
            self.tokenizer,
            batch["prompt_ids"],
            batch["prompt_mask"],
            self.max_new_tokens,
            self.stop_strings,
        )

    def calibration_steps(self, batch: Mapping[str, Any]) -> Iterator[Tensor]:
        """Run the model on a batch, a few samples at a time, so that hooks see the outputs of its layers.

        Args:
            batch: as ``InstructionDataModule.calibration_dataloader`` gives it.

        Yields:
            After each forward a mask (samples, tokens), true where a token is no padding.
        """
        names = ("input_ids", "attention_mask")
        for start in range(0, len(batch["input_ids"]), _CALIBRATION_SAMPLES):
            piece = {name: batch[name][start : start + _CALIBRATION_SAMPLES] for name in names}
            length = int(piece["attention_mask"].sum(dim=1).max())
            piece = {name: tokens[:, :length] for name, tokens in piece.items()}
            self.model(**piece, use_cache=False)
            yield piece["attention_mask"].bool()

    def start_scoring(self, split: str) -> None:
        """Forget the batches, and the generated texts, of earlier passes."""
        super().start_scoring(split)
        self._generated = []

    def score_batch(self, split: str, batch: Mapping[str, Any], dataloader_idx: int = 0) -> None:
        """Add a batch's loss, and where texts are generated their final answers, to its scores."""
        scores = self.scores(split, dataloader_idx)
        real: Tensor = batch["real"]
        labels = batch["labels"].masked_fill(~real[:, None], IGNORED_LABEL)
        logits = self.model(**_inputs(batch), use_cache=False).logits
        losses = answer_loss(logits, labels)
        del logits  # generation needs the memory
        answers: list[tuple[str | None, str]] = []
        if self.evaluate_by == "generation":
            texts = self.generate(batch)
            counted = [i for i, is_real in enumerate(real.tolist()) if is_real]
            references = [batch["references"][i] for i in counted]
            answers = final_answers([texts[i] for i in counted], references)
            if split == "val" and len(self._generated) < self.logged_samples:
                prompts = self.tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
                rows = zip((prompts[i] for i in counted), (texts[i] for i in counted), references, strict=True)
                self._generated += [{"prompt": p, "generated": t, "reference": r} for p, t, r in rows]
        scores.update(losses, answers)

    def log_scores(self, split: str) -> None:
        """Log the scores of the whole split; of a validation also some of the generated texts."""
        super().log_scores(split)
        if split == "val" and not self.trainer.sanity_checking:
            self._log_generated()

    @rank_zero_only
    def _log_generated(self) -> None:
        samples = self._generated[: self.logged_samples]
        log_samples(cast(list[Logger], self.loggers), "val_samples", samples, self.global_step)


def _inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def _load(pretrained: str, revision: str | None, dtype: str, attention: str | None) -> PreTrainedModel:
    """The model in training mode.

    Raises:
        ValueError: the files lack some of its tensors.
    """
    with loading(pretrained), without_load_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            pretrained,
            revision=revision or "main",
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            output_loading_info=True,
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{PRETRAINED} {pretrained} lacks {len(missing)} tensors of {type(model).__name__}, {missing[0]} the "
            "first; expected a complete causal language model"
        )
    return model.train()  # type: ignore[no-any-return]


def _last_hidden_layer(model: PreTrainedModel) -> str:
    """The last submodule with parameters before the head: the final norm of most decoders."""
    last = resolve_layer(model.base_model, None)
    return last if model.base_model is model else f"{model.base_model_prefix}.{last}"
