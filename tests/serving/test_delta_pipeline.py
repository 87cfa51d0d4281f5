"""A pool's pipeline answers as the pipeline over the dense fine-tuned model, labels and tokenizer included."""

import logging
import threading

import pytest
import torch
from served_deltas import (
    LABELS,
    TEXTS,
    add_delta,
    change_config,
    close,
    dense_pipeline,
    drop_config,
    fine_tune,
    make_deltas,
)
from tiny_causal import make_tokenizer, save_decoder
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForTokenClassification,
    BertModel,
)

from dpp_lightning import DeltaPool, SparseDelta
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.merging.merge_deltas import merge_checkpoints
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint

TASKS = list(LABELS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_deltas(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def dense(place):
    return {task: dense_pipeline(place, task) for task in (*TASKS, None)}


def make_pool(place, tasks=TASKS, kind=AutoModelForSequenceClassification, **settings):
    pool = DeltaPool(kind.from_pretrained(place / "base"), **settings)
    for task in tasks:
        pool.add(task, place / "delta" / task)
    return pool


@pytest.fixture(scope="module")
def pool(place):
    return make_pool(place)


# --- one delta a call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": None}, {"top_k": 2, "batch_size": 3}, {"function_to_apply": "none"}]
)
def test_each_delta_answers_with_its_own_labels(pool, dense, settings):
    pipe, labels = pool.pipeline("text-classification"), pool.model.config.id2label
    for task in ("mnli", "sst2", None, "cola", "mnli"):
        assert close(pipe(TEXTS, delta=task, **settings), dense[task](TEXTS, **settings))
        assert close(pipe(TEXTS[0], delta=task, **settings), dense[task](TEXTS[0], **settings))
        assert pool.model.config.id2label is labels
    assert {answer["label"] for answer in pipe(TEXTS[0], delta="mnli", top_k=None)} == set(LABELS["mnli"])


def test_settings_of_the_pipeline_are_those_of_transformers(pool, place):
    pipe = pool.pipeline("text-classification", top_k=None, batch_size=2)
    expected = dense_pipeline(place, "mnli", top_k=None)
    assert close(pipe(TEXTS, delta="mnli"), expected(TEXTS))
    assert close(
        pipe({"text": "w1 w2", "text_pair": "w3"}, delta="mnli"), expected({"text": "w1 w2", "text_pair": "w3"})
    )


class Texts(Dataset):
    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, place):
        return TEXTS[place]


@pytest.mark.parametrize("make", [Texts, lambda: (text for text in TEXTS), lambda: tuple(TEXTS)])
def test_what_transformers_reads_lazily_is_answered_by_the_delta_all_the_same(make, pool, dense):
    answers = pool.pipeline("text-classification")(make(), delta="sst2")
    assert close(answers, dense["sst2"](TEXTS))


# --- several deltas a call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 3, 32])
def test_a_delta_for_each_input_keeps_the_order(pool, dense, batch_size):
    pipe = pool.pipeline("text-classification", batch_size=batch_size)
    names = ["sst2", "mnli", None, "sst2", "cola"]
    expected = [dense[name](text)[0] for name, text in zip(names, TEXTS, strict=True)]
    assert close(pipe(TEXTS, delta=names), expected)
    assert close(pipe(iter(TEXTS), delta=names), expected)
    assert pipe([], delta=[]) == pipe([], delta="sst2") == []


def test_deltas_of_equal_labels_share_a_batch(tmp_path, monkeypatch):
    place = make_deltas(tmp_path, {"a": ["bad", "good"], "b": ["bad", "good"]})
    pool = make_pool(place, ["a", "b"])
    mixed, sizes = pool.mixed, []
    monkeypatch.setattr(pool, "mixed", lambda names: sizes.append(len(names)) or mixed(names))
    pool._requests._most_mixed = 16  # as if mixing had been measured to be faster
    names = ["a", "b", "b", "a", "b"]
    answers = pool.pipeline("text-classification", batch_size=8)(TEXTS, delta=names)
    dense = {task: dense_pipeline(place, task) for task in ("a", "b")}
    assert close(answers, [dense[name](text)[0] for name, text in zip(names, TEXTS, strict=True)])
    assert sizes == [5]


@pytest.mark.parametrize(("inputs", "said"), [("w1", "2 names for one input"), (["w1"], "2 names for 1 inputs")])
def test_names_that_are_not_as_many_as_the_inputs(pool, inputs, said):
    with pytest.raises(ValueError, match=f"{said}: give a list of inputs, and one name for each"):
        pool.pipeline("text-classification")(inputs, delta=["sst2", "mnli"])


