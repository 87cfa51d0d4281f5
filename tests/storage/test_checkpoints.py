"""Checkpoints of every kind come as mapped tensors; damaged, hostile and incomplete ones are refused by name."""

import argparse
import json
import sys
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors.torch import save_file
from tiny import Foreign, train_loader, trainer
from transformers import BertConfig, BertModel

from dpp_lightning.storage import hub, mapped_file
from dpp_lightning.storage.checkpoints import load_tensors, total_bytes

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def equal(read, weights=WEIGHTS):
    return read.keys() == weights.keys() and all(
        read[n].dtype == t.dtype and torch.equal(read[n], t) for n, t in weights.items()
    )


def shard_folder(folder, weight_map, shards):
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


class Runs:
    """Pickled, it writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["w.safetensors", "model.safetensors", "w.pt", "w.pth", "w.bin", "w.ckpt"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_one_file_of_any_kind_by_itself_or_in_a_folder(tmp_path, name, by_folder):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save({"state_dict": WEIGHTS, "epoch": 3} if path.suffix == ".ckpt" else WEIGHTS, path)
    assert equal(load_tensors(tmp_path if by_folder else path))
    assert equal(load_tensors(str(path)))


@pytest.mark.parametrize("shard", ["5KB", "1GB"])
def test_folders_of_transformers(tmp_path, shard):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=20, **sizes))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert equal(load_tensors(tmp_path), model.state_dict())


def test_shards_of_pytorch_files(tmp_path):
    torch.save({"a": WEIGHTS["a"]}, tmp_path / "pytorch_model-1.bin")
    torch.save({n: WEIGHTS[n] for n in "bc"}, tmp_path / "pytorch_model-2.bin")
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin", "c": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert equal(load_tensors(tmp_path))


def test_safetensors_come_before_pytorch_files(tmp_path):
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert equal(load_tensors(tmp_path))


def test_a_checkpoint_that_lightning_wrote(tmp_path):
    fit = trainer(max_epochs=1, default_root_dir=tmp_path, limit_train_batches=2)
    module = Foreign()
    module.save_hyperparameters({"learning_rate": 1e-3, "layers": [1, 2], "name": "x"})
    fit.fit(module, train_loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    assert equal(load_tensors(tmp_path / "last.ckpt"), module.state_dict())


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_writing_into_tensors_spares_the_file(tmp_path, name):
    path = tmp_path / name
    (torch.save if path.suffix == ".pt" else save_file)(WEIGHTS, path)
    before = path.read_bytes()
    tensors = load_tensors(path)
    for tensor in tensors.values():
        tensor += 1
    assert equal(tensors, {n: t + 1 for n, t in WEIGHTS.items()})
    del tensors
    assert path.read_bytes() == before


@linux
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_tensors_are_pages_of_the_file(tmp_path, name):
    path = tmp_path / name
    (torch.save if path.suffix == ".pt" else save_file)(WEIGHTS, path)
    tensors = load_tensors(path)
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(path))]
    inside = [(int(low, 16), int(high, 16)) for low, high in ranges]
    assert all(any(low <= t.data_ptr() < high for low, high in inside) for t in tensors.values())


def tied_state():
    weight, parameter = torch.arange(35.0).reshape(5, 7), torch.nn.Parameter(torch.ones(3))
    state = {"a": weight, "tied": weight, "part": weight[1:3].t(), "p": parameter, "empty": torch.empty(0, 3)}
    return {**state, "half": torch.ones(3, dtype=torch.bfloat16), "step": torch.tensor(4), "version": 2}


@pytest.mark.parametrize("refused", [False, True])
def test_ties_views_and_parameters_of_pytorch_files(tmp_path, monkeypatch, refused):
    """Also by the other way, that of files which torch cannot map since they are larger than memory."""
    state, load = tied_state(), torch.load
    torch.save({"state_dict": state, "optimizer": {0: torch.ones(2)}}, tmp_path / "w.ckpt")

    def refusing(*args, mmap=False, **kwargs):
        if mmap:
            raise RuntimeError("unable to mmap 9 bytes from file <w.ckpt>: Cannot allocate memory (12)")
        return load(*args, **kwargs)

    if refused:
        monkeypatch.setattr(mapped_file.torch, "load", refusing)
    read = load_tensors(tmp_path / "w.ckpt")
    assert equal(read, {n: t.detach() for n, t in state.items() if n != "version"})
    assert type(read["p"]) is torch.Tensor
    assert not read["p"].requires_grad
    assert read["a"].data_ptr() == read["tied"].data_ptr()
    assert read["part"].untyped_storage().data_ptr() == read["a"].untyped_storage().data_ptr()
    assert total_bytes(read) == 35 * 4 * 2 + 14 * 4 + 12 + 6 + 8


@linux
def test_a_lightning_checkpoint_larger_than_memory_is_mapped(tmp_path):
    with open("/proc/meminfo") as file:
        about = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    half = (about["MemTotal"] + about["SwapTotal"]) // 2 // 4096 * 4096 + 2**30
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(half)
    with torch.serialization.skip_data():  # sparse: names and places, no data
        state = {}
        for name in "ab":
            pages = torch.UntypedStorage.from_file(str(tmp_path / "zeros"), False, half)
            state[name] = torch.empty(0).set_(pages)
        torch.save({"state_dict": state}, tmp_path / "huge.ckpt")
    read = load_tensors(tmp_path / "huge.ckpt")
    assert {n: t.numel() for n, t in read.items()} == {"a": half // 4, "b": half // 4}
    assert read["a"][-1] == read["b"][-1] == 0


def test_code_in_a_pickle_is_never_run(tmp_path):
    torch.save({"state_dict": WEIGHTS, "hook": Runs(tmp_path / "ran")}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"w\.ckpt holds more than weights: .*open is not allowed.*save_pretrained"):
        load_tensors(tmp_path / "w.ckpt")
    assert not (tmp_path / "ran").exists()


def test_pytorch_files_that_are_no_plain_weights(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": WEIGHTS, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(ValueError, match=r"argparse\.Namespace is not allowed"):
        load_tensors(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear is not allowed"):
        load_tensors(path)
    torch.save({"model": WEIGHTS, "epoch": 1}, path)
    with pytest.raises(ValueError, match=r"expected a state dict.*got a dict of 'model', 'epoch'"):
        load_tensors(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(ValueError, match=r"expected a state dict.*got list"):
        load_tensors(path)
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not in PyTorch's zip format"):
        load_tensors(path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path, name, kept):
    path = tmp_path / name
    (torch.save if path.suffix == ".pt" else save_file)(WEIGHTS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=name):
        load_tensors(path)


def test_every_missing_shard_is_listed(tmp_path):
    shard_folder(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}, {"1.safetensors": {}})
    with pytest.raises(FileNotFoundError, match=r"2\.safetensors, 3\.safetensors"):
        load_tensors(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../1.safetensors", "/etc/passwd", "sub/1.safetensors", "..", ".", "", "a\\b", "C:x", "a\0b"]
)
def test_shards_outside_the_folder_are_refused(tmp_path, shard):
    save_file(WEIGHTS, tmp_path / "1.safetensors")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    save_file(WEIGHTS, tmp_path / "folder" / "sub" / "1.safetensors")
    with pytest.raises(ValueError, match="shards must be plain names of files in its folder"):
        load_tensors(shard_folder(tmp_path / "folder", {"a": shard}, {}))


def test_an_index_that_does_not_fit_its_shards(tmp_path):
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "gone": "2.safetensors"}
    shards = {"1.safetensors": {"a": torch.ones(1), "b": torch.ones(1)}, "2.safetensors": {"b": torch.ones(1)}}
    shard_folder(tmp_path, weight_map, shards)
    with pytest.raises(ValueError, match=r"in more than one shard: b; in no shard: gone"):
        load_tensors(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", b"[]", b"{}", b"null", b"[" * 100_000, b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}'],
)
def test_a_malformed_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_tensors(tmp_path)


def test_folders_with_several_files_or_none_ask_for_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors.*found neither"):
        load_tensors(tmp_path)
    for name in ("x.ckpt", "y.ckpt"):
        torch.save(WEIGHTS, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"found x\.ckpt, y\.ckpt; name the file itself"):
        load_tensors(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_id_fetches_pytorch_weights_only_where_there_are_no_others(tmp_path, monkeypatch, kind):
    asked = []

    def snapshot(hub_id, revision, allow_patterns):
        asked.append((hub_id, revision, allow_patterns))
        if any(fnmatchcase(kind, pattern) for pattern in allow_patterns):
            (save_file if kind == "model.safetensors" else torch.save)(WEIGHTS, tmp_path / kind)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert equal(load_tensors("someone/model", "main"))
    assert [a[:2] for a in asked] == [("someone/model", "main")] * (1 if kind == "model.safetensors" else 2)
    for name in ("config.json", "merges.txt", "spiece.model", "chat_template.jinja"):
        assert any(fnmatchcase(name, pattern) for pattern in asked[0][2])
    assert not any(fnmatchcase(name, p) for name in ("optimizer.pt", "modeling.py") for a in asked for p in a[2])


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path):
    shard_folder(tmp_path, {}, {"1.safetensors": {"a": torch.ones(2)}, "2.safetensors": {"b": torch.ones(2)}})
    text = '{"weight_map": {"a": "2.safetensors", "b": "2.safetensors", "a": "1.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is not readable JSON \('a' stands there twice\)"):
        load_tensors(tmp_path)
