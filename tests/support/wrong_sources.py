"""A folder of sources of every kind that may be given in place of the one that is wanted, whole and damaged."""

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_glue import make_model
from transformers import BertForSequenceClassification

from dpp_lightning import prune

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


def make_sources(root: Path) -> Path:
    """Fill an empty folder; see the names below."""
    _whole(root)
    _without(root)
    _damaged_files(root)
    _damaged_folders(root)
    return root


def _whole(root):
    """``base``, ``tuned``, ``runs/tuned``, ``delta``, ``adapter``, ``deltas``, ``logs``, ``plain.ckpt``, ``glue``."""
    base, tuned = make_model(root / "base"), root / "tuned"
    shutil.copytree(base, tuned)
    tensors = load_file(tuned / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, tuned / "model.safetensors")
    shutil.copytree(tuned, root / "runs" / "tuned")
    delta = prune(str(base), str(tuned))
    delta.save_pretrained(root / "delta")
    delta.save_pretrained(root / "deltas" / "dare-0.9-0")
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2)
    get_peft_model(model, LoraConfig(target_modules=["query"])).save_pretrained(root / "adapter")
    checkpoints = root / "logs" / "version_0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for file in (root / "plain.ckpt", checkpoints / "epoch=0.ckpt"):
        torch.save({"state_dict": tensors}, file)
    (root / "glue" / "cola").mkdir(parents=True)
    (root / "texts.txt").write_text("some text\n")


def _without(root):
    """``empty``, ``half`` a delta, and models that lack one thing."""
    (root / "empty").mkdir()
    (root / "half").mkdir()
    shutil.copy(root / "delta" / "delta_config.json", root / "half")
    for name, lost in (("no_config", "config"), ("no_weights", "model"), ("no_tokenizer", "tokenizer")):
        shutil.copytree(root / "base", root / name)
        for file in (root / name).glob(f"{lost}*"):
            file.unlink()
    config = json.loads((root / "base" / "config.json").read_text())
    _model_with(root / "no_type", json.dumps({key: value for key, value in config.items() if key != "model_type"}))


def _damaged_files(root):
    for name in ("zero.safetensors", "zero.ckpt", "zero.jsonl", "empty.txt"):
        (root / name).touch()
    question = '{"question": "1 + 1?", "answer": "#### 2"}\n'
    (root / "good.jsonl").write_text(20 * question)
    (root / "broken.jsonl").write_text(question + '{"question": \n')
    (root / "page.safetensors").write_text(PAGE)
    content = (root / "plain.ckpt").read_bytes()
    (root / "torn.ckpt").write_bytes(content[: len(content) // 2])
    for name in ("packed.zip", "packed.safetensors"):
        with zipfile.ZipFile(root / name, "w") as archive:
            archive.write(root / "texts.txt", "texts.txt")
    with tarfile.open(root / "packed.tar.gz", "w:gz") as archive:
        archive.add(root / "texts.txt", "texts.txt")
    (root / "lost_link").symlink_to("gone")


def _damaged_folders(root):
    _model_with(root / "broken_config", '{"model_type": ')
    _model_with(root / "html", PAGE)
    weights = (root / "base" / "model.safetensors").read_bytes()
    for name, content in (("lfs", POINTER.encode()), ("truncated", weights[: len(weights) // 2])):
        shutil.copytree(root / "base", root / name)
        (root / name / "model.safetensors").write_bytes(content)
    shutil.copytree(root / "delta", root / "lfs_delta")
    (root / "lfs_delta" / "delta_model.safetensors").write_text(POINTER)
    (root / "folder.safetensors").mkdir()
    (root / "inner" / "model.safetensors").mkdir(parents=True)
    (root / "lost").mkdir()
    (root / "lost" / "model.safetensors").symlink_to("../blobs/gone")
    (root / "shards").mkdir()
    save_file({"a": torch.zeros(2)}, root / "shards" / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))


def _model_with(folder, config):
    """A copy of the base with another ``config.json``."""
    shutil.copytree(folder.parent / "base", folder)
    (folder / "config.json").write_text(config)
