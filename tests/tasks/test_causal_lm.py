"""The causal-LM task: losses, generation, scores, training, pruning; on a two-layer decoder."""

import json

import pytest
import torch
from causal_fits import attached, data_of, module_of, trainer_of, write_files
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from tiny_causal import make_decoder, make_rows, make_tokenizer, save_decoder, write_rows
from transformers import GenerationConfig

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.tasks.causal_lm import CausalLMModule
from dpp_lightning.tasks.causal_lm.generation import generate_texts
from dpp_lightning.tasks.causal_lm.scores import CausalScores
from dpp_lightning.tasks.common import LoRA


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("data"))


def test_a_base_that_lacks_weights_is_refused(tmp_path):
    folder = save_decoder(tmp_path, tied=False)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: t for name, t in state.items() if "layers.1.mlp" not in name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"lacks 3 tensors of Qwen2ForCausalLM, model\.layers\.1\.mlp"):
        CausalLMModule(folder)


# ---------------------------------------------------------------- losses and generation


def test_the_loss_is_that_of_transformers(base, files, tmp_path):
    module, data = attached(base, files, tmp_path)
    batch = next(iter(data.train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    module.log = lambda *args, **kwargs: None
    assert module.training_step(batch, 0).item() == pytest.approx(module.model(**inputs).loss.item(), rel=1e-5)


def greedy_twin(model, tokens, new, end=0):
    """One sample, one token at a time, without a cache and without padding."""
    tokens = list(tokens)
    start = len(tokens)
    for _ in range(new):
        token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens[start:]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_a_batch_generates_what_each_sample_generates_alone(kind):
    model, tokenizer = make_decoder(kind, seed=3).eval(), make_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("What", "What is 1+2?\n", "The answer is: 7-3, 1+1")]
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    texts = generate_texts(model, tokenizer, ids, mask, 10)
    with torch.no_grad():
        alone = [tokenizer.decode(greedy_twin(model, p, 10), skip_special_tokens=True) for p in prompts]
    assert texts == alone
    assert len(set(texts)) > 1


def test_a_models_own_sampling_and_penalties_play_no_part():
    model, tokenizer = make_decoder(seed=3).eval(), make_tokenizer()
    ids = torch.tensor([tokenizer("What is 1+2?\n")["input_ids"]])
    plain = generate_texts(model, tokenizer, ids, torch.ones_like(ids), 10)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_length=40,
        num_beams=2,
    )
    assert generate_texts(model, tokenizer, ids, torch.ones_like(ids), 10) == plain


def test_a_stop_string_ends_a_text_and_is_cut_off():
    model, tokenizer = make_decoder(seed=3).eval(), make_tokenizer()
    ids = torch.tensor([tokenizer("What is 1+2?\n")["input_ids"]])
    (text,) = generate_texts(model, tokenizer, ids, torch.ones_like(ids), 10)
    stop = text[len(text) // 2 :][:2]
    assert generate_texts(model, tokenizer, ids, torch.ones_like(ids), 10, [stop]) == [text[: text.index(stop)]]


def test_scores_are_the_share_of_right_answers_and_its_standard_error():
    scores = CausalScores()
    scores.update((torch.tensor(6.0), torch.tensor(4)), [("5", "5"), (None, "5"), ("4", "5")])
    scores.update((torch.tensor(2.0), torch.tensor(4)), [("1,000", "1000")])
    values = {name: float(value) for name, value in scores.compute().items()}
    assert values == pytest.approx({"loss": 1.0, "score": 0.5, "score_stderr": (0.25 / 3) ** 0.5, "answered": 0.75})
    fresh = CausalScores()
    fresh.update((torch.tensor(1.0), torch.tensor(2)))
    assert set(fresh.compute()) == {"loss"}


def test_scores_do_not_depend_on_batches_or_fillers(base, files, tmp_path):
    module, data = attached(base, files, tmp_path)
    module.log = lambda *args, **kwargs: None
    split = data.splits["test"]
    collate = data.test_dataloader().collate_fn
    values = []
    for batches in ([range(21)], [range(8), range(8, 21)], [[*range(21), -1, -2]]):
        scores = module.scores("test")
        scores.reset()
        for batch in batches:
            module.test_step(collate([split[i] for i in batch]), 0)
        values.append({name: float(value) for name, value in scores.compute().items()})
        assert int(scores.samples) == 21
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] == pytest.approx(values[2], rel=1e-5)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("packing", [False, True])
def test_fit_learns_sums_scores_predicts_and_shows_samples(base, files, tmp_path, packing):
    module, data = module_of(base), data_of(files, packing=packing, batch_size=4 if packing else 16, max_length=64)
    trainer = trainer_of(
        tmp_path, max_epochs=25, logger=CSVLogger(tmp_path), check_val_every_n_epoch=25, log_every_n_steps=1
    )
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["val_score"]) > 0.6
    assert set(trainer.callback_metrics) >= {"val_score", "val_score_stderr", "val_answered", "val_loss"}
    lines = [json.loads(line) for line in (next(tmp_path.rglob("samples.jsonl"))).read_text().splitlines()]
    assert len(lines) == 4
    assert set(lines[0]) == {"step", "name", "prompt", "generated", "reference"}
    assert lines[0]["prompt"].startswith("What is")
    scores = trainer.test(module, data, verbose=False)[0]
    texts = [text for batch in trainer.predict(module, data) for text in batch]
    described = [data.describe_prediction(i, text) for i, text in enumerate(texts)]
    assert len(described) == 21
    assert scores["test_score"] == pytest.approx(sum(row["correct"] for row in described) / 21)
    assert described[0]["question"] == make_rows(21, seed=1)[0]["question"]


