"""Whether two side files say the same, in however many spaces, orders and formats libraries write it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from dpp_lightning.storage.mapped_file import map_safetensors, map_torch_file
from dpp_lightning.tensors.fingerprint import raw_bytes

_WEIGHTS = (".safetensors", ".bin")


def same_content(a: Path, b: Path) -> bool:
    """Equal byte for byte; or JSON of equal content; or the same tokenizer, as ``tokenizers`` reads it; or the same
    tensors.

    Args:
        a, b: files of one name; of weights one may be a PyTorch file.

    Raises:
        ValueError: weights that cannot be read.
        OSError: a file cannot be read.
    """
    if a.suffix in _WEIGHTS and b.suffix in _WEIGHTS:
        return _same_tensors(_weights(a), _weights(b))
    first, second = a.read_bytes(), b.read_bytes()
    if first == second or a.suffix != ".json":
        return first == second
    try:
        return bool(json.loads(first) == json.loads(second)) or (
            a.name == "tokenizer.json" and _tokenizer(first) == _tokenizer(second)
        )
    except (ValueError, RecursionError):
        return False


def weights_as_safetensors(path: Path) -> bytes:
    """A PyTorch file's tensors as a safetensors file.

    Raises:
        ValueError: a damaged file, or one with more than tensors in it.
    """
    return save({name: tensor.clone().contiguous() for name, tensor in _weights(path).items()}, {"format": "pt"})


def _weights(path: Path) -> dict[str, Tensor]:
    return map_torch_file(path) if path.suffix == ".bin" else map_safetensors(path)


def _same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and bytes(raw_bytes(a[name])) == bytes(raw_bytes(b[name]))
        for name in a
    )


def _tokenizer(content: bytes) -> str:
    """A tokenizer as the library writes it, defaults that older versions left out among it.

    Raises:
        ValueError: no file of a tokenizer that the library knows.
    """
    from tokenizers import Tokenizer  # takes long to import

    try:
        return str(Tokenizer.from_buffer(content).to_str())
    except Exception as error:  # the library raises no other type
        raise ValueError(str(error)) from error
