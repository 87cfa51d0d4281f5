"""Predictions as readable lines: in the data's order, described by the DataModule, whole or not at all."""

import json
import shutil

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import trainer
from tiny_causal import make_rows, save_decoder, write_rows
from tiny_glue import make_data, make_model
from torch.utils.data import DataLoader, TensorDataset

from dpp_lightning import prune
from dpp_lightning.callbacks import WritePredictions
from dpp_lightning.callbacks.apply_delta import ApplyDelta
from dpp_lightning.cli import main
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule


class Doubles(pl.LightningModule):
    """Predicts twice its input, in the form that ``form`` makes of it."""

    def __init__(self, form=lambda value: value):
        super().__init__()
        self.form = form

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.form(2 * batch[0])


def numbers(count, start=0, **settings):
    return DataLoader(TensorDataset(torch.arange(start, start + count)), batch_size=4, **settings)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("form", [lambda value: value, list, lambda value: value.tolist(), lambda value: value.numpy()])
def test_one_line_a_sample_in_the_datas_order(tmp_path, form):
    shuffled = numbers(
        10, sampler=torch.utils.data.RandomSampler(range(10), generator=torch.Generator().manual_seed(1))
    )
    trainer(WritePredictions(str(tmp_path / "out.jsonl"))).predict(Doubles(form), shuffled)
    assert lines_of(tmp_path / "out.jsonl") == [{"index": i, "prediction": 2 * i} for i in range(10)]


def test_several_loaders_are_told_apart(tmp_path):
    writer = WritePredictions(str(tmp_path / "out.jsonl"))
    trainer(writer).predict(Doubles(), [numbers(5), numbers(3, start=100)])
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["dataloader"] for line in lines] == [0] * 5 + [1] * 3
    assert [line["prediction"] for line in lines] == [0, 2, 4, 6, 8, 200, 202, 204]


def test_by_default_the_file_lies_in_the_trainers_folder(tmp_path):
    trainer(WritePredictions(), default_root_dir=tmp_path).predict(Doubles(), numbers(5))
    assert len(lines_of(tmp_path / "predictions.jsonl")) == 5


def test_what_is_no_prediction_leaves_the_old_file(tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    with pytest.raises(ValueError, match="predict_step returned str, expected a tensor"):
        trainer(WritePredictions(str(file))).predict(Doubles(str), numbers(5))
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("form", "predicted"),
    [
        (lambda value: (value, value + 1), lambda i: [2 * i, 2 * i + 1]),
        (lambda value: {"a": value, "b": value.numpy()}, lambda i: {"a": 2 * i, "b": 2 * i}),
        (lambda value: [{"boxes": torch.stack([v, v])} for v in value], lambda i: {"boxes": [2 * i, 2 * i]}),
    ],
)
@pytest.mark.parametrize("count", [8, 10])  # batches of 4, or of 4 and 2: as many samples as columns
def test_a_tuple_or_dict_of_tensors_holds_columns(tmp_path, form, predicted, count):
    trainer(WritePredictions(str(tmp_path / "out.jsonl"))).predict(Doubles(form), numbers(count))
    expected = [{"index": i, "prediction": predicted(i)} for i in range(count)]
    assert lines_of(tmp_path / "out.jsonl") == expected


@pytest.mark.parametrize(
    "form", [lambda value: None, lambda value: value.sum(), lambda value: value[:2], lambda v: (v, v[:1])]
)
def test_what_is_not_one_prediction_a_sample_is_refused_at_the_first_batch(tmp_path, form):
    made = []

    def counted(value):
        made.append(value)
        return form(value)

    with pytest.raises(ValueError, match="predict_step returned"):
        trainer(WritePredictions(str(tmp_path / "out.jsonl"))).predict(Doubles(counted), numbers(12))
    assert len(made) == 1


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write into"):
        trainer(WritePredictions(str(tmp_path / "file" / "out.jsonl"))).predict(Doubles(pytest.fail), numbers(5))


def test_glue_names_sentences_and_classes(tmp_path):
    base, data = make_model(tmp_path / "base"), make_data(tmp_path / "glue", "sst2")
    data_module = GLUEDataModule(path=data)
    trainer(WritePredictions(str(tmp_path / "out.jsonl"))).predict(GLUEModule("sst2", base), data_module)
    lines = lines_of(tmp_path / "out.jsonl")
    assert len(lines) == 20
    assert set(lines[0]) == {"index", "sentence", "label", "prediction"}
    assert [line["sentence"] for line in lines] == list(data_module._texts[0]["sentence"])
    assert {line["prediction"] for line in lines} <= {0, 1}


def test_dpp_predict_writes_them_by_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base, rows = save_decoder(tmp_path / "base"), make_rows(12)
    (tmp_path / "run.yaml").write_text(
        "trainer: {accelerator: cpu, logger: false}\n"
        f"model: {{class_path: CausalLMModule, init_args: {{pretrained: {base}, max_new_tokens: 6}}}}\n"
        f"data: {{class_path: InstructionDataModule, init_args: {{path: {write_rows(tmp_path / 'train.jsonl', rows)}, "
        f"test_path: {write_rows(tmp_path / 'test.jsonl', rows)}, prompt: plain}}}}\n"
    )
    assert main(["predict", "--config", "run.yaml", "--output", "out.jsonl", "--data.max_length", "64"]) == 0
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["question"] for line in lines] == [row["question"] for row in rows]
    assert set(lines[0]) == {"index", "question", "generated", "answer", "expected", "correct"}
    assert [line["expected"] for line in lines] == [row["answer"].split("#### ")[1] for row in rows]


