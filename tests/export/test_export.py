"""dpp export: checkpoints of trainers, whole and in shards, become folders that plain from_pretrained loads."""

import os
import pickle
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from tiny_causal import make_decoder, save_decoder
from tiny_glue import bert_config, make_data, make_model, make_trainer
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from dpp_lightning import SparseDelta
from dpp_lightning.cli import main
from dpp_lightning.storage import sharded_checkpoint, stored_tensor
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.sharded_checkpoint import read_sharded
from dpp_lightning.tasks.common.lora import LoRA
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule

TOKENS = {"input_ids": torch.arange(4, 24).reshape(2, 10)}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**SMALL, "image_size": 16, "patch_size": 8}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": 99}


def trained(model, seed=0):
    """The model as if it had been fine-tuned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    return model.eval()


def save_ckpt(path, model, prefix="model.", pretrained=None, **beside):
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    settings = {"pretrained": str(pretrained)} if pretrained else {}
    torch.save({"state_dict": {**state, **beside}, "hyper_parameters": settings, "optimizer_states": []}, path)
    return str(path)


def same_weights(folder, model):
    """Loaded without a word of missing or unexpected tensors, every one equal."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    state = model.state_dict()
    return (
        all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())
        and loaded.state_dict().keys() == state.keys()
    )


def save_dcp(folder, model, **beside):
    """A sharded checkpoint with the state of an optimizer, by one process without a process group."""
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": 7, **beside}, checkpoint_id=folder)
    return folder


def change_metadata(folder, change):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def save_pieces(folder, tensors, dim, cuts):
    """What several ranks leave: each tensor in pieces along a dimension, an optimizer's state beside them."""
    pieces, where = {}, {}
    for name, tensor in tensors.items():
        ends = [0, *(round(tensor.shape[dim] * c) for c in cuts), tensor.shape[dim]] if tensor.dim() > dim else None
        for start, stop in pairwise(ends) if ends else [(0, 0)]:
            piece = tensor.narrow(dim, start, stop - start).clone() if ends else tensor
            offset = [start if d == dim else 0 for d in range(tensor.dim())]
            pieces[f"{name}@{start}"] = piece
            where[f"{name}@{start}"] = (name, torch.Size(offset), piece.shape)
    dcp.save({**pieces, "optimizer.state": torch.ones(9)}, checkpoint_id=folder)

    def join(metadata):
        infos = {index.fqn: info for index, info in metadata.storage_data.items()}
        tensors_metadata = dict(metadata.state_dict_metadata)
        metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data = {}, {}, {}
        for key, (name, offset, size) in where.items():
            metadata_of_piece = tensors_metadata[key]
            new = TensorStorageMetadata(metadata_of_piece.properties, tensors[name].shape, [])
            joined = metadata.state_dict_metadata.setdefault(f"state_dict.{name}", new)
            joined.chunks.append(ChunkStorageMetadata(offset, size))
            metadata.storage_data[MetadataIndex(f"state_dict.{name}", offset)] = infos[key]
            metadata.planner_data[f"state_dict.{name}"] = ("state_dict", name)
        metadata.state_dict_metadata["optimizer_0.state.x"] = tensors_metadata["optimizer.state"]
        metadata.planner_data["optimizer_0.state.x"] = ("optimizer_0", "state", "x")
        metadata.storage_data[MetadataIndex("optimizer_0.state.x", torch.Size([0]))] = infos["optimizer.state"]

    change_metadata(folder, join)
    return folder


