"""Which outputs are compared in training: the largest of logits over a vocabulary, and all numbers of any others."""

import pytest
import torch
from tiny_causal import VOCABULARY, make_decoder
from torch import nn

from dpp_lightning.calibration.output_change import OutputChange, logits_that_count, top_logits_error
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.calibration.teacher import TOP_LOGITS, Teacher

OTHERS = {
    "reconstruction": (nn.Linear(6, 64), torch.randn(8, 6)),
    "map of an image": (nn.Conv2d(2, 3, 3, padding=1), torch.randn(8, 2, 40, 40)),
    "one number a sample": (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), torch.randn(64, 6)),
}


@pytest.mark.filterwarnings("ignore:no hidden states")
@pytest.mark.parametrize("kind", OTHERS)
def test_every_number_of_an_output_counts(kind):
    module, batch = OTHERS[kind]
    teacher = Teacher(module, module)
    teacher.learn([batch])
    with torch.no_grad():
        changed = module(batch).clone()
    changed.view(-1)[changed.argmin()] += 1.0  # the smallest
    teacher.forward = lambda _: changed
    assert float(teacher.loss(batch, 0).detach()) == pytest.approx(1 / changed.numel(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:no hidden states")
def test_of_logits_over_a_vocabulary_the_largest_count():
    module, tokens = make_decoder().eval(), torch.randint(0, VOCABULARY, (2, 5))
    assert module.get_input_embeddings().num_embeddings == VOCABULARY
    teacher = Teacher(module, lambda x: module(x).logits)
    teacher.learn([tokens])
    with torch.no_grad():
        logits = module(tokens).logits
    for place, counts in ((logits[0, 0].argmin(), False), (logits[0, 0].argmax(), True)):
        changed = logits.clone()
        changed[0, 0, place] += 1.0
        teacher.forward = lambda _, changed=changed: changed
        teacher.blocks = []
        assert bool(teacher.loss(tokens, 0) > 1e-9) is counts


@pytest.mark.parametrize(
    ("shape", "counted"), [((4, 7), 7), ((4, 100), 100), ((4, 4096), 4096), ((4, 4097), TOP_LOGITS), ((4,), 4), ((), 1)]
)
def test_outputs_wider_than_any_classes_are_taken_for_logits_over_a_vocabulary(shape, counted):
    assert logits_that_count(nn.Linear(1, 1), torch.zeros(shape), TOP_LOGITS) == counted


def test_learned_rescaling_goes_by_every_sample_s_number():
    flat, batch = OTHERS["one number a sample"]
    apart = [BatchGradients(m, batch, m).reference for m in (flat, flat[0])]
    moved = [[reference + torch.arange(16.0).view(reference.shape) for reference in references] for references in apart]
    errors = [
        float(top_logits_error(reference[0], other[0], BatchGradients(m, batch, m)._counted))
        for m, reference, other in zip((flat, flat[0]), apart, moved, strict=True)
    ]
    assert errors == pytest.approx([float(torch.arange(16.0).square().mean())] * 2)


def test_the_change_of_one_number_a_sample_is_that_of_all_samples():
    outputs = [torch.arange(12.0)]
    change = OutputChange(lambda reduce: [reduce(i, output) for i, output in enumerate(outputs)], "top-logits")
    change.take_reference()
    outputs[0] = outputs[0] + 2
    assert change() == pytest.approx(4.0)
