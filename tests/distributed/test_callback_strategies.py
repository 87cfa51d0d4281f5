"""The callback's extra passes at the end of a fit under every strategy: the same deltas, and nobody else notices."""

import csv
import json

import distjobs
import pytest
import strategycases
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.multiprocessing import ProcessRaisedException

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks.prune_run.best_weights import load_into_shards
from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.common.optimization import with_schedule
from dpp_lightning.trainer.strategies import refuse_shared_memory

ROUNDING = 1e-6  # of weights and of kept values, whose sizes are about 1
ENDS = ["train", "fit", "teardown TrainerFn.FITTING"]


def assert_same_deltas(folder, expected_folder):
    """Equal positions and base; values up to rounding."""
    names = sorted(path.name for path in expected_folder.iterdir() if path.is_dir())
    assert names == sorted(path.name for path in folder.iterdir() if path.is_dir())
    for name in names:
        delta, expected = (SparseDelta.from_pretrained(parent / name) for parent in (folder, expected_folder))
        assert delta.base_fingerprint == expected.base_fingerprint
        assert delta.tensors.keys() == expected.tensors.keys()
        for tensor, kept in expected.tensors.items():
            assert torch.equal(delta.tensors[tensor].indices, kept.indices)
            assert torch.allclose(delta.tensors[tensor].values, kept.values, atol=ROUNDING)


def close(weights, expected):
    return weights.keys() == expected.keys() and all(
        torch.allclose(weights[name], tensor, atol=ROUNDING) for name, tensor in expected.items()
    )


def logged(folder):
    """The rows of a log less those of the pruned models."""
    with open(folder / "log" / "0" / "metrics.csv") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("dpp/")} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() != {"epoch", "step"} and row.keys() != {"step"}]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return folder, strategycases.watched_fits("single", str(folder))


@pytest.mark.parametrize(
    ("strategy", "world"),
    [
        ("ddp", 2),
        ("fsdp2", 2),
        pytest.param("ddp", 4, marks=pytest.mark.distributed),
        pytest.param("fsdp2", 4, marks=pytest.mark.distributed),
    ],
)
def test_every_rank_gives_the_rows_and_deltas_of_one_process(watched, tmp_path, strategy, world):
    folder, (_, expected) = watched
    results = distjobs.run(strategycases.watched_fits, world, strategy, str(tmp_path), lightning=True)
    assert len(results) == world
    for without, pruned in results.values():
        assert_same_rows(pruned["rows"], expected["rows"])
        assert close(pruned["weights"], expected["weights"])
        assert_unnoticed(without, pruned)
    uploads = [pruned["uploads"] for _, pruned in results.values()]
    assert uploads == [["user/name-dare-p0.9-seed0", "user/name-darex-q-p0.9-seed0"]] + [[]] * (world - 1)
    assert_same_deltas(tmp_path / "with" / "deltas", folder / "with" / "deltas")
    assert_left_alone(tmp_path)


def test_ranks_that_write_into_the_log_folder_end_well(tmp_path):
    """The folder is a collective: one that rank 0 alone asked for ended every such training in an error."""
    results = distjobs.run(strategycases.fit_in_the_log_folder, 2, "ddp", str(tmp_path), lightning=True)
    assert results == {0: 3, 1: 3}
    assert (tmp_path / "log" / "0" / "deltas" / "dare-p0.9-seed0" / "delta_model.safetensors").is_file()
    assert len((tmp_path / "log" / "0" / "predictions.jsonl").read_text().splitlines()) == 2 * 8


def assert_same_rows(rows, expected_rows):
    """Of the same methods and kept entries; q and scores up to rounding."""
    for (method, q, score, num_kept), (*expected, expected_num) in zip(rows, expected_rows, strict=True):
        expected_method, expected_q, expected_score = expected
        assert (method, num_kept) == (expected_method, expected_num)
        assert q == (expected_q and pytest.approx(expected_q, rel=1e-4))
        assert score == pytest.approx(expected_score, abs=1e-6)


