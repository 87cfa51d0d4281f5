"""What is behind the server: requests for several deltas together, and one that fails touches no other."""

import json
from pathlib import Path

import pytest
import torch
from served_deltas import LABELS, TEXTS, close, dense_pipeline, fine_tune, make_deltas
from tiny_causal import save_decoder, widen_norms
from tiny_glue import make_model
from transformers import AutoModelForCausalLM, BertForTokenClassification, BertModel

from dpp_lightning.cli.serve import _read_deltas
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.serving.delta_service import DeltaService, Refusal, Request, Served


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_deltas(tmp_path_factory.mktemp("served"))


def service(place, tasks=LABELS, kind="text-classification", **settings):
    base, sources = str(place / "base"), {task: str(place / "delta" / task) for task in tasks}
    carried = _read_deltas(base, sources, force=False)
    values = {"memory": "2 GB", "batch_size": 8, **settings}
    return DeltaService(Served(base, kind, sources, carried, **values), "cpu")


def test_requests_for_several_deltas_are_answered_in_their_order(place):
    requests = [
        Request(TEXTS, "mnli"),
        Request("w1", None),
        Request([], "cola"),
        Request(TEXTS[:2], "sst2"),
        Request("w1", "mnli"),
    ]
    answers = service(place).answer(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert close(answer, dense_pipeline(place, request.delta)(request.texts) if request.texts else [])


def test_a_request_that_fails_touches_no_other(place, monkeypatch):
    served = service(place)
    pipe = served._pipeline
    monkeypatch.setattr(type(pipe), "__call__", _failing_on("w9", type(pipe).__call__))
    requests = [
        Request("w1", "sst2"),
        Request("w1", "nothing"),
        Request("w9", "mnli"),
        Request(["w1 " * 200], "sst2"),
        Request("w2", "cola"),
    ]
    answers = served.answer(requests)
    assert [answer.status if isinstance(answer, Refusal) else 200 for answer in answers] == [200, 404, 500, 400, 200]
    assert answers[1].reason == "there is no delta 'nothing'; there are sst2, mnli, cola"
    assert answers[3].reason == "a text has 202 tokens, and the model takes at most 128"
    assert close(answers[4], dense_pipeline(place, "cola")(["w2"]))


def _failing_on(word, call):
    def pipeline(self, texts, **settings):
        if word in texts:
            raise RuntimeError("a device is lost")
        return call(self, texts, **settings)

    return pipeline


def test_a_delta_larger_than_the_memory_is_refused_and_the_others_are_served(place):
    served = service(place, memory="10 B")
    small, base = served.answer([Request("w1", "sst2"), Request("w1", None)])
    assert small.status == 503
    assert "sst2 takes" in small.reason
    assert close(base, dense_pipeline(place, None)(["w1"]))


def test_a_base_whose_norms_have_another_dtype_than_its_maps(tmp_path):
    base, tuned = save_decoder(tmp_path / "base"), save_decoder(tmp_path / "tuned/x", seed=1)
    for place in (base, tuned):
        AutoModelForCausalLM.from_pretrained(place).bfloat16().save_pretrained(place)
        widen_norms(place)
    prune_checkpoint(base, tuned, tmp_path / "delta/x", PruningSpec("dare", 0.5))
    served = service(tmp_path, ["x"], "text-generation")
    assert served.pool.model.dtype == torch.float32
    assert not isinstance(served.answer([Request("7 + 8", "x")])[0], Refusal)


def test_the_base_of_an_encoder_has_no_head_and_says_so(tmp_path):
    base = make_model(tmp_path / "base", BertModel)
    fine_tune(base, tmp_path / "tuned/x", ["a", "b", "c"], 1)
    prune_checkpoint(base, tmp_path / "tuned/x", tmp_path / "delta/x", PruningSpec("dare", 0.5))
    make_model(tmp_path / "tuned/y", BertModel, seed=3)
    prune_checkpoint(base, tmp_path / "tuned/y", tmp_path / "delta/y", PruningSpec("dare", 0.5))
    headed, base_answer, headless = service(tmp_path, ["x", "y"]).answer(
        [Request("w1", name) for name in ("x", None, "y")]
    )
    assert headed[0]["label"] in "abc"
    assert (base_answer.status, headless.status) == (400, 400)
    assert base_answer.reason == "the base has no classifier.bias, classifier.weight, which the task needs"
    assert headless.reason.startswith("the delta 'y' has no classifier.bias")


@pytest.mark.parametrize(
    ("kind", "model_class", "same"),
    [("token-classification", BertForTokenClassification, False), ("feature-extraction", BertModel, True)],
)
def test_answers_of_other_tasks_are_plain_and_do_not_depend_on_the_batch(tmp_path, kind, model_class, same):
    place = make_deltas(tmp_path, {"x": ["a", "b", "c"]}, model_class)
    served = service(place, ["x"], kind)
    answers = served.answer([Request(text, "x") for text in TEXTS])
    alone = [served.answer([Request(text, "x")])[0] for text in TEXTS]
    assert close(answers, alone)
    assert _types(answers) <= {dict, list, str, float, int}
    if same:
        assert close([answer[0] for answer in answers], dense_pipeline(place, "x", kind)(TEXTS))


def test_text_is_generated_alike_alone_and_beside_longer_ones(tmp_path):
    base, tuned = save_decoder(tmp_path / "base"), save_decoder(tmp_path / "tuned/x", seed=1)
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": 0, "pad_token_id": 1}
    (Path(tuned) / "generation_config.json").write_text(json.dumps(settings))
    prune_checkpoint(base, tmp_path / "tuned/x", tmp_path / "delta/x", PruningSpec("dare", 0.5))
    apply_checkpoint(base, tmp_path / "delta/x", tmp_path / "dense/x")
    texts = ["What", "What is the answer? The answer is: 3", "7 + 8"]
    answers = service(tmp_path, ["x"], "text-generation").answer([Request(texts, "x"), Request(texts[0], "x")])
    expected = dense_pipeline(tmp_path, "x", "text-generation")
    assert answers == [[expected(text) for text in texts], [expected(texts[0])]]


def _types(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return {type(value)}.union(*map(_types, inner))
