"""HFDeltaPruneCallback in a Trainer on several processes: one table, the deltas of its weights, and those put back."""

import distjobs
import hfcases
import numpy as np
import pytest
import torch
from tiny_hf import Texts, equal, fresh_model, make_trainer, rows_in, values_of

from dpp_lightning import SparseDelta, prune

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder / "out" / "deltas", distjobs.run(hfcases.fit, 2, str(folder), lightning=True)


def finetuned(ranks):
    model = fresh_model()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in ranks[1][0][2].items()})
    return model


def test_all_ranks_have_the_rows_of_the_one_file(ranks):
    folder, ended = ranks
    assert ended[0][0] == ended[1][0]
    assert len(ended[0][0]) == 2 + 3 * 2 + 1
    assert [(r["method"], r["seed"], r["q"], r["score"], r["num_bytes"]) for r in rows_in(folder)] == ended[0][0]
    assert (folder / "q_curve.png").is_file()
    assert ended[0][0][1][3] == ended[0][1] == ended[1][1]  # of the fine-tuned model, by evaluate


def test_deltas_are_those_of_the_weights_and_score_as_in_one_process(ranks, tmp_path):
    folder, _ = ranks
    for row in rows_in(folder)[2:]:
        saved = SparseDelta.from_pretrained(folder / row["folder"])
        pruned = fresh_model()
        saved.apply_(pruned)
        if row["method"] == "dare":
            by_hand = fresh_model()
            prune(fresh_model(), finetuned(ranks), "dare", 0.9, row["seed"]).apply_(by_hand)
            assert equal(values_of(pruned), values_of(by_hand))
        scored = make_trainer(tmp_path, pruned, evaluated=Texts(97, 2)).evaluate()
        assert scored["eval_accuracy"] == row["score"]


def test_the_weights_are_those_of_a_training_without_it(ranks, tmp_path):
    plain = distjobs.run(fit_alone, 2, str(tmp_path), lightning=True)
    for rank, (_, _, weights) in plain.items():
        assert all(np.array_equal(ranks[1][rank][2][name], values) for name, values in weights.items())


def fit_alone(folder):
    return hfcases.fit(folder, prunes=False)


def test_a_run_goes_on_with_the_rows_that_the_first_rank_sees(ranks):
    folder, ended = ranks
    before = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text("".join(before.splitlines(keepends=True)[:-2]))
    again = distjobs.run(hfcases.fit, 2, str(folder.parents[1]), lightning=True)
    assert [row[:4] for row in again[1][0]] == [row[:4] for row in ended[0][0]]
    lines, kept = (folder / "results.jsonl").read_text().splitlines(), before.splitlines()
    assert lines[:-2] == kept[:-2]
    assert len(lines) == len(kept)
