"""Whether a tokenizer has its vocabulary: without its files transformers makes one of special tokens alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpp_lightning.storage.locate import local_path, subject


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
