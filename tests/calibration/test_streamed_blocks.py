"""Blocks that are on the device only while they run give the training that a model on the device gives.

Without a second device its part is played by a second dtype: tensors of two dtypes in one product are refused as those of
two devices are, so that a product made when the weights are away, or with what stayed behind, is an error here too.
"""

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from dpp_lightning.calibration.distillation import Distillation, TrainingSettings
from dpp_lightning.calibration.streamed_blocks import stream_blocks
from dpp_lightning.calibration.teacher import blocks_in
from dpp_lightning.methods import PruningSpec
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **SMALL)),
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)),
}
DEVICE = torch.float64
METHODS = {
    "refit": {"pruning_rate": 0.7},
    "refit everywhere": {"pruning_rate": 0.7, "method_settings": {"where": "all"}},
    "lowrank": {"method_settings": {"rank": 2}},
}


def trained(name, method, *, stream, device=DEVICE):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    tuned = {n: t + 0.05 * torch.randn_like(t) for n, t in base.items()}
    if name == "vit":
        pieces = [{"pixel_values": torch.randn(4, 3, 8, 8, dtype=DEVICE).to(device)} for _ in range(4)]
    else:
        ids = [torch.randint(5, 40, (4, 10)) for _ in range(4)]
        pieces = [{"input_ids": some if device == DEVICE else some.to(device)} for some in ids]
    model.load_state_dict(tuned)
    if stream:
        stream_blocks(model, blocks_in(model), device)
    else:
        model.to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = Distillation(model, pieces, lambda piece: model(**piece).logits, samples=16)
    model.load_state_dict(base)
    delta = PruningPlan.of(base, tuned, Scope()).draw(PruningSpec(method.split()[0], **METHODS[method]))
    delta = delta.rescaled(1.0) if method.startswith("refit") else delta
    found, tried = training.train(delta, TrainingSettings(25, 0.02, by_block=True))
    return model, base, found, [loss for _, loss in tried]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_a_model_on_the_device_and_the_weights_stay_where_they_were(name, method):
    model, base, found, losses = trained(name, method, stream=True)
    _, _, expected, expected_losses = trained(name, method, stream=False)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert losses[-1] < losses[0]
    for tensor_name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor.values, expected.tensors[tensor_name].values, rtol=1e-3, atol=1e-5)
    inside = {id(p) for block in blocks_in(model) for p in block.parameters()}
    for parameter_name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in inside else DEVICE)
        assert torch.equal(parameter.float(), base[parameter_name])


def test_a_pass_that_breaks_off_leaves_the_weights_where_they_were():
    model = MODELS["llama"]()
    blocks = blocks_in(model)
    stream_blocks(model, blocks, DEVICE)
    handle = blocks[1].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    assert all(p.dtype == torch.float32 for block in blocks for p in block.parameters())
    handle.remove()
    assert model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.dtype == DEVICE


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_too(name, method, monkeypatch):
    monkeypatch.setattr(f"{__name__}.DEVICE", torch.float32)
    _, _, _, expected = trained(name, method, stream=False, device="cpu")
    model, _, _, losses = trained(name, method, stream=True, device="cuda")
    assert losses == pytest.approx(expected, rel=1e-2)
    assert all(p.device.type == "cpu" for block in blocks_in(model) for p in block.parameters())
