"""Loading a tokenizer whatever its files hold, and whether it has its vocabulary: without the files transformers makes
one of special tokens alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpp_lightning.storage.locate import local_path, subject


def read_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of transformers that lies in a folder or at a hub id.

    Args:
        source: local folder or hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        ConnectionError, TimeoutError: the hub cannot be reached.
        MemoryError: there is not enough memory.
        ValueError: its files cannot be read, or hold what no tokenizer can be made of; the message is the reason alone.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (ConnectionError, TimeoutError, MemoryError):
        raise
    except Exception as error:  # files that hold other things than expected fail in any way
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    length = tokenizer.model_max_length
    if not isinstance(length, (int, float)):
        raise ValueError(f"model_max_length in tokenizer_config.json is no number: {length!r:.80}")
    return tokenizer


def check_vocabulary(
    tokenizer: Any, source: str | Path, argument: str = "", revision: str | None = None, *, given: str = ""
) -> None:
    """Refuse a tokenizer that was loaded from a source without its vocabulary: all words would be unknown to it.

    Args:
        tokenizer: of transformers.
        source: the folder or hub id that it was loaded from.
        argument: what the user calls the source.
        revision: branch, tag or commit of a hub id.
        given: the source as the user gave it, where the files were collected from there; default ``source``.

    Raises:
        FileNotFoundError: the source holds none of the files that a tokenizer of this class reads its words from.
    """
    usual = set((getattr(type(tokenizer), "vocab_files_names", None) or {}).values())
    if not usual:  # of bytes or characters
        return
    names = sorted(usual | {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"})
    folder = local_path(source)
    if folder.is_dir():
        found = any((folder / name).is_file() for name in names) or any(folder.glob("*.tiktoken"))
    else:
        from huggingface_hub import try_to_load_from_cache

        found = any(isinstance(try_to_load_from_cache(str(source), name, revision=revision), str) for name in names)
    if not found:
        raise FileNotFoundError(
            f"{subject(given or source, argument)} holds no vocabulary of a {type(tokenizer).__name__} "
            f"({', '.join(sorted(usual))}), so that all words "
            "would be unknown to it: save the tokenizer there, tokenizer.save_pretrained(folder)"
        )