def test_threads_share_a_pipeline(place, dense):
    pool = make_pool(place, memory="50 kB")
    pipe, wrong = pool.pipeline("text-classification"), []
    expected = {task: dense[task](TEXTS) for task in TASKS}

    def work(start):
        for turn in range(12):
            task = TASKS[(start + turn) % 3]
            if not close(pipe(TEXTS, delta=task), expected[task]):
                wrong.append(task)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.stats().evictions > 0


# --- labels ---------------------------------------------------------------------------------------------------------


def test_without_a_configuration_labels_are_numbered(place, dense, tmp_path):
    pool = make_pool(place, [])
    for task in ("mnli", "sst2"):
        pool.add(task, drop_config(place / "delta" / task, tmp_path / task))
    pool.add("in memory", SparseDelta.from_pretrained(place / "delta" / "mnli"))
    pipe = pool.pipeline("text-classification")
    for name, task in (("mnli", "mnli"), ("sst2", "sst2"), ("in memory", "mnli")):
        numbers = {label: f"LABEL_{number}" for number, label in enumerate(LABELS[task])}
        expected = [{**answer, "label": numbers[answer["label"]]} for answer in dense[task](TEXTS[0], top_k=None)]
        assert close(pipe(TEXTS[0], delta=name, top_k=None), expected)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(["similarity"], "regression"), (["a", "b", "c"], "multi_label_classification"), (["one"], None)],
)
def test_scores_follow_the_problem_of_the_delta(place, tmp_path, labels, problem):
    (tmp_path / "base").symlink_to(place / "base")
    fine_tune(place / "base", tmp_path / "tuned" / "x", labels, 7, problem_type=problem)
    add_delta(tmp_path, "x")
    pool = make_pool(tmp_path, ["x"])
    pipe, expected = pool.pipeline("text-classification", top_k=None), dense_pipeline(tmp_path, "x", top_k=None)
    assert close(pipe(TEXTS, delta="x"), expected(TEXTS))
    assert pool.model.config.problem_type is None


def test_a_merged_delta_has_the_labels_of_each_task(place, tmp_path):
    merge_checkpoints(place / "base", [place / "delta" / t for t in TASKS], tmp_path / "merged", tasks=TASKS)
    pool = make_pool(place, [])
    pool.add("all", tmp_path / "merged")
    pipe = pool.pipeline("text-classification", top_k=None)
    for task in TASKS:
        apply_checkpoint(place / "base", tmp_path / "merged", tmp_path / "dense" / task, task=task)
        assert close(pipe(TEXTS, delta=f"all@{task}"), dense_pipeline(tmp_path, task, top_k=None)(TEXTS))


def test_a_configuration_that_the_model_cannot_follow_is_named_once(place, tmp_path, recwarn):
    (tmp_path / "base").symlink_to(place / "base")
    fine_tune(place / "base", tmp_path / "tuned" / "x", ["a", "b"], 7)
    change_config(tmp_path / "tuned" / "x", hidden_act="relu", hidden_dropout_prob=0.3)
    add_delta(tmp_path, "x")
    pipe = make_pool(tmp_path, ["x"]).pipeline("text-classification")
    for _ in range(2):
        pipe("w1", delta="x")
    said = [str(warning.message) for warning in recwarn if "delta x" in str(warning.message)]
    assert len(said) == 1
    assert "another hidden_act than the pool's model" in said[0]


def test_plain_deltas_warn_of_nothing(pool, recwarn):
    pool.pipeline("text-classification")(TEXTS, delta=["sst2", "mnli", "cola", None, "sst2"])
    assert not [w for w in recwarn if w.category is UserWarning]


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_a_delta_with_a_tokenizer_of_its_own_uses_it(place, dense, tmp_path):
    (tmp_path / "base").symlink_to(place / "base")
    for name, shift in (("shifted", 1), ("same", 0)):
        tuned = tmp_path / "tuned" / name
        fine_tune(place / "base", tuned, ["a", "b"], 7)
        tokenizer = AutoTokenizer.from_pretrained(place / "base")
        tokenizer.save_pretrained(tuned)
        words = (tuned / "tokenizer.json").read_text()
        if shift:
            (tuned / "tokenizer.json").write_text(
                words.replace('"w1"', '"x"').replace('"w2"', '"w1"').replace('"x"', '"w2"')
            )
        add_delta(tmp_path, name)
    pool = make_pool(tmp_path, ["shifted", "same"])
    pipe = pool.pipeline("text-classification", top_k=None)
    for name in ("shifted", "same"):
        assert close(pipe(TEXTS, delta=name), dense_pipeline(tmp_path, name, top_k=None)(TEXTS))
    assert pipe.tokenizer_of("same") is pipe.tokenizer_of(None)
    shifted = pipe.tokenizer_of("shifted")
    assert shifted("w1").input_ids == pipe.tokenizer_of(None)("w2").input_ids != shifted("w2").input_ids
    names = ["shifted", "same", None, "shifted", "same"]
    assert close(
        pipe(TEXTS, delta=names, batch_size=8), [pipe([t], delta=n)[0] for t, n in zip(TEXTS, names, strict=True)]
    )


