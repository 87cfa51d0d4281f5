"""The vision task: timm models, their bases, training and scores, the shipped base; on two small blocks."""

import json

import lightning.pytorch as pl
import make_digits_base as maker
import pytest
import timm
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.vision.digits import DigitsDataModule
from dpp_lightning.tasks.vision.models import layer_before_head
from dpp_lightning.tasks.vision.module import VisionModule

VIT = "vit_tiny_patch16_224"
TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
HEAD = ("model.head.bias", "model.head.weight")


def fit(module, data, folder, **settings):
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(default_root_dir=folder, enable_model_summary=False, **{**defaults, **settings})
    trainer.fit(module, data)
    return trainer


def from_asset(num_classes=5, **settings):
    return VisionModule(VIT, num_classes, maker.ASSET.name, maker.MODEL_KWARGS, seed=0, **settings)


@pytest.fixture
def base(tmp_path):
    """A file of a tiny ViT of seven classes."""
    torch.manual_seed(3)
    path = tmp_path / "base.safetensors"
    save_file(timm.create_model(VIT, num_classes=7, **TINY).state_dict(), path)
    return str(path)


def test_checkpointed_gradients_are_the_same_and_blocks_run_twice(base):
    gradients, calls = [], []
    for again in (False, True):
        module = VisionModule(VIT, 5, base, TINY, seed=0, gradient_checkpointing=again)
        count = []
        module.model.blocks[0].mlp.fc1.register_forward_hook(lambda *_, count=count: count.append(1))
        module(torch.ones(2, 1, 8, 8)).square().sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2]
    assert all(torch.allclose(gradients[1][name], tensor, atol=1e-6) for name, tensor in gradients[0].items())
    with pytest.raises(ValueError, match="TwoLayer cannot do it"):
        VisionModule("two_layer", 5, gradient_checkpointing=True)


# ---------------------------------------------------------------- bases


@pytest.mark.parametrize("num_classes", [5, 7])
def test_new_parameters_are_exactly_the_head(base, num_classes):
    module = VisionModule(VIT, num_classes, base, TINY, seed=0)
    stored, state = load_file(base), module.model.state_dict()
    assert module.new_parameter_names == HEAD
    assert module.pretrained == base
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items() if not name.startswith("head."))
    assert not (num_classes == 7 and torch.equal(state["head.weight"], stored["head.weight"]))
    assert {p.shape[0] for p in module.model.head.parameters()} == {num_classes}


