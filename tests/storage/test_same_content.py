"""When two side files say the same: whatever the version of the library that wrote them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from dpp_lightning.storage.same_content import same_content


def tokenizer_of(folder, change=lambda content: None):
    """A BPE tokenizer of three tokens as ``tokenizers`` writes it, changed as JSON."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(8)
    content = json.loads(tokenizer.to_str())
    change(content)
    folder.mkdir()
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, indent=1))
    return path


def older(content):
    """As versions before 0.20 wrote it: merges as text, no direction of truncation, no flags that are off."""
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del content["truncation"]["direction"], content["model"]["ignore_merges"]


def test_a_tokenizer_that_another_version_wrote_is_the_same(tmp_path):
    new, old = tokenizer_of(tmp_path / "new"), tokenizer_of(tmp_path / "old", older)
    assert json.loads(new.read_text()) != json.loads(old.read_text())
    assert same_content(new, old)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"]["vocab"].update(c=3),
        lambda content: content["truncation"].update(max_length=4),
        lambda content: content["model"].update(merges=[]),
        lambda content: content.update(model={"type": "Unknown"}),
    ],
)
def test_another_tokenizer_is_not_the_same(tmp_path, change):
    assert not same_content(tokenizer_of(tmp_path / "a"), tokenizer_of(tmp_path / "b", change))


def test_json_is_compared_by_content_and_other_files_byte_for_byte(tmp_path):
    for name, content in {"a.json": '{"x": 1, "y": [2]}', "b.json": '{"y":[2],"x":1}', "c.json": '{"x": 2}'}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).with_suffix(".txt").write_text(content)
    assert same_content(tmp_path / "a.json", tmp_path / "b.json")
    assert not same_content(tmp_path / "a.json", tmp_path / "c.json")
    assert not same_content(tmp_path / "a.txt", tmp_path / "b.txt")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert not same_content(tmp_path / "a.json", tmp_path / "deep.json")


def test_weights_are_compared_as_tensors_bit_for_bit(tmp_path):
    values = {"w": torch.tensor([1.0, float("nan"), -0.0]), "n": torch.tensor(3), "empty": torch.zeros(0, 2)}
    save_file(values, tmp_path / "a.safetensors", {"format": "pt"})
    save_file(dict(reversed(values.items())), tmp_path / "b.safetensors")
    torch.save(values, tmp_path / "c.bin")
    save_file({**values, "w": torch.tensor([1.0, float("nan"), 0.0])}, tmp_path / "d.safetensors")
    save_file({**values, "n": torch.tensor(3.0)}, tmp_path / "e.safetensors")
    assert same_content(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert same_content(tmp_path / "a.safetensors", tmp_path / "c.bin")
    for other in "de":
        assert not same_content(tmp_path / "a.safetensors", tmp_path / f"{other}.safetensors")
