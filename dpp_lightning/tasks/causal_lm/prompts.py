"""The prompt around a question: one of the papers', the tokenizer's chat template, or a text of the user's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:"
)
CHAT = "chat"


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        training: text with ``{question}`` in it that precedes the answer in training.
        generation: text with ``{question}`` in it that the model continues when it is scored.
    """

    training: str
    generation: str


PROMPTS = {
    "metamath": Prompt(_ALPACA, f"{_ALPACA} Let's think step by step."),
    "alpaca": Prompt(_ALPACA, _ALPACA),
    "plain": Prompt("{question}\n", "{question}\n"),
}


def resolve_prompt(setting: str) -> Prompt | None:
    """The prompt of a name, or of the user's text; ``None`` stands for the tokenizer's chat template.

    Args:
        setting: a key of :data:`PROMPTS`, ``chat``, or a text with ``{question}`` in it.

    Raises:
        ValueError: none of these.
    """
    if setting == CHAT:
        return None
    if setting in PROMPTS:
        return PROMPTS[setting]
    if "{question}" not in setting:
        names = ", ".join([*PROMPTS, CHAT])
        raise ValueError(f"prompt is {setting!r}, expected one of {names}, or a text with {{question}} in it")
    return Prompt(setting, setting)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt | None, questions: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of the prompts for some questions: in training, and when the model is scored.

    Args:
        tokenizer: puts its beginning-of-sequence token in front, where it has one.
        prompt: ``None`` for the tokenizer's chat template.
        questions: texts, which may hold braces.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if prompt is None:
        tokens = _chat_tokens(tokenizer, questions)
        return tokens, tokens
    trained = tokenizer([prompt.training.replace("{question}", question) for question in questions])["input_ids"]
    if prompt.generation == prompt.training:
        return trained, trained
    return trained, tokenizer([prompt.generation.replace("{question}", q) for q in questions])["input_ids"]


def _chat_tokens(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[list[int]]:
    if tokenizer.chat_template is None:
        raise ValueError(f"prompt is {CHAT!r}, but the tokenizer has no chat template; take metamath, alpaca or plain")
    messages: Any = [[{"role": "user", "content": question}] for question in questions]
    tokens: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return tokens["input_ids"]  # type: ignore[no-any-return]