def test_without_a_tokenizer_the_cure_is_said(place):
    model = AutoModelForSequenceClassification.from_pretrained(place / "base")
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"tokenizer of the pool's model cannot be loaded .*: give tokenizer="):
        DeltaPool(model).pipeline("text-classification")
    pipe = DeltaPool(model).pipeline("text-classification", AutoTokenizer.from_pretrained(place / "base"))
    assert close(pipe(TEXTS), dense_pipeline(place, None)(TEXTS))


# --- other tasks ----------------------------------------------------------------------------------------------------


def test_tokens_are_classified(tmp_path):
    labels = {"ner": ["O", "PER", "LOC"], "pos": ["noun", "verb"]}
    place = make_deltas(tmp_path, labels, BertForTokenClassification)
    pipe = make_pool(place, labels, BertForTokenClassification).pipeline("token-classification", batch_size=4)
    dense = {task: dense_pipeline(place, task, "token-classification", ignore_labels=[]) for task in labels}
    names = ["ner", "pos", "ner", "pos", "ner"]
    answers = pipe(TEXTS, delta=names, ignore_labels=[])
    assert close(_plain(answers), [_plain(dense[name](text)) for name, text in zip(names, TEXTS, strict=True)])
    assert {token["entity"] for answer in answers[::2] for token in answer} <= set(labels["ner"])


def _plain(answers):
    """With numbers of Python."""
    if isinstance(answers, list):
        return [_plain(answer) for answer in answers]
    return {key: float(value) if key == "score" else value for key, value in answers.items()}


def test_features_are_those_of_the_fine_tuned_encoder(tmp_path):
    place = make_deltas(tmp_path, {"encoder": ["old", "new"]}, BertModel)
    pipe = make_pool(place, ["encoder"], BertModel).pipeline("feature-extraction")
    assert close(pipe(TEXTS, delta="encoder"), dense_pipeline(place, "encoder", "feature-extraction")(TEXTS))
    assert not close(pipe(TEXTS, delta="encoder"), pipe(TEXTS))


def test_text_is_generated_with_the_settings_of_the_delta(tmp_path):
    base = save_decoder(tmp_path / "base")
    for seed, task in enumerate(("short", "long"), 1):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.generation_config.max_new_tokens = 2 + 5 * seed
        model.save_pretrained(tmp_path / "tuned" / task)
        make_tokenizer().save_pretrained(tmp_path / "tuned" / task)
        prune_checkpoint(base, tmp_path / "tuned" / task, tmp_path / "delta" / task, PruningSpec("dare", 0.5))
        apply_checkpoint(base, tmp_path / "delta" / task, tmp_path / "dense" / task)
    pool = make_pool(tmp_path, ["short", "long"], AutoModelForCausalLM)
    before = pool.model.generation_config
    pipe, texts = pool.pipeline("text-generation", batch_size=2), ["What is 1+1?", "The answer", "3"]
    dense = {task: dense_pipeline(tmp_path, task, "text-generation") for task in ("short", "long")}
    names = ["short", "long", "short"]
    expected = [dense[name](text, do_sample=False) for name, text in zip(names, texts, strict=True)]
    assert pipe(texts, delta=names, do_sample=False, batch_size=1) == expected
    assert pool.model.generation_config is before
    assert len({len(answer[0]["generated_text"]) for answer in expected}) > 1


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_said_in_one_line(pool, caplog):
    caplog.set_level(logging.CRITICAL)
    pipe = pool.pipeline("text-classification")
    for call in (lambda: pipe("w1", delta="nothing"), lambda: pipe(["w1"], delta=["nothing"])):
        with pytest.raises(ValueError, match="no delta 'nothing'; it has sst2, mnli, cola"):
            call()
    with pytest.raises(ValueError, match=r"device, dtype: the model is the pool's"):
        pool.pipeline("text-classification", device="cpu", dtype="float16")
    with pytest.raises(ValueError, match=r"needs a model of transformers, got Linear"):
        DeltaPool(torch.nn.Linear(2, 2)).pipeline("text-classification")