def test_the_head_is_a_function_of_the_seed(base):
    heads = [VisionModule(VIT, 5, base, TINY, seed=seed).model.head.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_keep_head_takes_it_from_the_base(base):
    module = VisionModule(VIT, 7, base, TINY, keep_head=True, seed=0)
    assert module.new_parameter_names == ()
    assert torch.equal(module.model.head.weight, load_file(base)["head.weight"])
    with pytest.raises(ValueError, match=r"head\.weight has shape \(7, 16\), the model's \(5, 16\).*keep_head"):
        VisionModule(VIT, 5, base, TINY, keep_head=True, seed=0)


def test_a_checkpoint_of_a_fit_is_a_base(base, tmp_path):
    module = VisionModule(
        VIT, 7, base, TINY, optimizer=lambda groups: AdamR(groups, lr=3e-3), label_smoothing=0.1, seed=0
    )
    trainer = fit(module, DigitsDataModule(classes=[0, 1, 2]), tmp_path, max_epochs=1, limit_train_batches=2)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = VisionModule(VIT, 5, str(tmp_path / "first.ckpt"), TINY, seed=0)
    assert second.new_parameter_names == HEAD
    trained = module.model.state_dict()
    assert not torch.equal(trained["pos_embed"], load_file(base)["pos_embed"])
    body = {name: tensor for name, tensor in trained.items() if not name.startswith("head.")}
    assert all(torch.equal(second.model.state_dict()[name], tensor) for name, tensor in body.items())
    kept = VisionModule(VIT, 7, str(tmp_path / "first.ckpt"), TINY, keep_head=True, seed=0)
    assert all(torch.equal(kept.model.state_dict()[name], tensor) for name, tensor in trained.items())
    with pytest.raises(ValueError, match=r"first\.ckpt does not fit the model: blocks\.1\.\S+ is not in the model"):
        VisionModule(VIT, 5, str(tmp_path / "first.ckpt"), {**TINY, "depth": 1}, seed=0)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {"net.weight": torch.ones(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt holds no tensors named model\..*net\.weight"):
        VisionModule(VIT, pretrained=str(tmp_path / "other.ckpt"))
    torch.save({"state_dict": {}, "callback": pytest.approx}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match=r"code\.ckpt holds more than weights"):
        VisionModule(VIT, pretrained=str(tmp_path / "code.ckpt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 1}, r"blocks\.1\.\S+ is not in the model"),
        ({"depth": 3}, r"blocks\.2\.\S+ is missing"),
        ({"embed_dim": 32}, r"proj\.bias has shape \(16,\), the model's \(32,\).*and \d+ more"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_with_its_tensors(base, settings, message):
    with pytest.raises(ValueError, match=message):
        VisionModule(VIT, 5, base, {**TINY, **settings}, seed=0)


def test_a_file_without_a_head_is_a_base_too(base, tmp_path):
    body = {name: tensor for name, tensor in load_file(base).items() if not name.startswith("head.")}
    save_file(body, tmp_path / "body.safetensors")
    assert VisionModule(VIT, 5, str(tmp_path / "body.safetensors"), TINY, seed=0).new_parameter_names == HEAD


@pytest.mark.parametrize("num_classes", [5, 7])
def test_a_folder_brings_its_architecture(tmp_path, num_classes):
    torch.manual_seed(3)
    model = timm.create_model(VIT, num_classes=7, **TINY)
    timm.models.save_for_hf(model, tmp_path, model_args=TINY, safe_serialization=True)
    module = VisionModule(pretrained=str(tmp_path), num_classes=num_classes, seed=0)
    assert module.new_parameter_names == HEAD
    assert torch.equal(module.model.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert not (num_classes == 7 and torch.equal(module.model.head.weight, model.head.weight))
    with pytest.raises(ValueError, match="leave model_name out"):
        VisionModule("resnet18", pretrained=str(tmp_path))
    with pytest.raises(ValueError, match="does not fit"):
        VisionModule(pretrained=str(tmp_path), num_classes=5, model_kwargs={"depth": 3})
    if num_classes == 5:
        with pytest.raises(ValueError, match="7 classes, but num_classes is 5"):
            VisionModule(pretrained=str(tmp_path), num_classes=5, keep_head=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name": "vit_tinny"}, "timm has no model_name 'vit_tinny'"),
        ({"model_name": VIT, "pretrained": "nope.safetensors"}, maker.ASSET.name),
        ({"model_name": VIT, "pretrained": "./nope"}, r"model\.pretrained \./nope: no such folder"),
        ({"model_name": VIT, "pretrained": "vit_tiny_patch16_224.augreg_in21k"}, "hub ids look like"),
        ({"model_name": "resnet18", "pretrained": "timm/vit_tiny_patch16_224.augreg_in21k"}, "is a vit_tiny_patch16"),
        ({"model_name": VIT, "num_classes": 1}, "at least 2"),
        ({"model_name": VIT, "label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"model_name": VIT, "mixup": -0.1}, "mixup is -0.1"),
        ({"model_name": VIT, "pretrained": "nope.ckpt"}, r"model\.pretrained nope\.ckpt: no such file"),
        ({"model_name": "two_layer", "model_kwargs": {"norm": "batch"}}, "norm is 'batch'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        VisionModule(**settings)


def test_a_folder_without_an_architecture_is_refused(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        VisionModule(VIT, pretrained=str(tmp_path))


@pytest.mark.parametrize(
    "name", [VIT, "resnet10t", "convnext_atto", "mobilenetv3_small_050", "poolformer_s12", "two_layer"]
)
def test_output_layer_is_what_the_head_is_given(name):
    model = timm.create_model(name, num_classes=5).eval()
    hidden, given = [], []
    model.get_submodule(layer_before_head(model)).register_forward_hook(lambda _m, _i, out: hidden.append(out))
    model.get_classifier().register_forward_pre_hook(lambda _m, inputs: given.append(inputs[0]))
    with torch.no_grad():
        model(torch.randn(2, *model.pretrained_cfg["input_size"]))
    assert torch.equal(hidden[0], given[0])


# ---------------------------------------------------------------- training and scores


def test_too_few_outputs_are_refused(tmp_path):
    module = VisionModule(VIT, 5, model_kwargs=TINY, seed=0)
    with pytest.raises(ValueError, match="num_classes 5 for the 10 classes"):
        fit(module, DigitsDataModule(), tmp_path, max_epochs=1)


def test_fit_learns_scores_the_whole_split_and_predicts(base, tmp_path):
    data = DigitsDataModule(classes=[5, 6, 7, 8, 9], eval_batch_size=50)
    module = VisionModule(VIT, 5, base, TINY, optimizer=lambda groups: AdamR(groups, lr=3e-3), seed=0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    before = pl.Trainer(accelerator="cpu", **quiet).validate(module, data, verbose=False)[0]["val_score"]
    trainer = fit(module, data, tmp_path, max_epochs=6)
    scores = trainer.callback_metrics
    assert scores["val_score"] > before + 0.3
    val = data.splits["val"]
    with torch.no_grad():
        logits = module.eval()(val.images)
    assert float(scores["val_score"]) == pytest.approx((logits.argmax(-1) == val.labels).float().mean().item())
    assert float(scores["val_loss"]) == pytest.approx(nn.functional.cross_entropy(logits, val.labels).item(), abs=1e-5)
    assert scores["val_accuracy"] == scores["val_score"]
    assert set(trainer.test(module, data, verbose=False)[0]) == {"test_score", "test_accuracy", "test_loss"}
    assert len(torch.cat(trainer.predict(module, data))) == len(data.splits["test"])


def test_fillers_take_no_part_in_the_scores(base):
    data, module = DigitsDataModule(), VisionModule(VIT, 10, base, TINY, seed=0).eval()
    data.setup()
    module.log = lambda *args, **kwargs: None
    split = data.splits["val"]
    whole, filled = (torch.utils.data.default_collate(split.__getitems__(i)) for i in (range(50), [*range(50), -1, -2]))
    assert filled[1][-2:].tolist() == [-100, -100]
    values = []
    for batch in (whole, filled):
        module.on_validation_epoch_start()
        module.validation_step(batch, 0)
        values.append({name: float(value) for name, value in module.scores("val").compute().items()})
    assert values[0] == pytest.approx(values[1])


def test_a_fit_resumed_at_the_end_of_an_epoch_is_the_whole_one(base, tmp_path):
    def run(epochs, checkpoint=None):
        module = VisionModule(VIT, 10, base, {**TINY, "drop_rate": 0.2}, scheduler="constant", seed=0)
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(module, DigitsDataModule(seed=0), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.state_dict()

    run(1)
    resumed, whole = run(2, tmp_path / "1.ckpt"), run(2)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def loss_of(module, images, labels):
    module.log = lambda *args, **kwargs: None
    return module.eval().training_step((images, labels), 0)


def test_labels_may_be_probabilities_and_are_smoothed_once():
    torch.manual_seed(0)
    images, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    soft = torch.rand(6, 5).softmax(-1)
    module = VisionModule(VIT, 5, model_kwargs=TINY, label_smoothing=0.2, seed=0)
    hard = loss_of(module, images, labels)
    log_p = module(images).log_softmax(-1)
    for given, target in ((soft, soft), (labels, nn.functional.one_hot(labels, 5))):
        smoothed = 0.8 * target + 0.2 / 5
        assert loss_of(module, images, given).item() == pytest.approx(
            -(smoothed * log_p).sum(-1).mean().item(), rel=1e-5
        )
    assert loss_of(module, images, nn.functional.one_hot(labels, 5).float()).item() == pytest.approx(
        hard.item(), rel=1e-5
    )


def test_mixup_mixes_images_and_labels_by_one_weight():
    torch.manual_seed(0)
    images, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    mixed = VisionModule(VIT, 5, model_kwargs=TINY, mixup=1.0, label_smoothing=0.2, seed=0)
    plain = VisionModule(VIT, 5, model_kwargs=TINY, label_smoothing=0.2, seed=0)
    plain.load_state_dict(mixed.state_dict())  # mixup has no weights
    torch.manual_seed(5)
    weight = float(torch.distributions.Beta(torch.tensor([1.0]), torch.tensor([1.0])).sample())
    targets = nn.functional.one_hot(labels, 5).float()
    expected = [weight * x + (1 - weight) * x.roll(1, 0) for x in (images, targets)]
    torch.manual_seed(5)
    assert loss_of(mixed, images, labels).item() == pytest.approx(loss_of(plain, *expected).item(), rel=1e-5)
    losses = {round(loss_of(mixed, images, labels).item(), 6) for _ in range(4)}
    assert len(losses) == 4
    mixed.on_validation_epoch_start()
    mixed.validation_step((images, labels), 0)
    mixed.validation_step((images, labels), 1)
    logits = mixed(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert float(mixed.scores("val").compute()["loss"]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("scheduler", ["linear", "constant", lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.1)])
def test_the_schedule_is_the_one_chosen(base, tmp_path, scheduler):
    module = VisionModule(VIT, 10, base, TINY, scheduler=scheduler, scheduler_interval="epoch", seed=0)
    trainer = fit(module, DigitsDataModule(), tmp_path, max_epochs=1, limit_train_batches=4)
    optimizer = trainer.optimizers[0]
    assert [group.get("new", False) for group in optimizer.param_groups] == [False, True]
    expected = {"linear": 0.0, "constant": 1e-4}.get(scheduler, 1e-5) if isinstance(scheduler, str) else 1e-5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def waiting(mode, **settings):
    """A scheduler that lowers the learning rate tenfold at the first epoch after which its metric is no better."""
    made = ReduceLROnPlateau if settings else torch.optim.lr_scheduler.ReduceLROnPlateau
    return lambda o: made(o, **settings, mode=mode, factor=0.1, patience=0, threshold=0.0)


@pytest.mark.parametrize(
    ("scheduler", "monitor"),
    [
        (waiting("min", monitor="val_loss"), "val_loss"),
        (waiting("max", monitor="val_accuracy"), "val_accuracy"),
        (waiting("min"), "val_loss"),
        (waiting("max"), "val_score"),
    ],
)
def test_a_schedule_that_waits_for_a_metric_goes_by_its_own(base, tmp_path, scheduler, monitor):
    module = VisionModule(VIT, 10, base, TINY, scheduler=scheduler, scheduler_interval="epoch", seed=0)
    trainer = fit(module, DigitsDataModule(), tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    (config,) = trainer.lr_scheduler_configs
    assert config.monitor == monitor
    assert config.scheduler.best == pytest.approx(float(trainer.callback_metrics[monitor]))


# ---------------------------------------------------------------- the two-layer network


@pytest.mark.parametrize("norm", ["hidden", "input", "none"])
def test_the_two_layer_network_is_its_formula(norm):
    kwargs = {"img_size": 8, "in_chans": 1, "hidden_size": 12, "norm": norm}
    module = VisionModule("two_layer", 5, model_kwargs=kwargs, seed=0)
    torch.manual_seed(1)
    x, net = torch.randn(3, 1, 8, 8), module.model
    if norm != "none":
        net.norm.weight.data.uniform_(0.5, 2.0)

    def normalised(z, here):
        return z / z.pow(2).mean(-1, keepdim=True).sqrt() * net.norm.weight if norm == here else z

    hidden = (normalised(x.flatten(1), "input") @ net.hidden.weight.T + net.hidden.bias).clamp(min=0)
    expected = normalised(hidden, "hidden") @ net.head.weight.T + net.head.bias
    assert torch.allclose(module(x), expected, atol=1e-5)
    assert module.data_config["input_size"] == (1, 8, 8)
    assert (
        sum(p.numel() for p in net.parameters())
        == 64 * 12 + 12 + 12 * 5 + 5 + {"hidden": 12, "input": 64, "none": 0}[norm]
    )
    assert module.output_layer == {"hidden": "model.norm"}.get(norm, "model.act")


def test_the_two_layer_network_is_pre_trained_then_fine_tuned_with_a_new_head(tmp_path):
    kwargs = {"img_size": 8, "in_chans": 1, "hidden_size": 64}
    first = VisionModule("two_layer", 5, model_kwargs=kwargs, optimizer=lambda p: AdamR(p, lr=3e-3), seed=0)
    trainer = fit(first, DigitsDataModule(classes=[0, 1, 2, 3, 4]), tmp_path, max_epochs=6)
    assert trainer.callback_metrics["val_score"] > 0.8
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    second = VisionModule("two_layer", 4, str(tmp_path / "base.ckpt"), kwargs, seed=0)
    assert second.new_parameter_names == HEAD
    assert torch.equal(second.model.hidden.weight, first.model.hidden.weight)
    with pytest.raises(ValueError, match=r"norm\.weight is not in the model"):
        VisionModule("two_layer", 4, str(tmp_path / "base.ckpt"), {**kwargs, "norm": "none"}, seed=0)


# ---------------------------------------------------------------- the shipped base


def test_the_shipped_base_knows_its_digits_and_is_small():
    assert maker.ASSET.stat().st_size < 1_000_000
    module = from_asset(20, keep_head=True).eval()
    assert module.new_parameter_names == ()
    assert maker.accuracy(module, "val") > 0.95
    assert maker.accuracy(module, "test") > 0.95
    with safe_open(maker.ASSET, "pt") as file:
        made = json.loads(file.metadata()["base"])
    assert (made["model_kwargs"], made["classes"]) == (maker.MODEL_KWARGS, maker.CLASSES)


def test_the_shipped_base_has_a_body_for_new_digits():
    module = from_asset()
    assert module.new_parameter_names == HEAD
    assert module.output_layer == "model.fc_norm"
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_local_file_goes_before_a_shipped_one(tmp_path, monkeypatch):
    state = load_file(maker.ASSET)
    save_file({**state, "cls_token": torch.ones_like(state["cls_token"])}, tmp_path / maker.ASSET.name)
    monkeypatch.chdir(tmp_path)
    assert from_asset().model.cls_token.eq(1).all()


def test_the_code_that_made_the_base_is_a_function_of_its_seed(tmp_path):
    for index, seed in enumerate((0, 0, 1)):
        maker.save(maker.pretrain(seed, epochs=1), tmp_path / str(index))
    same, again, other = ((tmp_path / str(index)).read_bytes() for index in range(3))
    assert same == again
    assert same != other