def test_one_process_does_not_notice_the_extra_passes(watched):
    folder, (without, pruned) = watched
    assert [row[0] for row in pruned["rows"]] == ["base", "fine-tuned", "dare", "darex-q"]
    assert_unnoticed(without, pruned)
    assert_left_alone(folder)


def assert_unnoticed(without, pruned):
    """What the trainer, its callbacks and its module are left with is what they are without the callback."""
    assert pruned["kept"], "the fine-tuned weights are back bit for bit"
    assert pruned["weights"].keys() == without["weights"].keys()
    assert all(torch.equal(pruned["weights"][name], tensor) for name, tensor in without["weights"].items())
    assert pruned["ends"] == without["ends"] == ENDS
    assert pruned["best"] == without["best"]
    assert pruned["stop"] == without["stop"]
    of_training = {name: value for name, value in pruned["metrics"].items() if not name.startswith("dpp/")}
    assert of_training == without["metrics"]
    assert pruned["tested"] == without["tested"] == pytest.approx(pruned["rows"][1][2], abs=1e-6)
    assert pruned["rows"][1][2] > 0.6 > pruned["rows"][2][2]


def assert_left_alone(folder):
    """As many checkpoints, and the same rows in the log, but for the one of the pruned models."""
    saved = [sorted(path.name for path in (folder / name / "saved").iterdir()) for name in ("without", "with")]
    assert saved[0] == saved[1]
    assert len(saved[0]) == 4, "two validations in each of two epochs"
    assert logged(folder / "with") == logged(folder / "without")


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.distributed)])
def test_a_fit_that_starts_its_own_ranks_leaves_deltas_rows_and_metrics(tmp_path, strategy):
    expected = strategycases.launching_fit("single", str(tmp_path / "single"))
    launched = distjobs.run(strategycases.launching_fit, 1, strategy, str(tmp_path / "many"), lightning=True)[0]
    assert_same_deltas(tmp_path / "many" / "deltas", tmp_path / "single" / "deltas")
    rows, expected_rows = (
        [
            [json.loads(line)[column] for column in ("method", "q", "score", "num_kept")]
            for line in (tmp_path / kind / "deltas" / "results.jsonl").read_text().splitlines()
        ]
        for kind in ("many", "single")
    )
    assert_same_rows(rows, expected_rows)
    del launched["metrics"]["loss"], expected["metrics"]["loss"]  # of one rank's samples
    assert launched["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
    assert close(launched["weights"], expected["weights"])
    assert launched["tested"] == pytest.approx(expected["tested"], abs=1e-6)
    assert not launched["again"], "a test after the fit makes no second table"
    assert (launched["results"], expected["results"]) == (0, 4), "the rows are on disk, the attribute was the ranks'"


SAME_MEMORY = r"all ranks on a CPU train the same memory: take start_method"


def test_ranks_of_a_fork_server_are_refused_on_the_cpu():
    class Trainer:
        world_size = 2
        strategy = DDPStrategy(parallel_devices=[torch.device("cpu")] * 2, start_method="forkserver")

    with pytest.raises(ValueError, match=SAME_MEMORY):
        refuse_shared_memory(Trainer())
    Trainer.world_size = 1
    refuse_shared_memory(Trainer())


@pytest.mark.distributed
def test_a_fit_in_ranks_of_a_fork_server_is_refused_before_training(tmp_path):
    with pytest.raises(ProcessRaisedException, match=SAME_MEMORY):
        distjobs.run(strategycases.launching_fit, 1, "forkserver", str(tmp_path), lightning=True)


@pytest.mark.distributed
def test_beside_a_moving_average_every_rank_has_the_true_scores(tmp_path):
    expected = strategycases.averaged_fit("single", str(tmp_path / "single"))
    fits = distjobs.run(strategycases.averaged_fit, 2, "ddp", str(tmp_path / "ddp"), lightning=True)
    for fit in [expected, *fits.values()]:
        base, finetuned, _ = fit["scores"]
        assert base < 0.5 < finetuned == pytest.approx(fit["tested"], abs=1e-6)
        assert fit["scores"] == pytest.approx(expected["scores"], abs=1e-6)
    assert len(fits) == 2


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    return folder, strategycases.best_fit("single", str(folder))


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2-folder", pytest.param("ddp", marks=pytest.mark.distributed)])
def test_the_best_weights_are_pruned_and_the_last_ones_come_back(best, tmp_path, strategy):
    folder, expected = best
    results = distjobs.run(strategycases.best_fit, 2, strategy, str(tmp_path), lightning=True)
    for fit in [expected, *results.values()]:
        assert fit["kept"]
        assert fit["state"]
        assert fit["scores"][1] == pytest.approx(fit["best"], abs=1e-6)
        assert fit["scores"] == pytest.approx(expected["scores"], abs=1e-6)
        assert close(fit["weights"], expected["weights"])
    assert_same_deltas(tmp_path / "deltas", folder / "deltas")
    last = {name.removeprefix("net."): tensor for name, tensor in expected["weights"].items()}
    delta = SparseDelta.from_pretrained(folder / "deltas" / "dare-p0.9-seed0")
    base = {name.removeprefix("net."): t for name, t in strategycases.Shared().state_dict().items()}
    pruned = delta.tensors["0.weight"]
    of_last = (last["0.weight"] - base["0.weight"]).flatten()[pruned.indices.long()]
    assert not torch.allclose(pruned.values, of_last, atol=1e-3), "the best weights differ from the last"


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    module(torch.randn(8, 3))
    torch.save({"state_dict": module.state_dict()}, tmp_path / "best.ckpt")
    loaded = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    load_into_shards(loaded, tmp_path / "best.ckpt")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    wrong = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"2\.weight is missing.*1\.weight is not of this model.*\(2, 3\), expected"):
        load_into_shards(wrong, tmp_path / "best.ckpt")


