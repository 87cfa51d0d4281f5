"""Calibration files of many examples: cut into pieces, pairs of texts, timm's folders, and training on the pieces."""

import json

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from dpp_lightning import prune
from dpp_lightning.calibration.pieces import by_length, pieces_of, without_padded_ends
from dpp_lightning.pruning import file_calibration
from dpp_lightning.pruning.file_calibration import FileCalibration
from dpp_lightning.tensors.names import canonical_tensors

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
WORDS = ["the", "cat", "sat", "a", "dog", "ran", "away", "mat"]


def bert(seed: int) -> transformers.BertForSequenceClassification:
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE)).eval()


def texts(count: int) -> list[str]:
    return [" ".join(WORDS[(i + j) % 8] for j in range(1 + i % 5)) for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "finetuned"
    bert(1).save_pretrained(path)
    known = {"[PAD]": 0, "[UNK]": 1, **{word: i for i, word in enumerate(WORDS, 2)}}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(path)
    return path


def test_pieces_hold_every_example_once_and_what_has_no_rows_is_in_all():
    batch = {"x": torch.arange(19), "y": torch.arange(38).reshape(19, 2), "scale": torch.tensor(3.0)}
    pieces = pieces_of(batch, 8)
    assert [len(piece["x"]) for piece in pieces] == [8, 8, 3]
    assert torch.equal(torch.cat([piece["y"] for piece in pieces]), batch["y"])
    assert all(piece["scale"] == 3.0 for piece in pieces)


def test_sorted_pieces_lose_the_columns_that_are_padding_of_all_and_no_token():
    lengths = [5, 1, 4, 2, 3, 1]
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(1, 37).reshape(6, 6) * mask
    pieces = [
        without_padded_ends(piece) for piece in pieces_of(by_length({"input_ids": ids, "attention_mask": mask}), 2)
    ]
    assert [piece["input_ids"].shape[1] for piece in pieces] == [1, 3, 5]
    kept = torch.cat([piece["input_ids"].flatten() for piece in pieces])
    assert sorted(kept[kept != 0].tolist()) == sorted(ids[ids != 0].tolist())


def test_padding_before_the_tokens_stays_as_positions_count_from_there():
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
    assert without_padded_ends({"input_ids": mask, "attention_mask": mask})["input_ids"].shape == (2, 4)


def test_output_change_and_inputs_of_pieces_are_those_of_the_whole_batch(folder, tmp_path, monkeypatch):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts(23)))
    base, tuned = canonical_tensors(bert(0)), canonical_tensors(bert(1))
    delta = prune(base, tuned, "magnitude", 0.5)
    found = []
    for at_once in (64, 5):
        monkeypatch.setattr(file_calibration, "_AT_ONCE", at_once)
        data = FileCalibration(folder, file)
        found.append((data.objective(base, gradients=False).cost(delta), data.layer_inputs()))
    (whole, inputs), (cut, cut_inputs) = found
    assert cut == pytest.approx(whole, rel=1e-5)
    assert whole > 0
    for name, statistics in inputs.items():
        torch.testing.assert_close(cut_inputs[name].squares, statistics.squares, rtol=1e-4, atol=1e-6)


def test_two_columns_are_pairs_and_other_counts_are_refused(folder, tmp_path):
    pairs, triples = tmp_path / "pairs.tsv", tmp_path / "three.tsv"
    pairs.write_text("the cat\ta dog\nsat\tran away\n")
    triples.write_text("the\tcat\tsat\n")
    batch = FileCalibration(folder, pairs).batch
    assert batch["attention_mask"].sum(1).tolist() == [4, 3]
    with pytest.raises(ValueError, match="3 columns"):
        FileCalibration(folder, triples)


def test_kept_values_are_trained_on_a_file_of_texts_and_never_worse_held_out(folder, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts(136)))
    data = FileCalibration(folder, file, samples=136)
    delta = prune(canonical_tensors(bert(0)), canonical_tensors(bert(1)), "refit", 0.9, calibration=data)
    told = delta.info.training
    assert told["texts"] == 136
    assert told["held_out_after"] <= told["held_out_before"]


def test_a_folder_of_timm_is_calibrated_on_a_batch_of_pixels(tmp_path):
    kind = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kind)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": kind, "pretrained_cfg": {}}
    path, file = tmp_path / "timm", tmp_path / "pixels.safetensors"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), path / "model.safetensors")
    save_file({"pixel_values": torch.randn(9, 3, 32, 32)}, file)
    tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in tuned.items()}
    cost = FileCalibration(path, file).objective(base, gradients=False).cost
    whole, half = prune(base, tuned, "magnitude", 0.01), prune(base, tuned, "magnitude", 0.99)
    assert cost(whole) < cost(half)
