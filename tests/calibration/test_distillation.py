"""Training kept values and factors: gradients as of dense autograd, held-out guard, and a module left as it was."""

import warnings

import pytest
import torch
from interrupted import Interrupt, interrupt_at, lines_of
from torch import nn
from torch.nn.utils import parameters_to_vector
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from dpp_lightning import METHODS, SparseDelta, prune
from dpp_lightning.calibration import Calibration, collected_inputs
from dpp_lightning.calibration.distillation import Distillation, TrainingSettings
from dpp_lightning.calibration.factor_fit import with_means
from dpp_lightning.calibration.fit_rescaling import held_tensors
from dpp_lightning.calibration.trained_tensors import TrainedTensors
from dpp_lightning.methods import PruningSpec
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.tensors.names import named_tensors

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **SMALL))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, num_key_value_heads=1, **SMALL))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL))


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit}


def pieces_for(name, count=4, samples=4):
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        return [{"pixel_values": torch.randn(samples, 3, 8, 8, generator=generator)} for _ in range(count)]
    pieces = []
    for _ in range(count):
        mask = torch.ones(samples, 10, dtype=torch.int64)
        mask[0, 6:] = 0
        ids = torch.randint(5, 40, (samples, 10), generator=generator)
        pieces.append({"input_ids": ids, "attention_mask": mask})
    return pieces


def two_models(name, scale=0.05):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    finetuned = {n: t + scale * torch.randn_like(t) if t.is_floating_point() else t for n, t in base.items()}
    if name in ("gpt2", "llama"):
        embedding = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
        finetuned["lm_head.weight"] = finetuned[embedding]
    return model, base, finetuned


