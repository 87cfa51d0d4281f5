"""How a question is put to a decoder: the papers' prompts, a chat template, or the user's own words."""

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
    """Texts with ``{question}`` in them: the one that is trained on, and the one that is generated from."""

    training: str
    generation: str


PROMPTS = {
    "metamath": Prompt(_ALPACA, f"{_ALPACA} Let's think step by step."),
    "alpaca": Prompt(_ALPACA, _ALPACA),
    "plain": Prompt("{question}\n", "{question}\n"),
}


def resolve_prompt(setting: str) -> Prompt | None:
    """The prompt of a name, or the user's own text; ``None`` stands for the tokenizer's chat template.

    Raises:
        ValueError: neither a name nor a text with ``{question}`` in it.
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
    """Tokens of questions as they are trained on, and as they are generated from.

    Args:
        tokenizer: puts its own beginning-of-sequence token in front, where it has one.
        prompt: ``None`` for the tokenizer's chat template.
        questions: put in as they are, braces and all.

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
