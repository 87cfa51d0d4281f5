"""Memory of training kept values, by hand."""

import pytest

from dpp_lightning.analysis.fit_memory import DecoderShape, plan_fit_memory, table

SHAPE = DecoderShape(parameters=1_000_000, blocks=4, hidden=64, outside=200_000)


def test_every_part_is_what_follows_from_the_size():
    plan = plan_fit_memory(SHAPE, pruning_rate=0.99, texts=16, length=10, step_texts=2, weights="float32")
    assert plan.weights == 4_000_000
    assert plan.trained == 10_000 * (4 * 4 + 3 * 8)  # value, gradient, two moments; position, row, column
    assert plan.activations == 2 * 10 * 64 * 4 * (4 + 14)
    assert plan.teacher == 160 * 64 * 4 * 4 + 160 * 32 * (4 + 8)
    assert plan.device == plan.weights + plan.trained + plan.activations


def test_block_by_block_the_device_holds_one_block_and_the_host_all_of_them():
    whole = plan_fit_memory(SHAPE, pruning_rate=0.99)
    block = plan_fit_memory(SHAPE, pruning_rate=0.99, loss="block")
    assert block.weights == 2 * (200_000 + 200_000)
    assert block.activations == 8 * 128 * 64 * 2 * (1 + 14)
    assert block.device == block.weights + block.activations
    assert block.host == 2 * 800_000 + whole.trained + whole.teacher
    assert whole.host == whole.teacher


def test_training_some_numbers_is_far_less_than_training_all():
    plan = plan_fit_memory(DecoderShape(7e9, 32, 4096, 2 * 32_000 * 4096))
    assert plan.device < 17 * 2**30  # full fine-tuning in the same dtype: 7e9 numbers of 8 bytes
    assert plan.device < 0.3 * 7e9 * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruning_rate": 1.0}, "pruning_rate"),
        ({"texts": 0}, "texts"),
        ({"weights": "int4"}, "weights must be"),
        ({"loss": "layer"}, "loss"),
    ],
)
def test_numbers_out_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_fit_memory(SHAPE, **settings)


def test_the_table_has_a_row_for_every_size():
    rows = table().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["0.5 B", "7 B", "70 B"]
    assert all(row.count("|") == 7 for row in rows)