def training_on(name, samples=4, count=4):
    model, base, finetuned = two_models(name)
    model.load_state_dict(finetuned)
    pieces = pieces_for(name, count, samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = Distillation(model, pieces, lambda piece: model(**piece).logits, samples=samples * count)
    plan_base = {n: t.clone() for n, t in base.items()}
    model.load_state_dict(base)
    return model, training, PruningPlan.of(plan_base, finetuned, Scope())


def gradient_of(leaf):
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()


SETTINGS = {
    "refit": {"pruning_rate": 0.7},
    "refit everywhere": {"pruning_rate": 0.7, "method_settings": {"where": "all"}},
    "lowrank": {"method_settings": {"rank": 2}},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", SETTINGS)
def test_gradients_of_trained_numbers_are_those_of_dense_autograd(name, method):
    model, training, plan = training_on(name)
    delta = plan.draw(PruningSpec(method.split()[0], **SETTINGS[method]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.base_loss()
    tensors = TrainedTensors(model, delta, None, None)
    with tensors.products() as products:
        tensors.write()
        tensors.train_whole(products.unknown_in(training._run_once))
        tensors.backward(lambda: training._backward(0, None))
    got = {n: {kind: gradient_of(leaf) for kind, leaf in t.leaves.items()} for n, t in tensors.tensors.items()}
    sparse = [n for n, t in tensors.tensors.items() if not t.whole]
    assert sum(name.endswith("weight") for name in sparse) >= 8
    tensors.put_back()

    tensors = TrainedTensors(model, delta, None, None)  # all tensors the dense way
    for trained in tensors.tensors.values():
        if not trained.whole:
            trained.whole, trained.base = True, trained.named.tensor.detach().reshape(-1).clone()
    with tensors.products():
        tensors.train_whole(())
    tensors.backward(lambda: training._backward(0, None))
    for tensor_name, trained in tensors.tensors.items():
        for kind, leaf in trained.leaves.items():
            grad, dense = got[tensor_name][kind], gradient_of(leaf)
            limit = 1e-4 * float(dense.abs().amax()) + 1e-7 if dense.numel() else 0
            assert not dense.numel() or float((grad - dense).abs().amax()) <= limit, (tensor_name, kind)
    tensors.put_back()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", SETTINGS)
def test_training_lowers_the_held_out_loss_and_leaves_the_module_as_it_was(name, method):
    model, training, plan = training_on(name)
    model.train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    needed = [p.requires_grad for p in model.parameters()]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    delta = plan.draw(PruningSpec(method.split()[0], **SETTINGS[method]))
    if delta.info.method == "refit":
        delta = delta.rescaled(1.0)
    settings = TrainingSettings(30, 0.02 if delta.info.method == "refit" else 0.05, seed=1)
    trained, tried = training.train(delta, settings)
    assert tried[0][0] == 0
    assert min(loss for _, loss in tried[1:]) < tried[0][1]
    assert training.loss(trained) == pytest.approx(min(loss for _, loss in tried), rel=1e-3)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == needed
    assert all(p.grad is None for p in model.parameters())
    assert all(part.training for part in model.modules())
    again, _ = training.train(delta, settings)
    for tensor_name, tensor in trained.tensors.items():
        other = again.tensors[tensor_name]
        assert torch.equal(other.values, tensor.values)
        assert (other.factors is None) == (tensor.factors is None)
        if tensor.factors is not None:
            assert torch.equal(other.factors.left, tensor.factors.left)
            assert tensor.factors.is_whole or torch.equal(other.factors.right, tensor.factors.right)


def test_the_base_has_loss_two_and_the_fine_tuned_model_none():
    _model, training, plan = training_on("bert", count=8)
    whole = plan.draw(PruningSpec("dare", 0.0))
    assert training.loss(whole) < 1e-6
    with torch.no_grad():
        losses = [float(training.teacher.loss(training.pieces[i], i)) for i in range(8)]
        assert sum(losses) / 8 == pytest.approx(2.0, rel=1e-4)


def test_padding_plays_no_part():
    _model, training, _ = training_on("bert")
    piece = training.pieces[0]
    other = {**piece, "input_ids": torch.where(piece["attention_mask"] == 0, 7, piece["input_ids"])}
    training.base_loss()
    assert float(training.teacher.loss(piece, 0)) == pytest.approx(float(training.teacher.loss(other, 0)), rel=1e-5)


def test_layers_computed_anew_give_the_same_training():
    model, training, plan = training_on("bert")
    delta = plan.draw(PruningSpec("refit", 0.7)).rescaled(1.0)
    _one, tried = training.train(delta, TrainingSettings(12, 0.02))
    _other, tried_anew = training.train(delta, TrainingSettings(12, 0.02, checkpointing=True))
    assert [loss for _, loss in tried] == pytest.approx([loss for _, loss in tried_anew], rel=1e-4)
    assert not any(part.training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by_block", [False, True])
def test_in_inference_mode_training_is_the_same(name, by_block):
    """As in the evaluation loops of a Trainer, which ``dpp sweep`` runs in."""
    found = []
    for inference in (False, True):
        model, base, finetuned = two_models(name)
        delta = PruningPlan.of(base, finetuned, Scope()).draw(PruningSpec("refit", 0.7)).rescaled(1.0)
        model.load_state_dict(finetuned)
        with torch.inference_mode(inference), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pieces = pieces_for(name, samples=32)
            training = Distillation(model, pieces, lambda piece, model=model: model(**piece).logits, samples=128)
            model.load_state_dict(base)
            found.append(training.train(delta, TrainingSettings(6, 0.02, by_block=by_block))[1])
    assert found[0] == found[1]


def gradients(model, delta, training, backward, dense):
    """Of every trained number, and the loss; dense by autograd of whole weights."""
    tensors = TrainedTensors(model, delta, None, None)
    for trained in tensors.tensors.values():
        if dense and not trained.whole:
            trained.whole, trained.base = True, trained.named.tensor.detach().reshape(-1).clone()
    with tensors.products() as products:
        tensors.write()
        tensors.train_whole(() if dense else products.unknown_in(training._run_once))
        loss = tensors.backward(lambda: backward(tensors))
    found = {(n, kind): gradient_of(leaf) for n, t in tensors.tensors.items() for kind, leaf in t.leaves.items()}
    tensors.put_back()
    return found, loss


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", SETTINGS)
def test_by_block_a_number_has_the_gradient_of_the_states_right_after_its_block(name, method):
    """Of two blocks: the first, and what is before it, of its states alone; the second of its own, given the first's;
    what is after both of the outputs."""
    model, training, plan = training_on(name)
    training.base_loss()
    teacher, piece = training.teacher, training.pieces[0]

    def error(which):
        outputs, states = teacher._errors(teacher.run(piece), 0)
        parts = [*(states[i] / teacher._of_states[i] / 2 for i in states), outputs / teacher._of_outputs]
        parts[which].backward()
        return parts[which]

    def by_block(tensors):
        return teacher.backward_by_block(piece, 0, tensors.leaves_in(teacher.blocks))

    delta = plan.draw(PruningSpec(method.split()[0], **SETTINGS[method]))
    found, loss = gradients(model, delta, training, by_block, dense=False)
    dense = [gradients(model, delta, training, lambda _, i=i: error(i), dense=True) for i in range(3)]
    assert loss == pytest.approx(sum(part for _, part in dense), rel=1e-5)
    compared = set()
    for key, gradient in found.items():
        if "embed_tokens" in key[0] or "wte" in key[0]:  # tied: before the first block and after the last one
            continue
        which = next((i for i, (gradients_of, _) in enumerate(dense) if gradients_of[key].any()), 2)
        torch.testing.assert_close(gradient, dense[which][0][key], rtol=1e-3, atol=1e-6)
        compared.add(which)
    assert {0, 1} <= compared
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_by_block_lowers_the_held_out_loss_of_the_whole_model():
    model, training, plan = training_on("bert")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    delta = plan.draw(PruningSpec("refit", 0.7)).rescaled(1.0)
    trained, tried = training.train(delta, TrainingSettings(30, 0.02, by_block=True))
    assert training.loss(trained) == pytest.approx(min(loss for _, loss in tried), rel=1e-3)
    assert training.loss(trained) < 0.9 * tried[0][1]
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_by_block_trains_where_several_blocks_are_given_one_state():
    """An encoder's last norm stands before every block of the decoder."""
    torch.manual_seed(0)
    settings = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, **settings)).eval()
    names = [named.name for named in named_tensors(model)]
    base = {n: model.state_dict()[n].clone() for n in names}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    finetuned = {n: model.state_dict()[n].clone() for n in names}
    pieces = [{**piece, "labels": piece["input_ids"]} for piece in pieces_for("bert", 4, 32)]
    training = Distillation(model, pieces, lambda piece: model(**piece).logits, samples=128)
    model.load_state_dict(base, strict=False)
    delta = PruningPlan.of(base, finetuned, Scope()).draw(PruningSpec("lowrank", method_settings={"rank": 1}))
    _, tried = training.train(delta, TrainingSettings(25, 0.05, by_block=True))
    assert tried[-1][1] < tried[0][1]


def test_by_block_a_model_without_blocks_is_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    base = {n: t.clone() for n, t in net.state_dict().items()}
    tuned = {n: t + 0.1 for n, t in base.items()}
    net.load_state_dict(tuned)
    with pytest.warns(UserWarning, match="no hidden states"):
        training = Distillation(net, [torch.randn(64, 4) for _ in range(2)], net, samples=128)
    net.load_state_dict(base)
    delta = PruningPlan.of(base, tuned, Scope()).draw(PruningSpec("refit", 0.5, method_settings={"where": "all"}))
    with pytest.raises(ValueError, match="loss=block is not for Sequential, whose blocks"):
        training.train(delta, TrainingSettings(5, 0.02, by_block=True))


def test_steps_and_memory_of_a_training_are_settings_of_its_method(monkeypatch):
    _model, training, plan = training_on("bert")
    given = []
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda delta, settings, *rest: given.append(settings) or train(delta, settings)
    )
    for method, settings in (("refit", {}), ("lowrank", {"rank": 1})):
        spec = PruningSpec(method, 0.7, method_settings={**settings, "steps": 30, "activations": "recomputed"})
        plan.draw_and_fit(spec, Calibration(lambda _: 0.0, distillation=training))
    assert [(one.steps, one.checkpointing) for one in given] == [(30, True), (30, True)]
    spec = PruningSpec("refit", 0.7, method_settings={"steps": 5, "loss": "block"})
    plan.draw_and_fit(spec, Calibration(lambda _: 0.0, distillation=training))
    assert given[-1].by_block
    given.clear()
    for method, settings in (("refit", {}), ("lowrank", {"rank": 1}), ("lowrank", {"activations": "recomputed"})):
        spec = PruningSpec(method, 0.7, method_settings={**settings, "steps": 5})
        plan.draw_and_fit(spec, Calibration(lambda _: 0.0, distillation=training))
    assert [one.by_block for one in given] == [False, True, False]
    both = {"loss": "block", "activations": "recomputed"}
    for wrong in ({"steps": 2.5}, {"steps": -1}, {"activations": "gone"}, {"loss": "layer"}, both):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PruningSpec("refit", 0.7, method_settings=wrong)


@pytest.mark.parametrize(("least", "steps"), [(4, 5 * 8), (60, 60)])
def test_more_texts_are_trained_on_in_more_steps(monkeypatch, least, steps):
    """Five epochs of 9 batches, of which one is held out, or the least number of steps."""
    monkeypatch.setattr("dpp_lightning.calibration.factor_fit.STEPS", least)
    _model, training, plan = training_on("bert", samples=1, count=9)
    given, train = [], training.train
    monkeypatch.setattr(
        training, "train", lambda delta, settings, *rest: given.append(settings.steps) or train(delta, settings)
    )
    spec = PruningSpec("lowrank", 0.7, method_settings={"rank": 1})
    plan.draw_and_fit(spec, Calibration(lambda _: 0.0, distillation=training))
    assert given == [steps]


def test_values_are_rounded_to_what_the_file_holds(tmp_path):
    _model, training, plan = training_on("bert")
    spec = PruningSpec("refit", 0.7)
    delta, found = plan.draw_and_fit(spec, Calibration(lambda _: 0.0, distillation=training))
    assert delta.info.dtype == "int4"
    assert delta.q == 1.0
    assert delta.info.training["texts"] == 16
    assert delta.info.training["held_out_after"] < delta.info.training["held_out_before"]
    delta.save_pretrained(tmp_path / "delta")
    read = SparseDelta.from_pretrained(tmp_path / "delta")
    assert training.loss(read) == pytest.approx(delta.info.training["held_out_after"], rel=1e-3)
    for name, tensor in read.tensors.items():
        assert torch.equal(tensor.values, delta.tensors[name].values)
    assert found.apply(delta) is not delta


def test_low_rank_takes_the_best_form_and_says_which(tmp_path):
    model, training, plan = training_on("bert", samples=8, count=16)
    model.load_state_dict(two_models("bert")[2])
    with collected_inputs(model, products=True) as collector, torch.no_grad():
        for piece in training.pieces:
            model(**piece)
    model.load_state_dict(two_models("bert")[1])
    calibration = Calibration(lambda _: 0.0, inputs=collector.statistics, distillation=training)
    spec = PruningSpec("lowrank", method_settings={"rank": 1})
    delta, found = plan.for_spec(spec, calibration).draw_and_fit(spec, calibration)
    assert len(found.tried) == 5  # plain and weighted, each with means and without, and the best of them trained
    assert delta.info.training["form"].endswith("trained by block")
    assert delta.info.training["held_out_after"] == pytest.approx(min(loss for _, loss in found.tried))
    assert training.loss(delta) == pytest.approx(delta.info.training["held_out_after"], rel=1e-3)
    assert delta.info.factors_dtype == "int3"


def test_the_rest_of_a_low_rank_is_damped_as_the_file_holds_it_and_nothing_is_trained():
    _, training, plan = training_on("bert", samples=8, count=16)
    spec = PruningSpec("lowrank", method_settings={"rank": 1, "rest": 0.6})
    calibration = Calibration(lambda _: 0.0, distillation=training)
    delta, found = plan.draw_and_fit(spec, calibration)
    assert len(found.tried) == 4  # plain with its rest times 0.75, and times three other numbers
    assert "trained" not in delta.info.training["form"]
    assert delta.info.training["held_out_after"] == pytest.approx(min(loss for _, loss in found.tried))
    assert training.loss(delta) == pytest.approx(delta.info.training["held_out_after"], rel=1e-3)
    assert (delta.info.dtype, delta.info.factors_dtype, delta.info.seeded) == ("int2", "int3", True)


def checkpointing_of(model):
    return [(name, getattr(part, "gradient_checkpointing", None)) for name, part in model.named_modules()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("on_before", [False, True])
def test_an_error_in_training_leaves_the_module_as_it_was(checkpointing, on_before):
    model, training, plan = training_on("bert")
    if on_before:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    hooks = [list(part._forward_hooks) for part in model.modules()]
    state = checkpointing_of(model)
    delta = plan.draw(PruningSpec("refit", 0.7)).rescaled(1.0)

    def fail(step, steps, loss):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        training.train(delta, TrainingSettings(3, 0.02, checkpointing=checkpointing), fail)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert all(part.training for part in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [list(part._forward_hooks) for part in model.modules()] == hooks
    assert checkpointing_of(model) == state


@pytest.mark.parametrize("method", ["refit", "lowrank"])
def test_an_interrupt_at_any_line_of_training_leaves_the_module_as_it_was(method):
    """At every line of the end, and at 20 before it."""
    model, training, plan = training_on("gpt2")
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    delta = plan.draw(PruningSpec(method, **SETTINGS[method])).rescaled(1.0)

    def train():
        training.train(delta, TrainingSettings(1, 0.02))

    train()  # the first takes the scale of the loss
    total = lines_of(train)
    for line in (*range(total // 20, total, total // 20), *range(total - 60, total + 1)):
        with pytest.raises(Interrupt):
            interrupt_at(line, train)
        assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items()), line
        assert all(part.training for part in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_one_piece_is_refused():
    model, _, _ = training_on("bert")
    with pytest.raises(ValueError, match="two batches"):
        Distillation(model, pieces_for("bert", 1), lambda piece: model(**piece).logits, samples=4)


def test_few_samples_are_warned_of():
    model, _, _ = training_on("bert")
    with pytest.warns(UserWarning, match="trained on 8 calibration examples"):
        Distillation(model, pieces_for("bert", 2), lambda piece: model(**piece).logits, samples=8)


def test_a_model_without_blocks_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="no hidden states of Sequential"):
        Distillation(model, [torch.randn(64, 4)] * 2, model, samples=128)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.fit and row.fit.needs_distillation])
def test_methods_that_train_say_what_they_need(method):
    _, base, finetuned = two_models("bert")
    if METHODS[method].fit.required:
        settings = {"max_bytes": 10_000} if method == "auto" else {}
        with pytest.raises(ValueError, match="trains on calibration data: give it"):
            prune(base, finetuned, method, 0.9, **settings)
    else:
        assert (
            parameters_to_vector([t.values for t in prune(base, finetuned, method, rank=1).tensors.values()]).numel()
            == 0
        )


class OneInput(nn.Module):
    """A net whose first weight has one column."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def training_of(model, finetuned, pieces):
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(finetuned)
    training = Distillation(model, pieces, model, samples=sum(map(len, pieces)))
    model.load_state_dict(base)
    return training, PruningPlan.of(base, finetuned, Scope())


@pytest.mark.parametrize("by_block", [False, True])
def test_weights_of_one_column_and_of_one_row_are_trained_with_the_others(by_block):
    """What the training calls its loss is the loss of the delta that it gives."""
    torch.manual_seed(0)
    model = OneInput()
    finetuned = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    training, plan = training_of(model, finetuned, list(torch.randn(20, 8, 1)))
    delta = plan.draw(PruningSpec("lowrank", method_settings={"rank": 2, "spread": "even", "factors_dtype": "float32"}))
    settings = TrainingSettings(steps=60, learning_rate=0.05, factors_dtype="float32", by_block=by_block)
    found, tried = training.train(delta, settings)
    assert training.loss(found) == pytest.approx(min(loss for _, loss in tried), rel=1e-3, abs=1e-6)
    for name in ("first.weight", "head.weight"):
        assert not torch.equal(found.tensors[name].factors.left, delta.tensors[name].factors.left)


def test_means_in_the_biases_are_of_what_factors_and_rest_leave():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 4))
    finetuned = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    x = torch.randn(800, 24) + 2  # inputs with a mean
    inputs = InputStatistics(x.sum(0).double(), x.square().sum(0).double(), len(x), 1, products=(x.t() @ x).double())
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = PruningPlan.of(base, finetuned, Scope()).with_inputs({"0.weight": inputs})
    for rest in (1.0, 0.5):
        settings = {"rank": 1, "factors_dtype": "float32"} | ({"rest": rest, "damping": 0.75} if rest < 1 else {})
        delta = plan.draw(PruningSpec("lowrank", method_settings=settings))
        shifted = with_means(plan.pairs, delta, "int2")
        for found, limit in ((delta, None), (shifted, 1e-3)):
            held = held_tensors(found, plan.pairs, "int2", "float32")
            weight, bias = (base[name] + held[name].dense(1.0).view_as(base[name]) for name in ("0.weight", "0.bias"))
            error = (x @ (finetuned["0.weight"] - weight).t() + finetuned["0.bias"] - bias).mean(0).abs().max()
            assert error > 0.1 if limit is None else error < limit
