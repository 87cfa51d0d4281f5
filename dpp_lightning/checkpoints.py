"""Weights on disk: a local folder, a file, or a hub id to a state dict."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_tensors(source: str | Path, revision: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU (memory-mapped where the format allows).

    Args:
        source: a ``.safetensors`` file, a folder in Hugging Face's layout (one file or shards with an index), or a hub
            id.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: no such file, or a folder without safetensors weights.
    """
    path = Path(source)
    if path.is_file():
        return load_file(path)
    folder = local_folder(source, revision, ["*.safetensors", "*.json"], "file or folder")
    index = folder / _INDEX
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}
    files = [folder / _SINGLE] if (folder / _SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{source}: expected {_SINGLE}, or {_INDEX} with its shards, found {[f.name for f in files] or 'neither'}; "
            "save the model with save_pretrained(folder), which writes safetensors"
        )
    return load_file(files[0])


def local_folder(source: str | Path, revision: str | None, patterns: list[str], wanted: str = "folder") -> Path:
    """The folder itself, or where the files of a hub id now lie on this machine.

    Args:
        source: a local folder or a hub id.
        revision: branch, tag or commit of a hub id.
        patterns: names of the files to fetch.
        wanted: what was expected, for the message.

    Raises:
        FileNotFoundError: neither a folder nor of the form of a hub id.
    """
    if Path(source).is_dir():
        return Path(source)
    hub_id = str(source)
    if hub_id.startswith((".", "/", "~")) or hub_id.count("/") > 1:
        raise FileNotFoundError(f"{source}: no such {wanted} (nor a hub id)")
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
