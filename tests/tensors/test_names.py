"""One name per tensor, whatever wraps it; weights from folders."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

from dpp_lightning import prune
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.tensors.fingerprint import hash_tensors
from dpp_lightning.tensors.name_matching import SeveralModelsError, match_names
from dpp_lightning.tensors.names import buffer_names, canonical_names, canonical_tensors

TINY = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


class Wrapped(nn.Module):
    """As a LightningModule holds its model."""

    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TINY, max_position_embeddings=20))


def test_a_bare_encoder_a_classifier_and_wrapped_ones_agree(classifier):
    bare = set(canonical_tensors(BertModel(classifier.config)))
    full = set(canonical_tensors(classifier))
    assert full == bare | {"classifier.weight", "classifier.bias"}
    assert set(canonical_tensors(Wrapped(classifier))) == full
    assert set(canonical_tensors(Wrapped(torch.compile(classifier)))) == full
    assert set(canonical_tensors(classifier.state_dict())) == full
    assert set(canonical_tensors(Wrapped(Wrapped(classifier)).state_dict())) == full
    names = canonical_names(Wrapped(classifier))
    assert names["model.bert.pooler.dense.bias"] == "pooler.dense.bias"
    assert names["model.classifier.weight"] == "classifier.weight"


def test_tied_heads_are_one_tensor():
    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    names = set(canonical_tensors(GPT2LMHeadModel(config)))
    assert "wte.weight" in names
    assert "lm_head.weight" not in names


def test_names_that_would_become_one_keep_theirs():
    state = {"bert.pooler.weight": torch.zeros(1), "pooler.weight": torch.ones(1), "bert.x": torch.ones(2)}
    assert set(canonical_tensors(state)) == {"bert.pooler.weight", "pooler.weight", "x"}


def test_align_bridges_one_unknown_prefix():
    assert match_names(["a.w", "b.w"], ["net.a.w", "net.b.w", "net.c"]) == {"a.w": "net.a.w", "b.w": "net.b.w"}
    assert match_names(["net.a.w", "head.w"], ["a.w"]) == {"net.a.w": "a.w"}
    assert match_names(["a.w"], ["a.w", "net.a.w"]) == {"a.w": "a.w"}
    assert match_names(["a"], ["b"]) == {}


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.mlp.up.weight", "model.layers.1.mlp.up.weight", "model.embed_tokens.weight", "lm_head.weight"],
        ["bert.encoder.layer.0.output.weight", "bert.embeddings.weight", "bert.pooler.weight", "classifier.weight"],
        ["transformer.h.0.attn.weight", "transformer.h.1.attn.weight", "transformer.wte.weight"],
        [
            "encoder.block.0.layer.0.q.weight",
            "encoder.block.1.layer.0.q.weight",
            "shared.weight",
            "decoder.block.0.q.w",
        ],
        ["stages.0.blocks.0.conv.weight", "stages.1.blocks.0.conv.weight", "stem.weight"],
        ["backbone.layers.0.mixer.weight", "backbone.embeddings.weight"],
        ["language_model.model.layers.0.q.weight", "vision_tower.vision_model.encoder.layers.0.q.weight"],
    ],
)
def test_a_name_does_not_depend_on_which_tensors_came_along(names):
    state = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    of_all = {float(tensor): name for name, tensor in canonical_tensors(state).items()}
    in_blocks = {name: tensor for name, tensor in state.items() if ".0." in name or ".1." in name}
    for subset in (in_blocks, dict([*state.items()][:2])):
        assert {float(t): n for n, t in canonical_tensors(subset).items()}.items() <= of_all.items()


def test_old_spellings_are_those_of_today():
    state = {
        "bert.a.LayerNorm.gamma": torch.zeros(1),
        "bert.a.LayerNorm.beta": torch.ones(1),
        "c.weight_g": torch.ones(2),
    }
    assert set(canonical_tensors(state)) == {
        "a.LayerNorm.weight", "a.LayerNorm.bias", "c.parametrizations.weight.original0"
    }  # fmt: skip


def test_several_models_under_one_name_are_not_guessed():
    offered = ["a.w", "b.w", "c.w"]
    wanted = [f"{holder}.{name}" for holder in ("student", "teacher") for name in offered]
    with pytest.raises(SeveralModelsError, match=r"there 2 times, under 'student\.', 'teacher\.'"):
        match_names(wanted, offered)


def test_a_prefix_of_several_parts_is_bridged_and_few_look_alikes_are_not():
    assert match_names(["lit.net.a.w", "lit.net.b.w"], ["a.w", "b.w"]) == {"lit.net.a.w": "a.w", "lit.net.b.w": "b.w"}
    names = [f"blocks.{i}.norm.weight" for i in range(3)]
    assert match_names([*names, "norm.weight"], [*names, "blocks.3.norm.weight"]) == {name: name for name in names}


def test_a_checkpoint_takes_the_names_of_the_bases_files(tmp_path):
    """Of decoders with tied heads all names share their first part, in a trainer's checkpoint two."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    base.save_pretrained(tmp_path / "base")
    files = load_tensors(tmp_path / "base")
    held = {f"net.model.{name}": tensor + 0.1 for name, tensor in files.items()}
    delta = prune(files, held, "dare", 0.5)
    assert {delta.info.saved_name(name) for name in delta.tensors} == set(files)


def test_buffers_are_told_from_parameters():
    assert buffer_names(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))) == {
        "0.running_mean",
        "0.running_var",
        "0.num_batches_tracked",
    }


@pytest.mark.parametrize("shard", ["5KB", "1GB"])
def test_prune_reads_folders_with_and_without_shards(tmp_path, classifier, shard):
    base = BertModel(classifier.config)
    base.save_pretrained(tmp_path / "base", max_shard_size=shard)
    classifier.save_pretrained(tmp_path / "tuned", max_shard_size=shard)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == (1 if shard == "1GB" else 6) or shard != "1GB"
    from_folders = prune(tmp_path / "base", tmp_path / "tuned", "dare", 0.9, seed=1)
    in_memory = prune(base, Wrapped(classifier), "dare", 0.9, seed=1)
    assert from_folders.tensors.keys() == in_memory.tensors.keys()
    assert set(from_folders.carried) == {"classifier.weight", "classifier.bias"}
    for name, part in in_memory.tensors.items():
        assert torch.equal(part.indices, from_folders.tensors[name].indices)
        assert torch.equal(part.values, from_folders.tensors[name].values)
    assert from_folders.base_fingerprint == in_memory.base_fingerprint
    target = BertForSequenceClassification(classifier.config)
    target.bert.load_state_dict(base.state_dict())
    from_folders.apply_(target)
    assert torch.equal(target.classifier.weight, classifier.classifier.weight)


def test_folders_without_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors"):
        load_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_tensors("./nowhere")


def test_hash_depends_on_name_dtype_shape_and_bytes():
    base = {"a": torch.arange(6.0)}
    hashes = {
        hash_tensors(base),
        hash_tensors({"b": base["a"]}),
        hash_tensors({"a": base["a"].view(2, 3)}),
        hash_tensors({"a": base["a"].view(torch.int32)}),
        hash_tensors({"a": base["a"] + 1e-6}),
        hash_tensors({}),
    }
    assert len(hashes) == 6
    assert hash_tensors({"x": torch.ones(2), "a": torch.empty(0)}) == hash_tensors(
        {"a": torch.empty(0), "x": torch.ones(2)}
    )
    assert hash_tensors({"a": torch.ones(2, 3).t()}) == hash_tensors({"a": torch.ones(3, 2)})