def test_packing_in_a_model_that_mixes_samples_is_refused(base, files, tmp_path, monkeypatch):
    def refuse(model, first, second):
        raise ValueError("mixes")

    monkeypatch.setattr("dpp_lightning.tasks.causal_lm.module.check_packing_isolates", refuse)
    with pytest.raises(ValueError, match="mixes"):
        trainer_of(tmp_path).fit(module_of(base), data_of(files, packing=True))


def test_checkpointed_gradients_are_the_same(base, files, tmp_path):
    losses = []
    for settings in ({}, {"gradient_checkpointing": True}):
        module, data = attached(base, files, tmp_path)
        module = module_of(base, **settings)
        module.log = lambda *args, **kwargs: None
        module.training_step(next(iter(data.train_dataloader())), 0).backward()
        losses.append({name: p.grad for name, p in module.named_parameters()})
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.allclose(losses[0][name], losses[1][name], atol=1e-6) for name in losses[0])


@pytest.mark.slow  # the compiler takes a minute
def test_a_compiled_fit_is_the_same_under_the_same_names(base, files, tmp_path):
    weights = []
    for compiled in (False, True):
        module = module_of(base, compile=compiled)
        trainer_of(tmp_path, max_steps=4, limit_val_batches=0).fit(module, data_of(files))
        weights.append(module.state_dict())
    assert list(weights[0]) == list(weights[1])
    assert all(torch.allclose(weights[1][name], tensor, atol=1e-5) for name, tensor in weights[0].items())


