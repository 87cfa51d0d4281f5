"""Instruction data: questions with worked answers, cut, tokenised and batched for a decoder."""

from typing import Any, Literal

from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpp_lightning.tasks.causal_lm.batches import Collate, PackedSamples, Samples, encode
from dpp_lightning.tasks.causal_lm.math_answers import MARKERS, final_answer, same_answer
from dpp_lightning.tasks.causal_lm.prompts import resolve_prompt
from dpp_lightning.tasks.causal_lm.source import Source, cut
from dpp_lightning.tasks.common.reproducible import EpochDataLoader, EpochSampler, resolve_seed
from dpp_lightning.tasks.common.splits import check_fractions, evaluation_sampler, of_module, replica


class InstructionDataModule(LightningDataModule):
    """Questions and worked answers: train is cut into training, validation and calibration data; a test set is scored.

    Calibration data is neither trained on nor scored. Answers end with ``#### 18`` (GSM8K) or ``The answer is: 18``
    (MetaMathQA) where they are scored by exact match.

    Args:
        path: hub id, local folder in the hub's layout, or a ``.json``, ``.jsonl`` or ``.parquet`` file.
        name: configuration of the data set; default the papers' or its only one.
        data_revision: branch, tag or commit of the data on the hub.
        question_column, answer_column: default the first usual name found, such as question, query, instruction, and
            answer, response, output.
        test_path, test_name, test_question_column, test_answer_column: the same of a test set of another source, such
            as GSM8K for MetaMathQA; by default the split ``test`` of ``path``, if there is one.
        prompt: ``metamath`` (the papers': Alpaca's to train on, with "Let's think step by step." behind it to generate
            from), ``alpaca``, ``plain``, ``chat`` (the tokenizer's template), or a text with ``{question}`` in it.
        tokenizer: hub id or local folder; by default the module's.
        batch_size: samples, or packed rows, of a training batch on each rank.
        eval_batch_size: samples of every other batch.
        max_length: most tokens of prompt and answer, and tokens of a packed row; within the model's limit.
        too_long: training samples of more tokens are an ``error``, or are left out (``drop``).
        packing: put several samples into a row of ``max_length`` tokens, kept apart in attention.
        val_fraction: share of train, in [0, 1), that is scored in validation.
        calibration_fraction: share of train, in [0, 1), of :meth:`calibration_dataloader`.
        val_samples, calibration_samples, test_samples: at most so many, drawn by ``split_seed``; generation is slow.
        split_seed: seed of the cut, apart from ``seed``, so that runs with several seeds share their splits.
        seed: seed of the order of training data; by default the one of ``seed_everything``, else 0.
        length_grouped: batches of samples of similar length: less padding.
        num_workers: loader processes.

    Raises:
        ValueError: fractions outside [0, 1), an unknown prompt; in ``setup``: missing columns, empty texts, answers
            that cannot be scored, samples or prompts over the limit, a tokenizer without an end-of-sequence token.
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
        super().__init__()
        check_fractions(val_fraction, calibration_fraction)
        if packing and length_grouped:
            raise ValueError("packing fills rows with samples of all lengths: leave length_grouped out")
        self.source = Source(path, name, data_revision, question_column, answer_column)
        self.test_source = (
            Source(test_path, test_name, None, test_question_column, test_answer_column) if test_path else None
        )
        self.prompt, self.tokenizer = resolve_prompt(prompt), tokenizer
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.too_long, self.packing, self.length_grouped = too_long, packing, length_grouped
        self.fractions = {"val": val_fraction, "calibration": calibration_fraction}
        self.limits = {"val": val_samples, "calibration": calibration_samples, "test": test_samples}
        self.split_seed, self.seed, self.num_workers = split_seed, seed, num_workers
        self.texts: dict[str, Dataset] = {}
        self.splits: dict[str, Samples] = {}
        self._pad = 0

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
        # what is padded is masked out, so that any token will do
        self._pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._check_max_length()
        self.texts = cut(self.source, self.test_source, self.fractions, self.limits, self.split_seed)
        encoded = {split: encode(rows, tokenizer, self.prompt) for split, rows in self.texts.items()}
        if "train" in encoded:
            encoded["train"] = self._within(encoded["train"])
        for split, rows in encoded.items():
            scored = split != "train"
            if scored:
                self._check_scored(split, rows)
            self.splits[split] = Samples(rows, self.max_length, self.texts[split]["answer"] if scored else None)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training part; the order depends on (seed, epoch) alone."""
        samples = self.splits["train"]
        lengths = samples.rows["length"]
        data: TorchDataset[Any] = PackedSamples(samples, lengths, self.max_length) if self.packing else samples
        sampler = EpochSampler(
            len(data),  # type: ignore[arg-type]
            resolve_seed(self.seed),
            lengths=list(lengths) if self.length_grouped else None,
            batch_size=self.batch_size,
            **replica(self.trainer),
        )
        return EpochDataLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=Collate(self._pad, self.max_length),
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The held-out part of train that is scored; no loader where there is none."""
        return self._evaluation_loader("val", shared=True)

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test set; no loader where there is none."""
        return self._evaluation_loader("test", shared=True)

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test set in its own order; across ranks Lightning deals it out without repetition."""
        return self._evaluation_loader("test")

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Batches that are neither trained on nor scored, in a fixed order, the same on every rank."""
        if not self.splits:
            self.setup()
        loader = self._evaluation_loader("calibration")
        if isinstance(loader, list):
            raise ValueError(
                f"calibration_fraction {self.fractions['calibration']} holds out no sample; raise it, e.g. 0.05"
            )
        return loader

    def describe_prediction(self, index: int, prediction: str, dataloader_idx: int = 0) -> dict[str, Any]:
        """A generated text beside its question and reference, with the final answer and whether it is right."""
        row = self.texts["test"][index]
        found, expected = final_answer(prediction), final_answer(row["answer"])
        return {
            "question": row["question"],
            "generated": prediction,
            "answer": found,
            "expected": expected,
            "correct": expected is not None and same_answer(found, expected),
        }

    def _within(self, rows: Dataset) -> Dataset:
        """Training rows of at most ``max_length`` tokens."""
        lengths = list(rows["length"])
        kept = [i for i, length in enumerate(lengths) if length <= self.max_length]
        if len(kept) == len(lengths):
            return rows
        found = f"{len(lengths) - len(kept)} of {len(lengths)} training samples have more than {self.max_length} tokens"
        if self.too_long == "error" or not kept:
            raise ValueError(
                f"{found} (max_length), the longest {max(lengths)}; raise data.max_length, or leave them out with "
                "data.too_long: drop"
            )
        rank_zero_info(f"{found} and are left out")
        return rows.select(kept)

    def _check_max_length(self) -> None:
        limit = of_module(self.trainer, "max_length")
        if self.max_length < 2 or (limit is not None and self.max_length > limit):
            raise ValueError(f"max_length is {self.max_length}, but the model takes 2 to {limit or 'any'} tokens")

    def _check_scored(self, split: str, rows: Dataset) -> None:
        """Answers that exact match can be measured by, and room for what is generated."""
        if of_module(self.trainer, "evaluate_by") == "loss" or not len(rows):
            return
        for number, answer in enumerate(self.texts[split]["answer"]):
            if final_answer(answer) is None:
                raise ValueError(
                    f"row {number} of the {split} part has no final answer behind {' or '.join(MARKERS)}: "
                    f"{answer[-60:]!r}; without one take model.evaluate_by: loss"
                )
        limit, new = of_module(self.trainer, "max_length"), of_module(self.trainer, "max_new_tokens") or 0
        longest = max(len(tokens) for tokens in rows["prompt_ids"])
        if limit is not None and longest + new > limit:
            raise ValueError(
                f"the longest prompt of the {split} part has {longest} tokens and max_new_tokens is {new}, but the "
                f"model takes {limit} together; lower model.max_new_tokens"
            )

    def _evaluation_loader(self, split: str, shared: bool = False) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches in the split's order; ``shared`` deals them out to the ranks, and sorts them by length."""
        samples = self.splits.get(split)
        if samples is None or not len(samples):
            return []
        if shared:
            order = sorted(range(len(samples)), key=list(samples.rows["length"]).__getitem__)
            assert samples.references is not None
            references = [samples.references[i] for i in order]
            samples = Samples(samples.rows.select(order), self.max_length, references)
        return DataLoader(
            samples,
            batch_size=self.eval_batch_size,
            sampler=evaluation_sampler(self.trainer, len(samples)) if shared else None,
            num_workers=self.num_workers,
            collate_fn=Collate(self._pad),
        )

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is not None:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        tokenizer = of_module(self.trainer, "tokenizer")
        if tokenizer is None:
            raise ValueError("InstructionDataModule needs tokenizer=..., as the module it is used with has none")
        return tokenizer  # type: ignore[no-any-return]
