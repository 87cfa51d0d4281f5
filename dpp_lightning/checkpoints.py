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
        source: a ``.safetensors`` file, a folder in Hugging Face's layout (one file or shards with an index), or a
        hub id. revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: no such file, or a folder without safetensors weights.
    """
    path = Path(source)
    if path.is_file():
        return load_file(path)
    folder = path if path.is_dir() else _download(str(source), revision)
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


def _download(hub_id: str, revision: str | None) -> Path:
    if hub_id.startswith((".", "/", "~")) or hub_id.count("/") > 1:
        raise FileNotFoundError(f"{hub_id}: no such file or folder (nor a hub id)")
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