def test_a_fit_resumed_at_the_end_of_an_epoch_is_the_whole_one(base, files, tmp_path):
    def run(epochs, checkpoint=None):
        module = module_of(base, scheduler="constant")
        trainer = trainer_of(tmp_path, max_epochs=epochs, limit_val_batches=0)
        trainer.fit(module, data_of(files, packing=True, batch_size=8), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.state_dict()

    run(1)
    resumed, whole = run(2, tmp_path / "1.ckpt"), run(2)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_evaluation_by_loss_generates_nothing(base, files, tmp_path, monkeypatch):
    monkeypatch.setattr(CausalLMModule, "generate", lambda *args: pytest.fail("generated"))
    rows = [{**row, "answer": row["answer"].split("\n")[0]} for row in make_rows(40)]
    unmarked = {**files, "path": write_rows(tmp_path / "rows.jsonl", rows)}
    scores = trainer_of(tmp_path).validate(module_of(base, evaluate_by="loss"), data_of(unmarked), verbose=False)[0]
    assert set(scores) == {"val_loss"}


# ---------------------------------------------------------------- pruning


def test_the_decoders_scope_prunes_linear_maps_and_carries_the_rest_once(base, files, tmp_path):
    module = module_of(base)
    prune = DeltaPruneCallback(
        method=["dare", "darex-q", "wanda", "darex-learned"],
        pruning_rate=0.5,
        scope="linear",
        output_measure="top-logits",
        calibration_samples=8,
        output_dir=str(tmp_path / "deltas"),
    )
    trainer_of(tmp_path, prune, max_epochs=2).fit(module, data_of(files))
    delta = SparseDelta.from_pretrained(tmp_path / "deltas" / "dare-p0.5-seed0")
    assert all(".mlp." in name or ".self_attn." in name for name in delta.tensors)
    assert len(delta.tensors) == 2 * (7 + 3)  # seven linear maps a block, three with a bias
    assert sorted(name.rpartition(".")[0].rpartition(".")[2] for name in delta.carried) == sorted(
        ["embed_tokens", "norm", *["input_layernorm", "post_attention_layernorm"] * 2]
    )
    plain = make_decoder()
    plain.load_state_dict(CausalLMModule(base).model.state_dict())
    with delta.applied(plain):
        assert torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
        assert torch.equal(plain.model.norm.weight, module.model.model.norm.weight)
    assert {row.method for row in prune.results} >= {"dare", "darex-q", "wanda", "darex-learned"}


@pytest.mark.parametrize("layer", [None, "last_hidden"])
def test_q_does_not_depend_on_the_padding_of_the_calibration_batch(base, files, tmp_path, layer):
    qs = []
    for width in (32, 8):  # samples in a forward: other groups, other paddings
        callback = DeltaPruneCallback(
            method="darex-q", pruning_rate=0.5, scope="linear", output_layer=layer, calibration_samples=10,
            output_measure="mean" if layer else "top-logits", output_dir=str(tmp_path / str(width)),
        )  # fmt: skip
        module = module_of(base)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dpp_lightning.tasks.causal_lm.module._CALIBRATION_SAMPLES", width)
            trainer_of(tmp_path, callback, max_epochs=2, limit_val_batches=1).fit(module, data_of(files))
        qs.append(callback.results[-1].q)
    assert qs[0] == pytest.approx(qs[1], rel=1e-4)


def test_lora_trains_adapters_and_prunes_them(base, files, tmp_path):
    module = module_of(base, lora=LoRA(r=4, target_modules=["q_proj", "v_proj"]))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callback = DeltaPruneCallback(method="dare", pruning_rate=0.5, lora="merged", output_dir=str(tmp_path / "deltas"))
    trainer_of(tmp_path, callback, max_epochs=1).fit(module, data_of(files))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    delta = SparseDelta.from_pretrained(tmp_path / "deltas" / "dare-p0.5-seed0")
    plain = CausalLMModule(base)
    with delta.applied(plain):
        pass
    assert {name.split(".")[-2] for name, t in delta.tensors.items() if len(t.indices)} == {"q_proj", "v_proj"}


def test_a_fine_tuned_model_is_pruned_without_training(base, files, tmp_path):
    tuned = module_of(base)
    trainer = trainer_of(tmp_path, max_epochs=25, limit_val_batches=0)
    trainer.fit(tuned, data_of(files))
    tuned.model.save_pretrained(tmp_path / "tuned")
    tuned.tokenizer.save_pretrained(tmp_path / "tuned")
    callback = DeltaPruneCallback(
        method=["dare", "darex-q"], pruning_rate=[0.0, 0.5], scope="linear", output_measure="top-logits", pretrained=base,
        output_dir=str(tmp_path / "deltas"),
    )  # fmt: skip
    module = module_of(str(tmp_path / "tuned"))
    score = trainer_of(tmp_path, callback).test(module, data_of(files), verbose=False)[0]["test_score"]
    rows = {(row.method, row.pruning_rate): row for row in callback.results}
    assert rows["fine-tuned", None].score == rows["dare", 0.0].score == pytest.approx(score)
    assert rows["base", None].score < score
    delta = SparseDelta.from_pretrained(tmp_path / "deltas" / "dare-p0-seed0")
    assert delta.info.base_name == base