# --- Lightning files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """The base's folder, and checkpoints that one step of a real fit left: of all weights, and of adapters."""
    folder = tmp_path_factory.mktemp("glue")
    base, data = make_model(folder / "base"), make_data(folder / "data", "mnli", n_train=24, n_test=8)
    modules = {}
    for name, lora in (("full", None), ("lora", LoRA(r=4, alpha=12, target_modules=["query", "value"]))):
        module = GLUEModule("mnli", base, lora=lora)
        fit = make_trainer(folder, max_steps=1, limit_val_batches=0, enable_checkpointing=False)
        fit.fit(module, GLUEDataModule("mnli", data))
        fit.save_checkpoint(folder / f"{name}.ckpt")
        modules[name] = module.eval()
    return folder, base, modules


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_fit_of_glue_becomes_the_folder_of_its_classifier(glue, kind, tmp_path, capsys):
    folder, base, modules = glue
    assert main(["export", str(folder / f"{kind}.ckpt"), "--output", str(tmp_path / "out")]) == 0
    stderr = capsys.readouterr().err
    assert f"num_labels is 3, as the head has it (2 in {base})" in stderr
    assert ("4 LoRA adapters merged" in stderr) == (kind == "lora")
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (model.config.architectures, model.config.num_labels) == (["BertForSequenceClassification"], 3)
    expected, logits = modules[kind].model(**TOKENS).logits, model(**TOKENS).logits
    assert torch.equal(logits, expected) if kind == "full" else torch.allclose(logits, expected, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"] == [2, 5, 6, 3]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_with_a_base_it_is_the_delta_of_the_dense_folder(glue, kind, tmp_path):
    folder, base, _ = glue
    source, out = str(folder / f"{kind}.ckpt"), {n: str(tmp_path / n) for n in ("dense", "direct", "delta", "applied")}
    delta = ["--base", base, "--method", "magnitude", "--pruning_rate", "0.8", "--dtype", "bfloat16"]
    assert main(["export", source, "--output", out["dense"]]) == 0
    assert main(["export", source, *delta, "--output", out["direct"]]) == 0
    assert main(["prune", base, out["dense"], *delta[2:], "--output", out["delta"]]) == 0
    (first, other) = (SparseDelta.from_pretrained(out[n]) for n in ("direct", "delta"))
    assert first.info == other.info
    assert first.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(p.values, other.tensors[n].values) for n, p in first.tensors.items())
    assert main(["apply", base, out["direct"], "--output", out["applied"]]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(out["applied"]).config.num_labels == 3
    assert sorted(os.listdir(tmp_path)) == sorted(out)  # no dense folder is left beside the delta


def cases():
    """Fine-tuned model, base: the class, its sizes and its names are found from the tensors."""
    decoder, bert = LlamaConfig(**DECODER), bert_config()
    yield (
        "classifier of a decoder",
        LlamaForSequenceClassification(LlamaConfig(**DECODER, num_labels=5)),
        LlamaForCausalLM(decoder),
    )
    yield "masked language model", BertForMaskedLM(bert), BertModel(bert)
    yield "tokens", BertForTokenClassification(bert_config(num_labels=6)), BertModel(bert)
    yield "bare", BertModel(bert), BertForMaskedLM(bert)
    yield "gpt2", make_decoder("gpt2").bfloat16(), None
    yield "untied", make_decoder(tied=False), None
    longer = make_decoder()
    longer.resize_token_embeddings(290)
    yield "longer vocabulary", longer, make_decoder()
    loose = make_decoder()
    loose.lm_head.weight = torch.nn.Parameter(torch.randn(280, 32))
    yield "a head of its own", loose, make_decoder()
    yield (
        "renamed in files",
        ViTForImageClassification(ViTConfig(**IMAGES)),
        None,
    )
    yield (
        "images",
        ViTForImageClassification(ViTConfig(**IMAGES, num_labels=3)),
        ViTForImageClassification(ViTConfig(**IMAGES)),
    )
    yield "experts", MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=3)), None


@pytest.mark.parametrize("case", [c[0] for c in cases()])
def test_class_sizes_ties_and_names_are_those_of_save_pretrained(case, tmp_path):
    _, model, base = next(c for c in cases() if c[0] == case)
    (base or model).save_pretrained(tmp_path / "base")
    trained(model)
    metric = {"val.total": torch.tensor(3.0)}
    path = save_ckpt(tmp_path / "x.ckpt", model, "net._orig_mod.", tmp_path / "base", **metric)
    assert main(["export", path, "--output", str(tmp_path / "out"), "--max_shard_bytes", "1000000000"]) == 0
    if case == "a head of its own":
        model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "own")
    written, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "own"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(t, written[n]) and t.dtype == written[n].dtype for n, t in expected.items())
    assert same_weights(tmp_path / "out", model)


