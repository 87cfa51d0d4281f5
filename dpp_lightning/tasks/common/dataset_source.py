"""Data sets of the hub or of this machine, with one line for what cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub import is_offline_mode

from dpp_lightning.storage.file_content import check_content
from dpp_lightning.storage.locate import hub_id, local_path, not_found, subject

_LONGEST = 500  # letters of a reason: a schema can be very long
DATA_PATH = "data.path"  # what messages call the argument, also to those who wrote no config


def check_data_source(path: str, argument: str = DATA_PATH, *, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a source of data that is not there, before anything is loaded. A hub id is not asked for.

    Args:
        path: hub id, local folder, or a file.
        argument: what the user calls it.
        suffixes: of files that are read; without any, a folder or a hub id is expected.

    Raises:
        FileNotFoundError: no such folder or file, or an empty folder.
        ValueError: a file where a folder is expected, or one that is not what its suffix says.
    """
    local, name = local_path(path), subject(path, argument)
    wanted = "file" if local.suffix in suffixes else "folder or file" if suffixes else "folder"
    if local.is_file():
        if local.suffix not in suffixes:
            raise ValueError(f"{name} is a file, expected a folder{_or_file(suffixes)} or a hub id")
        check_content(local, name)
    elif local.is_dir():
        if not any(local.iterdir()):
            raise FileNotFoundError(f"{name} is an empty folder, expected data in it")
    elif hub_id(path) is None:
        raise not_found(path, wanted, argument)


def load_data(
    path: str,
    name: str | None = None,
    *,
    revision: str | None = None,
    files: Mapping[str, str] | None = None,
    source: str | None = None,
    argument: str = DATA_PATH,
) -> DatasetDict:
    """``datasets.load_dataset``, with one line for what cannot be loaded.

    Args:
        path: hub id, local folder, or with ``files`` the kind of the files, such as ``parquet``.
        name: configuration of the data set.
        revision: branch, tag or commit of a hub id.
        files: split to file.
        source: what the user gave; default ``path``.
        argument: what the user calls it.

    Raises:
        FileNotFoundError: no such folder, file or data set, or none in it; or the hub was not asked, as it is switched
            off, and the data is not in its cache.
        ConnectionError: the hub does not answer, and the data is not in its cache.
        ValueError: an unknown configuration, or files that cannot be read.
    """
    given = path if source is None else source
    with _reading(given, name, argument):
        if files is not None:
            return load_dataset(path, data_files=dict(files))
        return load_dataset(str(local_path(path)), name, revision=revision)


def _or_file(suffixes: tuple[str, ...]) -> str:
    return f", a file ({', '.join(suffixes)})" if suffixes else ""


@contextmanager
def _reading(source: str, configuration: str | None, argument: str) -> Iterator[None]:
    """What ``datasets`` raises, as Python's own errors in one line with the argument and the source."""
    name = subject(source, argument)
    if configuration is not None:
        name += f" (configuration {configuration})"
    try:
        yield
    except DatasetNotFoundError as error:
        near = not_found(source, "folder", argument, cure=False)
        raise FileNotFoundError(
            f"{near}; and as a hub id: the hub has no such data set that you may read; check the name, or log in with "
            "hf auth login"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {_one_line(error)}") from error
    except ConnectionError as error:
        near = not_found(source, "folder", argument, cure=False)
        if is_offline_mode():
            raise FileNotFoundError(
                f"{near}; and as a hub id: it is not in the cache, and the hub was not asked, as HF_HUB_OFFLINE is "
                "set: check the name, or unset HF_HUB_OFFLINE"
            ) from error
        raise ConnectionError(f"{near}; and as a hub id: {_one_line(error)}") from error
    except (ValueError, DatasetsError) as error:
        reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise ValueError(f"{name} cannot be loaded: {_one_line(reason)[:_LONGEST]}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
