"""Calibration from files: what is compared, what a batch may hold, text for models of several kinds, refusals in a line."""

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from dpp_lightning import SparseDelta, prune
from dpp_lightning.cli.prune import prune_to_folder
from dpp_lightning.pruning.calibration_batch import ModelClass, read_batch
from dpp_lightning.pruning.file_calibration import FileCalibration, compared_outputs
from dpp_lightning.tensors.names import canonical_tensors

WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
}
T5 = {
    "d_model": 16,
    "d_ff": 24,
    "d_kv": 8,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 30,
    "decoder_start_token_id": 0,
}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXTS = "the cat sat\n\na dog ran away\nthe mat\ncat\na cat ran\n"


def folder(path, kind: str, config: str, settings: dict, *, dtype=torch.float32, tokenizer: dict | None = None):
    torch.manual_seed(0)
    getattr(transformers, kind)(getattr(transformers, config)(**settings)).to(dtype).save_pretrained(path)
    if tokenizer is not None:
        words = {"[PAD]": 0, "</s>": 1, "[UNK]": 2, **{w: i for i, w in enumerate(TEXTS.split(), 3)}}
        made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, **tokenizer).save_pretrained(path)
    return path


def text(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(TEXTS)
    return path


def batch(tmp_path, **tensors):
    path = tmp_path / "batch.safetensors"
    save_file(tensors, path)
    return path


GPU = "cuda"
FULL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "</s>"}


@pytest.mark.parametrize("tokenizer", [FULL, {"unk_token": "[UNK]"}, {"unk_token": "[UNK]", "eos_token": "</s>"}])
@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "GPT2ForSequenceClassification"])
def test_text_does_for_an_encoder_decoder_and_for_a_tokenizer_without_padding(tmp_path, tokenizer, kind):
    settings = T5 if kind.startswith("T5") else {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30}
    source = folder(
        tmp_path / "m", kind, "T5Config" if kind.startswith("T5") else "GPT2Config", settings, tokenizer=tokenizer
    )
    data = FileCalibration(source, text(tmp_path))
    inputs = data.layer_inputs()
    words = len(TEXTS.split())
    assert len(data.batch["input_ids"]) == 5
    if kind.startswith("T5"):
        assert inputs["encoder.block.0.layer.0.SelfAttention.q.weight"].tokens == words
        assert inputs["decoder.block.0.layer.0.SelfAttention.q.weight"].tokens == words
        assert inputs["decoder.block.0.layer.1.EncDecAttention.k.weight"].tokens == words
    else:
        assert inputs["h.0.attn.c_attn.weight"].tokens == words


@pytest.mark.parametrize("start", [{}, {"decoder_start_token_id": None}])
def test_an_encoder_decoder_without_a_first_token_is_refused_with_the_cure(tmp_path, start):
    settings = {name: value for name, value in T5.items() if name != "decoder_start_token_id"} | start
    source = folder(tmp_path / "m", "T5ForConditionalGeneration", "T5Config", settings, tokenizer=FULL)
    with pytest.raises(ValueError, match=r"no first token .*: name a decoder_start_token_id in config.json, or give"):
        FileCalibration(source, text(tmp_path)).layer_inputs()


def test_pixels_have_the_model_s_dtype_and_all_towers_are_seen(tmp_path):
    config = {
        "text_config": {**WIDTHS, "eos_token_id": 2},
        "vision_config": {**VISION, "image_size": 16, "patch_size": 8},
    }
    source = folder(tmp_path / "m", "CLIPModel", "CLIPConfig", config, dtype=torch.bfloat16)
    path = batch(
        tmp_path, pixel_values=torch.randn(3, 3, 16, 16), input_ids=torch.randint(3, 30, (2, 7), dtype=torch.int32)
    )
    inputs = FileCalibration(source, path).layer_inputs()
    assert inputs["vision_model.encoder.layers.0.mlp.fc1.weight"].tokens == 15
    assert inputs["text_model.encoder.layers.0.mlp.fc1.weight"].tokens == 14


