"""Loading what ``model.pretrained`` and ``data.tokenizer`` name, with one line for what cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from dpp_lightning.storage.locate import local_folder, local_path, subject
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.storage.tokenizer_files import check_vocabulary, read_tokenizer

PRETRAINED = "model.pretrained"  # what messages call the argument, also to those who wrote no config
_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError, UnpicklingError,
    StrictDataclassError,
)  # fmt: skip


def check_pretrained(pretrained: str, revision: str | None) -> str:
    """Refuse a base that is not there or not whole, before anything is loaded.

    Args:
        pretrained: local folder or hub id; of the latter only the configuration is fetched.
        revision: branch, tag or commit of a hub id.

    Returns:
        The source as transformers takes it: a hub id, or a path without ``~``.

    Raises:
        FileNotFoundError, ValueError, PermissionError, ConnectionError: as
            :func:`dpp_lightning.storage.source_kind.check_model`.
    """
    check_model(pretrained, PRETRAINED, revision, config=True)
    return str(local_path(pretrained))


@contextmanager
def loading(
    source: str, argument: str = PRETRAINED, *, failed: str = "cannot be loaded", cure: str = ""
) -> Iterator[None]:
    """What a library raises of files that it cannot load, as one line with the argument and the source.

    Args:
        source: as the user gave it.
        argument: what the user calls it.
        failed: what the message says of the source.
        cure: what the message ends with.

    Raises:
        ValueError: from the library's error.
    """
    try:
        yield
    except (ConnectionError, TimeoutError, MemoryError):
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{subject(source, argument)} {failed}: {reason}{cure}") from error


def load_tokenizer(source: str, revision: str | None, argument: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id.

    Args:
        source: local folder or hub id.
        revision: branch, tag or commit of a hub id.
        argument: what the user calls the source.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as :func:`dpp_lightning.storage.locate.local_folder`.
        ValueError: there is no tokenizer, or it cannot be loaded.
    """
    cure = "; save the tokenizer there (tokenizer.save_pretrained(folder)), or name another with data.tokenizer"
    local_folder(source, revision, ["tokenizer_config.json", "config.json"], argument=argument)
    with loading(source, argument, cure=cure):
        path = str(local_path(source))
        tokenizer: PreTrainedTokenizerBase = read_tokenizer(path, revision)
    check_vocabulary(tokenizer, source, argument, revision)
    return tokenizer
