"""dpp plan: the table of memory_plan for a model that is named, sized, or read from its files' headers."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_causal import make_decoder

from dpp_lightning.analysis.memory_plan import GIB, MODELS, ModelShape, table
from dpp_lightning.cli import main

BLOCK = 60  # parameters of one block of the model below


@pytest.fixture
def model(tmp_path):
    """Two blocks, the second larger, and an embedding outside of them."""
    tensors = {
        "model.embed_tokens.weight": torch.zeros(7, 4),
        "model.layers.0.mlp.weight": torch.zeros(5, 12),
        "model.layers.1.mlp.weight": torch.zeros(5, 12),
        "model.layers.1.norm.weight": torch.zeros(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_without_a_model_the_table_of_four_sizes(capsys):
    assert main(["plan"]) == 0
    assert capsys.readouterr().out == table() + "\n"
    options = ["--devices", "2", "4", "--weights", "bfloat16", "--compute", "float32", "--pruning_rate", "0.9"]
    assert main(["plan", *options]) == 0
    expected = table(MODELS, (2, 4), weights="bfloat16", compute="float32", pruning_rate=0.9)
    assert capsys.readouterr().out == expected + "\n"


def test_a_size(capsys):
    assert main(["plan", "--parameters", "7e9", "--blocks", "32", "--outside", "262144000", "--devices", "1"]) == 0
    assert capsys.readouterr().out == table({"7 B": MODELS["7 B"]}, [1]) + "\n"


def test_a_folder_s_shapes(model, capsys):
    assert main(["plan", str(model), "--devices", "1", "2"]) == 0
    shape = ModelShape(28 + 2 * BLOCK + 3, 2, 28, BLOCK + 3)
    assert capsys.readouterr().out == table({model.name: shape}, [1, 2]) + "\n"


def test_a_tied_head_counts_once(tmp_path, capsys):
    decoder = make_decoder()
    decoder.save_pretrained(tmp_path / "decoder")
    assert main(["plan", str(tmp_path / "decoder"), "--devices", "1"]) == 0
    head, embedding = decoder.lm_head.weight, decoder.model.embed_tokens.weight
    assert head is embedding
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in decoder.model.layers]
    total = sum(p.numel() for p in decoder.parameters())
    shape = ModelShape(total, len(blocks), total - sum(blocks), max(blocks))
    assert capsys.readouterr().out == table({"decoder": shape}, [1]) + "\n"


def test_masks_and_tables_of_positions_are_no_parameters(model, capsys):
    tensors = load_file(model / "model.safetensors")
    extra = {"h.0.attn.bias": torch.zeros(1, 1, 9, 9), "h.0.attn.masked_bias": torch.zeros(1),
             "embeddings.position_ids": torch.zeros(1, 9, dtype=torch.int64)}  # fmt: skip
    save_file(tensors | extra, model / "model.safetensors")
    assert main(["plan", str(model), "--devices", "1"]) == 0
    shape = ModelShape(28 + 2 * BLOCK + 3, 2, 28, BLOCK + 3)
    assert capsys.readouterr().out == table({model.name: shape}, [1]) + "\n"


@pytest.mark.parametrize("words", [["MODEL", "--blocks", "3"], ["MODEL", "--outside", "9"], ["--revision", "v1"]])
def test_an_option_that_would_do_nothing_is_refused(model, words, capsys):
    assert main(["plan", *(str(model) if word == "MODEL" else word for word in words)]) == 2
    assert words[-2] in capsys.readouterr().err


def test_of_a_hub_id_only_headers_are_read(monkeypatch, capsys):
    asked = []

    def metadata(repo_id, *, revision):
        asked.append((repo_id, revision))
        shards = [{"a.layers.0.w": 60}, {"a.layers.1.w": 63, "a.embed.w": 28}]
        files = {
            str(i): SimpleNamespace(
                tensors={n: SimpleNamespace(parameter_count=c, dtype="F32", shape=[c]) for n, c in shard.items()}
            )
            for i, shard in enumerate(shards)
        }
        return SimpleNamespace(files_metadata=files)

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    assert main(["plan", "us/model", "--revision", "v1", "--devices", "8"]) == 0
    assert asked == [("us/model", "v1")]
    assert capsys.readouterr().out == table({"model": ModelShape(151, 2, 28, 63)}, [8]) + "\n"


def test_the_fewest_devices(capsys):
    """Of GIB / 4 parameters in one block, float32: 5 GiB on one device; on N: 5 / N and twice the model, 2 GiB."""
    words = ["plan", "--parameters", str(GIB // 4), "--devices", "1", "--device_gib"]
    for memory, counts in (("5", "1 / 1"), ("4.5", "2 / 1"), ("3.25", "4 / 4"), ("2", "more than any number / more")):
        assert main([*words, memory]) == 0
        assert f"devices of {memory} GiB at least" in (error := capsys.readouterr().err)
        assert counts in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parameters", "0"], "parameters must be a finite number above 0"),
        (["--devices", "0"], "devices must be a whole number, at least 1"),
        (["--device_gib", "0"], "device_gib is the memory of a device"),
        (["--pruning_rate", "1"], "[0, 1)"),
        (["./nowhere"], "no such file or folder"),
        (["us/model", "--parameters", "3"], "not both"),
    ],
)
def test_what_is_out_of_range_is_told_in_a_line(words, said, capsys):
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