def test_adapters_of_an_embedding_tied_to_the_head_and_of_transposed_layers(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = make_decoder("gpt2")
    base = save_decoder(tmp_path / "base", "gpt2")
    targets = {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}
    adapted = trained(get_peft_model(model, LoraConfig(r=3, lora_alpha=7, **targets)))
    path = save_ckpt(tmp_path / "x.ckpt", adapted, pretrained=base)
    assert main(["export", path, "--output", str(tmp_path / "out")]) == 2  # alpha is not known
    checkpoint = torch.load(path)
    checkpoint["hyper_parameters"]["lora"] = {"r": 3, "alpha": 7}
    torch.save(checkpoint, path)
    assert main(["export", path, "--output", str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(loaded(**TOKENS).logits, adapted(**TOKENS).logits, atol=1e-4)


def test_dtypes(tmp_path, capsys):
    model = trained(make_decoder())
    base = save_decoder(tmp_path / "base")
    path = save_ckpt(tmp_path / "x.ckpt", model, pretrained=base)
    assert main(["export", path, "--output", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert same_weights(tmp_path / "half", model.bfloat16())
    model.float().model.norm.weight.data[0] = 1e6
    path = save_ckpt(tmp_path / "y.ckpt", model, pretrained=base)
    assert main(["export", path, "--output", str(tmp_path / "out"), "--dtype", "float16"]) == 2
    assert "model.norm.weight has values too large for torch.float16" in capsys.readouterr().err
    assert main(["export", path, "--output", str(tmp_path / "out"), "--dtype", "int8"]) == 2
    assert sorted(os.listdir(tmp_path)) == ["base", "half", "x.ckpt", "y.ckpt"]


# --- sharded checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A decoder with a tied head, its base, and its sharded checkpoint."""
    folder = tmp_path_factory.mktemp("sharded")
    model = trained(make_decoder())
    return save_dcp(folder / "dcp", model), save_decoder(folder / "base"), model


def test_a_folder_of_dcp(sharded, tmp_path):
    folder, base, model = sharded
    options = ["--config_from", base, "--max_shard_bytes", "9000"]
    assert main(["export", str(folder), "--output", str(tmp_path / "out"), *options]) == 0
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 5
    assert same_weights(tmp_path / "out", model)
    assert "lm_head.weight" not in {name for file in files for name in load_file(file)}


@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_of_several_ranks_are_put_together(tmp_path, dim, monkeypatch):
    """Pieces of rows, and of columns; blocks that begin and end within pieces."""
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", 500)
    shapes = {"a": (7, 5), "b": (9,), "c": (2, 6, 3), "scalar": (), "empty": (0, 3)}
    tensors = {n: torch.randn(s).to(torch.bfloat16 if n == "b" else torch.float32) for n, s in shapes.items()}
    folder = save_pieces(tmp_path / "dcp", tensors, dim, (0.3, 0.5))
    read = load_tensors(folder)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(t, read[n]) and t.dtype == read[n].dtype for n, t in tensors.items())
    for tensor in read.values():
        tensor += 1  # private pages: the folder's files stay as they are
    stored = read_sharded(folder)
    assert all(torch.equal(torch.cat(list(t.blocks())), tensors[n].reshape(-1)) for n, t in stored.items() if t.numel)


def test_pieces_of_several_ranks_become_a_model(tmp_path, sharded):
    _, base, model = sharded
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    folder = save_pieces(tmp_path / "epoch=0.ckpt", state, 0, (0.4,))
    torch.save({"hyper_parameters": {"pretrained": base}, "epoch": 1}, folder / "meta.pt")
    assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert same_weights(tmp_path / "out", model)


def test_prune_takes_a_sharded_folder_as_the_finetuned_model(tmp_path, sharded):
    folder, base, model = sharded
    pieces = save_pieces(tmp_path / "pieces", dict(model.state_dict()), 0, (0.4,))
    model.save_pretrained(tmp_path / "dense")
    deltas = []
    for source in (folder, pieces, tmp_path / "dense"):
        out = tmp_path / f"delta{len(deltas)}"
        assert main(["prune", base, str(source), "--output", str(out), "--weights_only"]) == 0
        deltas.append(SparseDelta.from_pretrained(out))
    assert main(["apply", base, str(tmp_path / "delta1"), "--output", str(tmp_path / "applied")]) == 0
    assert deltas[0].info.base_check == deltas[1].info.base_check == deltas[2].info.base_check
    for delta in deltas[:2]:
        assert not delta.carried
        assert all(torch.equal(p.values, deltas[2].tensors[n].values) for n, p in delta.tensors.items())


def test_memory_is_that_of_a_block_and_optimizer_state_is_never_looked_at(tmp_path, sharded, monkeypatch):
    _, base, model = sharded
    folder = save_pieces(tmp_path / "dcp", dict(model.state_dict()), 0, (0.2, 0.7))
    copied, looked = [], []
    view, writer, empty = sharded_checkpoint._Files.view, stored_tensor.StoredTensor.blocks, torch.empty

    def counted(*shape, **settings):
        made = empty(*shape, **settings)
        if made.device.type == "cpu" and not isinstance(made, torch._subclasses.FakeTensor):
            copied.append(made.nbytes)
        return made

    def seen(files, name, *about):
        looked.append(name)
        return view(files, name, *about)

    def blocks(tensor):
        with monkeypatch.context() as patch:
            patch.setattr(stored_tensor.torch, "empty", counted)
            for block in writer(tensor):
                copied.append(block.nbytes)
                yield block

    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(sharded_checkpoint._Files, "view", seen)
    monkeypatch.setattr(stored_tensor.StoredTensor, "blocks", blocks)
    assert main(["export", str(folder), "--output", str(tmp_path / "out"), "--config_from", base]) == 0
    assert max(copied) <= 1024 < 280 * 32 * 4
    assert sum(copied) > 90_000
    assert looked
    assert not any("optim" in name for name in looked)
    assert same_weights(tmp_path / "out", model)


# --- what cannot be exported -----------------------------------------------------------------------------------------


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refused(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_code_in_metadata_is_never_run(tmp_path, sharded, capsys):
    _, base, model = sharded
    folder = save_dcp(tmp_path / "dcp", model)
    options = ["--config_from", base, "--output", tmp_path / "out"]
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    assert "is not the metadata of a torch.distributed.checkpoint" in refused(capsys, folder, *options)
    folder = save_dcp(tmp_path / "dcp2", model)
    change_metadata(folder, lambda m: setattr(m, "storage_meta", Runs(tmp_path / "ran")))
    assert main(["export", str(folder), "--config_from", base, "--output", str(tmp_path / "fine")]) == 0
    torch.save({"hyper_parameters": {"pretrained": base, "hook": Runs(tmp_path / "ran")}}, folder / "meta.pt")
    assert "--config_from" in refused(capsys, folder, "--output", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_incomplete_and_damaged_shards_are_named(tmp_path, sharded, capsys):
    _, base, model = sharded
    options = ["--config_from", base, "--output", tmp_path / "out"]

    def folder():
        return save_dcp(tmp_path / f"dcp{len(os.listdir(tmp_path))}", model)

    gone = folder()
    (gone / "__0_0.distcp").unlink()
    assert "lacks 1 of the 1 files that .metadata names: __0_0.distcp" in refused(capsys, gone, *options)
    short = folder()
    data = (short / "__0_0.distcp").read_bytes()
    (short / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    assert "truncated" in refused(capsys, short, *options)
    (short / "__0_0.distcp").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert "cannot be read" in refused(capsys, short, *options)
    for length in (0, 1, 40, 2000):
        cut = folder()
        whole = (cut / ".metadata").read_bytes()
        (cut / ".metadata").write_bytes(whole[:length])
        assert ".metadata" in refused(capsys, cut, *options)
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "out"))]


def place_elsewhere(metadata):
    for index in metadata.storage_data:
        metadata.storage_data[index] = _StorageInfo("../other/__0_0.distcp", 0, 100)


def lose_a_piece(metadata):
    metadata.state_dict_metadata["model.model.norm.weight"].chunks.clear()


def lose_a_place(metadata):
    metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if "norm.weight" not in i.fqn}


def exchange(metadata):
    first, other = (
        [i for i in metadata.storage_data if i.fqn.startswith("model.model.layers.0.mlp.down_proj")],
        [i for i in metadata.storage_data if i.fqn == "model.model.norm.weight"],
    )
    metadata.storage_data[first[0]] = metadata.storage_data[other[0]]


def compress(metadata):
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (place_elsewhere, "expected files inside the folder, got '../other"),
        (lose_a_piece, "the pieces of model.model.norm.weight hold 0 of its 32 entries"),
        (lose_a_place, "does not say where"),
        (exchange, "is not the torch.float32 (32, 48)"),
        (compress, "compressed"),
        (lambda m: m.state_dict_metadata.clear(), "no tensors of a model"),
        (lambda m: setattr(m, "storage_data", 3), "does not describe a checkpoint"),
    ],
)
def test_metadata_that_does_not_hold_together(tmp_path, sharded, capsys, change, message):
    _, base, model = sharded
    folder = save_dcp(tmp_path / "dcp", model)
    change_metadata(folder, change)
    assert message in refused(capsys, folder, "--config_from", base, "--output", tmp_path / "out")
    assert os.listdir(tmp_path) == ["dcp"]


def test_what_does_not_fit_is_listed_and_nothing_is_written(tmp_path, sharded, glue, capsys):
    folder, base, model = sharded
    out = ["--output", tmp_path / "out"]
    state = model.state_dict()
    state["model.layers.0.extra.weight"] = torch.ones(3)
    del state["model.norm.weight"]
    torch.save({"state_dict": {f"lit.{n}": t for n, t in state.items()}}, tmp_path / "x.ckpt")
    error = refused(capsys, tmp_path / "x.ckpt", "--config_from", base, *out)
    assert "not those of Qwen2ForCausalLM (under 'lit.')" in error
    assert "missing model.norm.weight" in error
    assert "unexpected lit.model.layers.0.extra.weight" in error
    assert "none of BertModel is there; the checkpoint has " in refused(capsys, folder, "--config_from", glue[1], *out)
    narrow = save_decoder(tmp_path / "narrow", "qwen2", positions=64)
    config = (
        (tmp_path / "narrow" / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 40')
    )
    (tmp_path / "narrow" / "config.json").write_text(config)
    error = refused(capsys, folder, "--config_from", narrow, *out)
    assert "model.layers.0.mlp.gate_proj.weight is (48, 32), the configuration says (40, 32)" in error
    assert not (tmp_path / "out").exists()


def test_of_two_models_one_must_be_chosen(tmp_path, capsys):
    torch.manual_seed(0)
    student, teacher = (trained(BertForSequenceClassification(bert_config()), seed) for seed in (1, 2))
    base = make_model(tmp_path / "base")
    beside = {f"teacher.{n}": t for n, t in teacher.state_dict().items()}
    path = save_ckpt(tmp_path / "x.ckpt", student, "student.", base, **beside)
    out = ["--output", tmp_path / "out"]
    assert "choose with --prefix one of 'student.', 'teacher.'" in refused(capsys, path, *out)
    assert main(["export", path, "--prefix", "teacher", *map(str, out)]) == 0
    assert "left out" in capsys.readouterr().err
    assert same_weights(tmp_path / "out", teacher)


def test_sources_and_options_are_checked_first(tmp_path, sharded, glue, capsys):
    folder = sharded[0]
    full, out = glue[0] / "full.ckpt", ["--output", tmp_path / "out"]
    assert "no such checkpoint" in refused(capsys, tmp_path / "nowhere", *out)
    assert "checkpoints in it are" in refused(capsys, glue[0], *out)
    assert "give its folder or hub id with --config_from" in refused(capsys, folder, *out)
    (tmp_path / "full").mkdir()
    assert "has no config.json" in refused(capsys, folder, "--config_from", tmp_path / "full", *out)
    assert "--config_from" in refused(capsys, folder, "--config_from", tmp_path / "nowhere", *out)
    assert "--seed: only of a delta folder" in refused(capsys, full, "--seed", "1", *out)
    assert "no such model class" in refused(capsys, full, "--architecture", "BertForNothing", *out)
    delta = ["--base", glue[1], *out]
    assert "1.5" in refused(capsys, full, "--pruning_rate", "1.5", *delta)
    assert "needs calibration data" in refused(capsys, full, "--method", "wanda", *delta)
    assert "nowhere" in refused(capsys, full, "--base", tmp_path / "nowhere", *out)
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert "holds mine.txt, not a model" in refused(capsys, full, "--output", tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"]


# --- shards of a real Trainer ----------------------------------------------------------------------------------------


class Lit(pl.LightningModule):
    """A decoder in shards, as anybody would write it."""

    def __init__(self, pretrained, fsdp2):
        super().__init__()
        self.save_hyperparameters({"pretrained": pretrained})
        self.folder, self.fsdp2 = pretrained, fsdp2

    def configure_model(self):
        if hasattr(self, "model"):
            return
        self.model = AutoModelForCausalLM.from_pretrained(self.folder)
        if self.fsdp2:
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class CPUFSDP(FSDPStrategy):
    """Lightning's FSDP1 for a machine without a GPU."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(module=model, device_id=torch.device("cpu"), **self.kwargs)


def fit_in_shards(base, folder, fsdp2):
    """One step on every rank; the sharded checkpoint, and its weights whole in one file."""
    if fsdp2:
        world = int(os.environ["WORLD_SIZE"])
        strategy = ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=True
        )
    else:
        strategy = CPUFSDP(use_orig_params=True, sharding_strategy="FULL_SHARD", state_dict_type="sharded")
    module, devices = Lit(base, fsdp2), int(os.environ["WORLD_SIZE"])
    fit = make_trainer(folder.parent, devices=devices, strategy=strategy, max_steps=1, enable_checkpointing=False)
    fit.fit(module, torch.utils.data.DataLoader(torch.arange(80).reshape(8, 10), 2))
    fit.save_checkpoint(folder)
    if fsdp2:
        state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in module.model.state_dict().items()}
    else:
        with FullyShardedDataParallel.summon_full_params(fit.strategy.model, writeback=False):
            state = {n.replace("_fsdp_wrapped_module.", ""): t.clone() for n, t in module.model.named_parameters()}
    if fit.is_global_zero:
        torch.save(state, folder.parent / "whole.pt")
    return sorted(os.listdir(folder))


@pytest.mark.distributed
@pytest.mark.parametrize(("fsdp2", "world"), [(True, 1), (True, 2), (False, 2)])
def test_shards_of_a_fit_on_several_ranks(tmp_path, fsdp2, world):
    import distjobs

    base = save_decoder(tmp_path / "base")
    folder = tmp_path / "epoch=0.ckpt"
    files = distjobs.run(fit_in_shards, world, base, folder, fsdp2, lightning=True)[0]
    assert files == [".metadata", *(f"__{rank}_0.distcp" for rank in range(world)), "meta.pt"]
    assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == 0
    expected, loaded = torch.load(tmp_path / "whole.pt"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(t, expected[n]) for n, t in loaded.named_parameters())
    assert not torch.equal(loaded.model.norm.weight, AutoModelForCausalLM.from_pretrained(base).model.norm.weight)
    assert main(["prune", base, str(folder), "--output", str(tmp_path / "delta")]) == 0
    assert main(["export", str(folder), "--base", base, "--output", str(tmp_path / "same")]) == 0
    first, other = (SparseDelta.from_pretrained(tmp_path / n) for n in ("delta", "same"))
    assert all(torch.equal(p.values, other.tensors[n].values) for n, p in first.tensors.items())