@pytest.mark.distributed
def test_fsdp1_trains_with_adamr_and_goes_on_from_shards_as_one_process_does(tmp_path):
    expected = strategycases.plain_fit("single", 2, None, None)
    whole = distjobs.run(strategycases.plain_fit, 2, "fsdp1", 2, None, None, lightning=True)
    assert all(close(weights, expected) for weights in whole.values())
    distjobs.run(strategycases.plain_fit, 2, "fsdp1", 1, None, str(tmp_path / "first"), lightning=True)
    for world in (1, 2, 4):
        first = str(tmp_path / "first")
        resumed = distjobs.run(strategycases.plain_fit, world, "fsdp1", 2, first, None, lightning=True)
        assert all(close(weights, expected) for weights in resumed.values())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "message"), [("fsdp1", "(FSDP1) flattens"), ("fsdp1-flat", "in flat padded pieces")]
)
def test_the_callback_refuses_fsdp1_before_training(tmp_path, strategy, message):
    refusals = distjobs.run(strategycases.refused_fit, 2, strategy, str(tmp_path), True, lightning=True)
    for error, steps in refusals.values():
        assert message in error
        assert "FSDP2Strategy" in error
        assert steps == 0


@pytest.mark.distributed
def test_adamr_refuses_flat_parameters_in_any_module(tmp_path):
    refusals = distjobs.run(strategycases.refused_fit, 2, "fsdp1-flat", str(tmp_path), False, lightning=True)
    for error, steps in refusals.values():
        assert "flat parameter of FSDP1" in error
        assert "use_orig_params=True" in error
        assert steps == 0


def test_the_tasks_refuse_flat_parameters_and_take_those_of_use_orig_params():
    class Trainer:
        world_size = 2

        def __init__(self, **settings):
            self.strategy = FSDPStrategy(**settings)

    optimizer = AdamR([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"AdamR needs.*FSDPStrategy\(use_orig_params=False\).*FSDP2Strategy"):
        with_schedule(optimizer, "constant", "step", Trainer(use_orig_params=False), 0.0)
    assert with_schedule(optimizer, "constant", "step", Trainer(), 0.0) is optimizer