def test_all_kinds_of_logits_are_compared_else_the_first_output():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert compared_outputs({"loss": torch.tensor(1.0), "start_logits": a, "end_logits": b}).keys() == {
        "start_logits",
        "end_logits",
    }
    assert compared_outputs({"loss": torch.tensor(1.0), "logits": a, "router_logits": (b,)}).keys() == {"logits"}
    assert compared_outputs({"last_hidden_state": a, "pooler_output": b}).keys() == {"last_hidden_state"}
    with pytest.raises(ValueError, match="no tensor that could be compared, but ids"):
        compared_outputs({"ids": torch.ones(2, dtype=torch.long)})


@pytest.mark.parametrize(
    "kind", ["BertModel", "BertForMaskedLM", "BertForQuestionAnswering", "T5ForConditionalGeneration"]
)
def test_what_stands_on_padding_plays_no_part(tmp_path, kind):
    config, settings = ("T5Config", T5) if kind.startswith("T5") else ("BertConfig", WIDTHS)
    source = folder(tmp_path / "m", kind, config, settings)
    ids, mask = torch.randint(3, 30, (2, 6)), torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    data = FileCalibration(source, batch(tmp_path, input_ids=ids, attention_mask=mask))
    model, ready = data._ready()
    with torch.no_grad():
        outputs = data._outputs(model, ready)
    assert all(len(output) == 8 for output in outputs)
    assert len(outputs) == (2 if "Question" in kind else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["model", "block"])
@pytest.mark.parametrize("method", ["refit", "lowrank", "darex-q", "wanda"])
def test_a_model_on_a_gpu_is_calibrated_as_on_the_cpu(tmp_path, method, loss):
    base = folder(tmp_path / "base", "BertForSequenceClassification", "BertConfig", WIDTHS, tokenizer=FULL)
    tuned = folder(tmp_path / "tuned", "BertForSequenceClassification", "BertConfig", WIDTHS, tokenizer=FULL)
    model = transformers.BertForSequenceClassification.from_pretrained(tuned)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tuned)
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(["the cat sat", "a dog", "ran away the mat"] * 16))
    trains = method in ("refit", "lowrank")
    settings = {"method_settings": {"steps": 25, "loss": loss}} if trains else {}
    deltas = []
    for device in ("cpu", GPU):
        out = str(tmp_path / f"on {device}")
        settings |= {"calibration": str(lines), "device": device, "output": out, "overwrite": True}
        prune_to_folder(str(base), str(tuned), method=method, pruning_rate=0.9, **settings)
        deltas.append(SparseDelta.from_pretrained(out))
    if trains:
        after = [delta.info.training["held_out_after"] for delta in deltas]
        assert after[1] == pytest.approx(after[0], rel=0.05)
    else:
        assert deltas[1].q == pytest.approx(deltas[0].q)


@pytest.mark.parametrize("name", ["nowhere", "meta"])
def test_a_device_that_is_not_there_is_refused(tmp_path, name):
    source = folder(tmp_path / "m", "BertModel", "BertConfig", WIDTHS, tokenizer=FULL)
    with pytest.raises(ValueError, match=f"--device {name} cannot be used here .*; try --device cpu"):
        FileCalibration(source, text(tmp_path), device=name)


def test_a_fit_without_gradients_and_one_with_them_start_from_no_change(tmp_path):
    source = folder(tmp_path / "m", "BertForMaskedLM", "BertConfig", WIDTHS, tokenizer=FULL)
    data = FileCalibration(source, text(tmp_path))
    model = transformers.BertForMaskedLM.from_pretrained(source)
    base = {name: tensor.detach().clone() for name, tensor in canonical_tensors(model).items()}
    objective = data.objective(base, gradients=True)
    tuned = {
        name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in base.items() if name.endswith("dense.weight")
    }
    delta = prune({name: base[name] for name in tuned}, tuned, "dare", 0.0)
    nothing = delta.rescaled(1e9)
    assert objective.cost(nothing) == pytest.approx(0.0, abs=1e-6)
    assert objective.cost(delta) > 1e-4
    assert objective.gradients.loss(nothing, 0) == pytest.approx(0.0, abs=1e-8)