def test_dpp_predict_replaces_predictions_on_request_and_no_other_file_ever(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base, rows = save_decoder(tmp_path / "base"), make_rows(4)
    train, test = (write_rows(tmp_path / f"{split}.jsonl", rows) for split in ("train", "test"))
    (tmp_path / "run.yaml").write_text(
        "trainer: {accelerator: cpu, logger: false}\n"
        f"model: {{class_path: CausalLMModule, init_args: {{pretrained: {base}, max_new_tokens: 2}}}}\n"
        f"data: {{class_path: InstructionDataModule, init_args: {{path: {train}, test_path: {test}, prompt: plain, "
        "max_length: 64}}\n"
    )
    (tmp_path / "out.jsonl").write_text('{"index": 0, "question": "of an earlier model"}\n')
    (tmp_path / "link.jsonl").symlink_to("test.jsonl")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    predict = ["predict", "--config", "run.yaml", "--output"]
    for words, said in (
        (["out.jsonl"], "--output out.jsonl holds predictions already: give --overwrite to replace it"),
        (["./test.jsonl", "--overwrite"], "--output ./test.jsonl is the same file as data.test_path"),
        (["link.jsonl", "--overwrite"], "--output link.jsonl is the same file as data.test_path"),
        (["run.yaml", "--overwrite"], "--output run.yaml is there and holds no predictions, so that it is not"),
        (["base", "--overwrite"], "--output base is a folder, expected a file in it"),
    ):
        assert main([*predict, *words]) == 2
        assert said in capsys.readouterr().err
        assert {path: path.read_bytes() for path in kept} == kept
    assert main([*predict, "out.jsonl", "--overwrite"]) == 0
    assert [line["question"] for line in lines_of(tmp_path / "out.jsonl")] == [row["question"] for row in rows]


class Stream(torch.utils.data.IterableDataset):
    """Numbers, of which nobody knows how many come."""

    def __iter__(self):
        return iter((torch.tensor(i),) for i in range(10))


def test_the_samples_of_a_stream_are_numbered_as_they_come(tmp_path):
    trainer(WritePredictions(str(tmp_path / "out.jsonl"))).predict(Doubles(), DataLoader(Stream(), batch_size=4))
    assert lines_of(tmp_path / "out.jsonl") == [{"index": i, "prediction": 2 * i} for i in range(10)]


def test_another_configuration_in_a_delta_is_warned_of(tmp_path, recwarn):
    base = make_model(tmp_path / "base")
    shutil.copytree(base, tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    weights = {n: t + 0.01 if t.is_floating_point() else t for n, t in weights.items()}
    save_file(weights, tmp_path / "tuned" / "model.safetensors")
    saved = json.loads((tmp_path / "tuned" / "config.json").read_text())
    for name, changed in (("labels", {"id2label": {"0": "no", "1": "yes"}}), ("activation", {"hidden_act": "relu"})):
        (tmp_path / "tuned" / "config.json").write_text(json.dumps(saved | changed))
        prune_checkpoint(base, tmp_path / "tuned", tmp_path / name, PruningSpec("dare", 0.5))
        callback, module = ApplyDelta(str(tmp_path / name)), GLUEModule("cola", base, seed=0)
        callback.setup(trainer(), module, "test")
        callback.on_test_start(trainer(), module)
    told = [str(w.message) for w in recwarn if "config.json" in str(w.message)]
    assert len(told) == 1
    assert "has a config.json with another hidden_act than the model of this run" in told[0]


def test_a_tokenizer_in_a_delta_is_warned_of_where_data_is_made_by_another(tmp_path):
    base = make_model(tmp_path / "base")
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    weights = load_file(tuned / "model.safetensors")
    save_file({n: t + 0.01 if t.is_floating_point() else t for n, t in weights.items()}, tuned / "model.safetensors")
    settings = json.loads((tuned / "tokenizer_config.json").read_text())
    (tuned / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False, "cls_token": "[SEP]"}))
    prune_checkpoint(base, tuned, tmp_path / "delta", PruningSpec("dare", 0.5))
    module = GLUEModule("cola", base, seed=0)
    with pytest.warns(UserWarning, match=r"has a tokenizer of its own \(.*tokenizer_config.json.*--model.pretrained"):
        ApplyDelta(str(tmp_path / "delta")).setup(trainer(), module, "test")


def test_the_delta_of_an_adapter_is_not_put_onto_a_base(tmp_path):
    """A new adapter begins at random, so that its base is not that of the delta."""
    base = {"q.lora_A.weight": torch.zeros(2, 8), "q.weight": torch.zeros(8, 8)}
    prune(base, {**base, "q.lora_A.weight": torch.ones(2, 8)}, "dare", 0.5).save_pretrained(tmp_path / "delta")
    with pytest.raises(ValueError, match=r"is the delta of a LoRA adapter, .*lora=merged"):
        ApplyDelta(str(tmp_path / "delta")).setup(trainer(), Doubles(), "test")
