"""Instruction data: questions with worked answers, cut into splits, tokenised and batched for a decoder."""

from collections.abc import Sequence
from typing import Any, Literal

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from dpp_lightning.tasks.causal_lm.batches import Collate, PackedSamples, Samples, encode
from dpp_lightning.tasks.causal_lm.math_answers import MARKERS, final_answer, same_answer
from dpp_lightning.tasks.causal_lm.prompts import resolve_prompt
from dpp_lightning.tasks.causal_lm.source import Source, load_splits
from dpp_lightning.tasks.common.data import TaskDataModule, module_attribute
from dpp_lightning.tasks.common.pretrained import load_tokenizer


class InstructionDataModule(TaskDataModule):
    """Questions and worked answers: train gives training, validation and calibration data; a test set is scored.

    Calibration data is neither trained on nor scored. Answers end with ``#### 18`` (GSM8K) or ``The answer is: 18``
    (MetaMathQA) where they are scored by exact match.

    Args:
        path: hub id, local folder in the hub's layout, or a ``.json``, ``.jsonl`` or ``.parquet`` file.
        name: configuration of the data set; default the papers' or its only one.
        data_revision: branch, tag or commit of the data on the hub.
        question_column, answer_column: default the first usual name that is there, such as question, query,
            instruction, and answer, response, output.
        test_path, test_name, test_question_column, test_answer_column: the same for a test set of another source, such
            as GSM8K for MetaMathQA; by default the split ``test`` of ``path``, if there is one.
        prompt: ``metamath`` (the papers': Alpaca's to train on, followed by "Let's think step by step." to generate
            from), ``alpaca``, ``plain``, ``chat`` (the tokenizer's template), or a text with ``{question}`` in it.
        tokenizer: hub id or local folder; by default the module's.
        batch_size: samples, or packed rows, of a training batch on each rank.
        eval_batch_size: samples of every other batch.
        max_length: most tokens of prompt and answer, and tokens of a packed row; within the model's limit.
        too_long: training samples of more tokens are an ``error``, or are left out (``drop``).
        packing: put several samples into a row of ``max_length`` tokens; none attends to another.
        val_fraction: fraction of train, in [0, 1), that is scored in validation.
        calibration_fraction: fraction of train, in [0, 1), for :meth:`calibration_dataloader`.
        val_samples, calibration_samples, test_samples: most samples of the split, drawn by ``split_seed``; by default
            all. Generation is slow.
        split_seed: seed of the cut, apart from ``seed``, so that runs with several seeds share their splits.
        seed: seed of the order of training data; by default the one of ``seed_everything``, else 0.
        length_grouped: batches of samples of similar length: less padding.
        num_workers: loader processes.

    Attributes:
        texts: split to its rows with columns ``question`` and ``answer``, after ``setup``.

    Raises:
        ValueError: fractions outside [0, 1) or not below 1 together, an unknown prompt; in ``setup``: missing columns,
            empty texts, answers that cannot be scored, samples or prompts over the limit, a tokenizer without an
            end-of-sequence token.
    """

    def __init__(
        self,
        path: str = "openai/gsm8k",
        name: str | None = None,
        data_revision: str | None = None,
        question_column: str | None = None,
        answer_column: str | None = None,
        test_path: str | None = None,
        test_name: str | None = None,
        test_question_column: str | None = None,
        test_answer_column: str | None = None,
        prompt: str = "metamath",
        tokenizer: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        max_length: int = 512,
        too_long: Literal["error", "drop"] = "error",
        packing: bool = False,
        val_fraction: float = 0.1,
        calibration_fraction: float = 0.05,
        val_samples: int | None = None,
        calibration_samples: int | None = None,
        test_samples: int | None = None,
        split_seed: int = 0,
        seed: int | None = None,
        length_grouped: bool = False,
        num_workers: int = 0,
    ) -> None:
        fractions = {"val": val_fraction, "calibration": calibration_fraction}
        super().__init__(batch_size, eval_batch_size, fractions, split_seed, seed, length_grouped, num_workers)
        if packing and length_grouped:
            raise ValueError("packing fills rows with samples of all lengths: leave length_grouped out")
        self.source = Source(path, name, data_revision, question_column, answer_column)
        test_columns = (test_question_column, test_answer_column)
        self.test_source = Source(test_path, test_name, None, *test_columns, "data.test_path") if test_path else None
        self.prompt, self.tokenizer = resolve_prompt(prompt), tokenizer
        self.max_length, self.too_long, self.packing = max_length, too_long, packing
        self.limits = {"val": val_samples, "calibration": calibration_samples, "test": test_samples}
        self.texts: dict[str, Dataset] = {}

    def prepare_data(self) -> None:
        """Download data and tokenizer, where they are not local, in one process."""
        for source in (self.source, self.test_source):
            if source is not None:
                source.load()
        self._load_tokenizer()

    def setup(self, stage: str | None = None) -> None:
        """Load, check, cut and tokenise every split; the cut depends on ``split_seed`` and train's size alone."""
        if self.splits:
            return
        tokenizer = self._load_tokenizer()
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token, so no answer would ever end; set eos_token")
        self._check_max_length()
        self.texts = load_splits(self.source, self.test_source, self.fractions, self.limits, self.split_seed)
        encoded = {split: encode(rows, tokenizer, self.prompt) for split, rows in self.texts.items()}
        if "train" in encoded:
            encoded["train"] = self._within_max_length(encoded["train"])
        for split, rows in encoded.items():
            is_scored = split != "train"
            if is_scored:
                self._check_scored(split, rows)
            self.splits[split] = Samples(rows, self.max_length, self.texts[split]["answer"] if is_scored else None)
        # padding is masked, so that any token will do
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.collate = Collate(pad, self.max_length)

    def samples(self, split: str, order: Sequence[int] | None = None) -> TorchDataset[Any]:
        """The samples of a split; rows of several samples for training data that is packed."""
        samples: Samples = self.splits[split]
        if split == "train" and self.packing:
            return PackedSamples(samples, self.lengths(split), self.max_length)
        return samples if order is None else samples.select(order)

    def lengths(self, split: str) -> list[int]:
        """Tokens of each sample of a split."""
        return list(self.splits[split].rows["length"])

    def describe_prediction(self, index: int, prediction: str, dataloader_idx: int = 0) -> dict[str, Any]:
        """A generated text beside its question and reference, with the final answer and whether it is right.

        Args:
            index: position of the sample in the test set, from 0.
            prediction: the generated text, as ``CausalLMModule.predict_step`` gives it for the sample.
            dataloader_idx: 0, as there is one loader.
        """
        row = self.texts["test"][index]
        answer, expected = final_answer(prediction), final_answer(row["answer"])
        return {
            "question": row["question"],
            "generated": prediction,
            "answer": answer,
            "expected": expected,
            "correct": expected is not None and same_answer(answer, expected),
        }

    def _within_max_length(self, rows: Dataset) -> Dataset:
        """Training rows of at most ``max_length`` tokens.

        Raises:
            ValueError: a longer one where ``too_long`` is ``error``, or none that is left.
        """
        lengths = list(rows["length"])
        kept = [i for i, length in enumerate(lengths) if length <= self.max_length]
        if len(kept) == len(lengths):
            return rows
        long = f"{len(lengths) - len(kept)} of {len(lengths)} training samples have more than {self.max_length} tokens"
        if self.too_long == "error" or not kept:
            raise ValueError(
                f"{long} (max_length), the longest {max(lengths)}; raise data.max_length, or leave them out with "
                "data.too_long: drop"
            )
        rank_zero_info(f"{long} and are left out")
        return rows.select(kept)

    def _check_max_length(self) -> None:
        limit = module_attribute(self.trainer, "max_length")
        if self.max_length < 2 or (limit is not None and self.max_length > limit):
            raise ValueError(f"max_length is {self.max_length}, but the model takes 2 to {limit or 'any'} tokens")

    def _check_scored(self, split: str, rows: Dataset) -> None:
        """Check that exact match can score the answers, and that the model has room for what it generates.

        Raises:
            ValueError: an answer without a final answer, or a prompt that leaves too few tokens.
        """
        if module_attribute(self.trainer, "evaluate_by") == "loss" or not len(rows):
            return
        for number, answer in enumerate(self.texts[split]["answer"]):
            if final_answer(answer) is None:
                raise ValueError(
                    f"row {number} of the {split} split has no final answer behind {' or '.join(MARKERS)}: "
                    f"{answer[-60:]!r}; without one take model.evaluate_by: loss"
                )
        limit = module_attribute(self.trainer, "max_length")
        generated = module_attribute(self.trainer, "max_new_tokens") or 0
        longest = max(len(tokens) for tokens in rows["prompt_ids"])
        if limit is not None and longest + generated > limit:
            raise ValueError(
                f"the longest prompt of the {split} split has {longest} tokens and max_new_tokens is {generated}, but "
                f"the model takes {limit} together; lower model.max_new_tokens"
            )

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer, None, "data.tokenizer")
        tokenizer = module_attribute(self.trainer, "tokenizer")
        if tokenizer is None:
            raise ValueError("InstructionDataModule needs tokenizer=..., as the module it is used with has none")
        return tokenizer  # type: ignore[no-any-return]