def refusals(tmp_path):
    bert = folder(tmp_path / "bert", "BertModel", "BertConfig", WIDTHS, tokenizer=FULL)
    bare = folder(tmp_path / "bare", "BertModel", "BertConfig", WIDTHS)
    vit = folder(tmp_path / "vit", "ViTModel", "ViTConfig", {**VISION, "image_size": 16, "patch_size": 8})
    t5 = folder(tmp_path / "t5", "T5ForConditionalGeneration", "T5Config", T5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nothing-of-the-kind"}')
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"model_type": "bert", "architectures": ["MyOwnModel"]}')
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    ids = torch.randint(3, 30, (4, 6))

    def file(**tensors):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file(tensors, path)
        return path

    texts = text(tmp_path)
    return [
        (bare, texts, "texts.txt is text, .*tokenizer.*safetensors batch.*input_ids"),
        (vit, texts, "texts.txt is text, which ViTModel does not take: .*pixel_values"),
        (
            bert,
            file(input_ids=ids, pixel_values=torch.ones(4, 3)),
            "holds pixel_values, which BertModel does not take; it takes input_ids",
        ),
        (bert, file(input_ids=ids, attention_mask=torch.ones(3, 6)), "input_ids has 4 rows and attention_mask 3"),
        (
            bert,
            file(input_ids=ids + 900),
            "has indices beyond a table of BertModel, such as token ids of a larger vocabulary .*given are input_ids",
        ),
        (
            t5,
            file(attention_mask=ids),
            "T5ForConditionalGeneration is an encoder-decoder: it needs decoder_input_ids or labels",
        ),
        (bert, tmp_path / "bad.safetensors", "bad.safetensors is no file of tensors"),
        (tmp_path / "empty", texts, "has no config.json"),
        (tmp_path / "odd", texts, "transformers cannot read its config.json: .*nothing-of-the-kind"),
        (tmp_path / "own", texts, "names no architecture of transformers .architectures: .'MyOwnModel'"),
        (bert / "model.safetensors", texts, "is a file of weights: calibration runs the fine-tuned model"),
    ]


def test_what_cannot_be_is_refused_in_one_line_with_the_cure(tmp_path):
    for source, path, message in refusals(tmp_path):
        with pytest.raises(ValueError, match=message) as error:
            FileCalibration(source, path).layer_inputs()
        assert "\n" not in str(error.value)


def test_a_batch_of_more_patches_than_examples_is_taken_whole_or_refused(tmp_path):
    class Kind(nn.Module):
        main_input_name = "input_ids"

        def forward(self, input_ids, attention_mask=None, pixel_values=None):
            raise NotImplementedError

    model = ModelClass("m", None, Kind, transformers.BertConfig())
    path = batch(tmp_path, input_ids=torch.ones(2, 5, dtype=torch.long), pixel_values=torch.ones(12, 7))
    assert read_batch(model, path, 2, 8)["pixel_values"].shape == (12, 7)
    with pytest.raises(ValueError, match=r"holds 2 examples, of which 1 would be used.*input_ids 2.*pixel_values 12"):
        read_batch(model, path, 1, 8)


def test_weights_that_the_files_lack_are_named(tmp_path):
    source = folder(tmp_path / "m", "BertModel", "BertConfig", WIDTHS, tokenizer=FULL)
    config = (source / "config.json").read_text().replace('"BertModel"', '"BertForSequenceClassification"')
    (source / "config.json").write_text(config)
    with pytest.warns(UserWarning, match="lacks 2 weights of a BertForSequenceClassification.*classifier.bias"):
        FileCalibration(source, text(tmp_path)).layer_inputs()
