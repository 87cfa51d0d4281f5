"""AdaMerging and scoring with a delta: gradients against a dense twin, a real fit on tiny tasks, dpp test --delta."""

import json

import datasets
import lightning.pytorch as pl
import pytest
import torch
from merge_cases import deltas_of, dense
from tiny import pair
from tiny_glue import make_data, make_model, make_trainer
from torch.distributions import Categorical
from torch.func import functional_call
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from dpp_lightning import SparseDelta, merge, prune
from dpp_lightning.callbacks import ApplyDelta
from dpp_lightning.cli import main
from dpp_lightning.merging.sources import MergeSource
from dpp_lightning.merging.trained_weights import MergedTensors
from dpp_lightning.tasks.adamerging.glue_mix import GLUEMixDataModule
from dpp_lightning.tasks.adamerging.module import AdaMergingModule, prediction_entropy
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule

LABELS = {"sst2": 2, "mnli": 3, "stsb": 1}


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("rows", ["layer", "task"])
def test_gradients_are_those_of_dense_sums_and_the_base_comes_back(rows):
    base, _ = pair()
    deltas = deltas_of(base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    blends = MergedTensors(base.requires_grad_(False), MergeSource.all(list(deltas.values()), list(deltas)))
    torch.manual_seed(0)
    shape = (len(blends.names) if rows == "layer" else 1, len(deltas))
    coefficients, twin = (
        torch.rand(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)
    )
    x = torch.randint(37, (16, 5))

    dense_deltas = [dense(delta, base) for delta in deltas.values()]
    whole = dict(before)
    for i, name in enumerate(blends.names):
        row = twin[i if rows == "layer" else 0]
        whole[name] = before[name] + sum(row[k] * delta[name].float() for k, delta in enumerate(dense_deltas))
    loss = prediction_entropy(functional_call(base, whole, (x,)))
    loss.backward()

    blends.write(coefficients)
    merged = prediction_entropy(functional_call(base, blends.tensors(coefficients), (x,)))
    merged.backward()
    assert merged.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(coefficients.grad, twin.grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in base.parameters())
    assert all(
        t.data_ptr() == base.get_parameter(n).data_ptr() for n, t in blends.tensors(coefficients).items()
    )  # no copies
    blends.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_entropy_is_that_of_the_softmax_and_counts_predictions_of_real_tokens():
    logits = torch.randn(3, 4, 7)
    expected = Categorical(logits=logits).entropy()
    assert torch.allclose(prediction_entropy(logits[:, 0]), expected[:, 0].mean())
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    used = [expected[0, :3].sum(), expected[1, 0], expected[2, 1:3].sum()]
    assert torch.allclose(prediction_entropy(logits, mask), sum(used) / 6)


@pytest.fixture
def tasks(tmp_path):
    """Base folder, data folder, and the folders of three tasks' unpruned and pruned deltas."""
    base, folders = make_model(tmp_path / "base"), {}
    for k, (task, labels) in enumerate(LABELS.items()):
        make_data(tmp_path / "glue", task)
        torch.manual_seed(k)
        model = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(tmp_path / f"{task}-model")
        prune(base, tmp_path / f"{task}-model", "magnitude", 0.5).save_pretrained(tmp_path / task)
        prune(base, tmp_path / f"{task}-model", "magnitude", 0.0).save_pretrained(tmp_path / f"{task}-whole")
        folders[task] = str(tmp_path / task)
    return base, str(tmp_path / "glue"), folders


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_a_fit_lowers_the_entropy_and_leaves_coefficients_and_the_merge_by_them(tasks, tmp_path, granularity):
    base, data, folders = tasks
    pl.seed_everything(0, verbose=False)
    module = AdaMergingModule(
        folders, base, granularity=granularity, optimizer=lambda p: torch.optim.Adam(p, 0.05), output_dir=tmp_path / "m"
    )
    logged = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(float(trainer.callback_metrics["train_entropy"]))

    mix = GLUEMixDataModule(path=data, val_fraction=0.4, batch_size=64)
    trainer = make_trainer(tmp_path, max_steps=15, callbacks=[Watch()], num_sanity_val_steps=0, max_epochs=50)
    with pytest.warns(UserWarning, match="stsb has no entropy"):
        trainer.fit(module, mix)
    assert logged[-1] < logged[0] - 0.02

    weights = json.loads((tmp_path / "m" / "coefficients.json").read_text())
    assert list(weights) == list(folders)
    assert {round(w, 6) for w in weights["stsb"].values()} == {0.3}
    assert max(abs(w - 0.3) for w in weights["sst2"].values()) > 0.05
    merged = SparseDelta.from_pretrained(tmp_path / "m" / "delta")
    expected = merge(base, folders, "adamerging", weights)
    assert all(torch.allclose(p.values, expected.tensors[n].values) for n, p in merged.tensors.items())

    trainer.test(module, mix, verbose=False)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert scores["test_score"] == pytest.approx(sum(scores[f"test_{t}_score"] for t in LABELS) / 3, abs=1e-6)
    mnli = GLUEModule("mnli", base, optimizer=torch.optim.SGD)
    apply = ApplyDelta(str(tmp_path / "m" / "delta"))  # the module's own task is taken
    alone = make_trainer(tmp_path, callbacks=[apply])
    alone.test(mnli, GLUEDataModule(path=data), verbose=False)
    assert float(alone.callback_metrics["test_score"]) == pytest.approx(scores["test_mnli_score"], abs=1e-6)
    checkpoint = tmp_path / "c.ckpt"
    trainer.save_checkpoint(checkpoint)
    assert torch.load(checkpoint, weights_only=True)["state_dict"].keys() == {"coefficients"}


def test_adamerging_on_a_causal_language_model(tmp_path, monkeypatch):
    base = make_model(tmp_path / "base", GPT2LMHeadModel, GPT2Config(vocab_size=44, n_embd=16, n_layer=1, n_head=2))
    folders = {}
    for k, task in enumerate(("math", "law")):
        model = GPT2LMHeadModel.from_pretrained(base)
        torch.manual_seed(k)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(tmp_path / f"{task}-model")
        prune(base, tmp_path / f"{task}-model", "dare", 0.5, seed=k).save_pretrained(tmp_path / task)
        folders[task] = str(tmp_path / task)
    (tmp_path / "math.txt").write_text("".join(f"w{i} w{i + 1} w{i + 2}\n\n" for i in range(30)))
    rows = [json.dumps({"body": " ".join(f"w{(i * k) % 40}" for k in range(1, 9))}) for i in range(20)]
    (tmp_path / "law.jsonl").write_text("\n".join(rows))
    texts = {"math": str(tmp_path / "math.txt"), "law": str(tmp_path / "law.jsonl")}
    monkeypatch.chdir(tmp_path)
    model = ["--model", "AdaMergingModule", f"--model.deltas={json.dumps(folders)}", f"--model.pretrained={base}"]
    model += ["--model.architecture=causal-lm", "--model.output_dir=m", "--model.optimizer=Adam"]
    model += ["--model.optimizer.lr=0.01", "--trainer.max_epochs=3", "--trainer.logger=false"]
    data = ["--data", "TextMixDataModule", "--data.column=text"]
    assert main(["fit", *model, *data, f"--data.files={json.dumps(texts)}"]) == 2  # law.jsonl has no such column
    (tmp_path / "law.jsonl").write_text("\n".join(rows).replace("body", "text"))
    assert main(["fit", *model, *data, f"--data.files={json.dumps(texts)}"]) == 0
    merged = SparseDelta.from_pretrained(tmp_path / "m" / "delta")
    weights = json.loads((tmp_path / "m" / "coefficients.json").read_text())
    target = GPT2LMHeadModel.from_pretrained(base)
    merged.apply_(target)  # no head of a task's own: nothing to choose
    assert max(abs(w - 0.3) for w in weights["law"].values()) > 0.01


def test_bad_input_to_adamerging(tasks, tmp_path):
    base, data, folders = tasks
    with pytest.raises(ValueError, match="tasks with classes"):
        AdaMergingModule({"stsb": folders["stsb"]}, base)
    module = AdaMergingModule({"sst2": str(tmp_path / "nowhere")}, base)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_trainer(tmp_path, max_steps=1).fit(module, GLUEMixDataModule(path=data))
    headless = SparseDelta.from_pretrained(folders["sst2"])
    SparseDelta(headless.tensors, {}, headless.info).save_pretrained(tmp_path / "headless")
    module = AdaMergingModule({"sst2": str(tmp_path / "headless")}, base)
    with pytest.raises(ValueError, match="neither the base nor the delta of sst2 holds classifier"):
        make_trainer(tmp_path, max_steps=1).fit(module, GLUEMixDataModule(path=data))


@pytest.mark.parametrize("case", ["an input", "a file of the user's"])
def test_adamerging_refuses_an_output_that_it_could_not_replace_before_the_fit(tasks, tmp_path, case):
    base, data, folders = tasks
    SparseDelta.from_pretrained(folders["sst2"]).save_pretrained(tmp_path / "m" / "delta")
    if case == "an input":
        module = AdaMergingModule({"sst2": str(tmp_path / "m" / "delta")}, base, output_dir=str(tmp_path / "m"))
        said = "is the same folder as model.deltas.sst2"
    else:
        (tmp_path / "m" / "delta" / "notes.txt").write_text("x")
        module = AdaMergingModule({"sst2": folders["sst2"]}, base, output_dir=str(tmp_path / "m"))
        said = "other files beside a delta, notes.txt, and is not overwritten"
    trainer = make_trainer(tmp_path, max_steps=1)
    with pytest.raises((ValueError, FileExistsError), match=said):
        trainer.fit(module, GLUEMixDataModule(path=data))
    assert trainer.global_step == 0


def run_test(base, data, task, *arguments):
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    model = ["--model", "GLUEModule", f"--model.task={task}", f"--model.pretrained={base}"]
    return main(["test", *model, "--data", "GLUEDataModule", f"--data.path={data}", *quiet, *arguments])


def score_of(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if "test_score" in line]
    return float(lines[-1].split("│")[2])


def test_dpp_test_scores_base_and_delta_and_picks_the_head_of_a_merge(tasks, tmp_path, capsys, monkeypatch):
    base, data, folders = tasks
    monkeypatch.chdir(tmp_path)
    module = GLUEModule("sst2", str(tmp_path / "sst2-model"), optimizer=torch.optim.SGD)
    (expected,) = make_trainer(tmp_path).test(module, GLUEDataModule(path=data, tokenizer=base), verbose=False)
    capsys.readouterr()
    assert run_test(base, data, "sst2", "--delta", str(tmp_path / "sst2-whole")) == 0
    assert score_of(capsys) == pytest.approx(expected["test_score"], abs=1e-6)

    whole = {task: str(tmp_path / f"{task}-whole") for task in ("sst2", "stsb")}
    merge(base, whole, weights={"sst2": 1.0, "stsb": 0.0}).save_pretrained(tmp_path / "merged")
    assert run_test(base, data, "sst2", "--delta", str(tmp_path / "merged"), "--task", "sst2") == 0
    assert score_of(capsys) == pytest.approx(expected["test_score"], abs=1e-6)
    assert run_test(base, data, "sst2", "--delta", str(tmp_path / "merged")) == 0  # the model's own task
    assert score_of(capsys) == pytest.approx(expected["test_score"], abs=1e-6)

    (tmp_path / "tuned.ckpt").touch()
    for arguments, message in (
        (["--delta", str(tmp_path / "merged"), "--task", "stsb"], "the model's task is 'sst2'"),
        (["--delta", str(tmp_path / "merged"), "--task", "cola"], "'cola'"),
        (["--task", "sst2"], "give --delta"),
        (["--delta", folders["sst2"], "--ckpt_path", "tuned.ckpt"], "give one of them"),
        (["--delta", str(tmp_path / "none")], "no such folder"),
    ):
        assert run_test(base, data, "sst2", *arguments) == 2
        assert message in capsys.readouterr().err


def test_a_delta_is_not_applied_in_a_fit_and_is_off_again_after_a_test(tasks, tmp_path):
    base, data, folders = tasks
    module = GLUEModule("sst2", base, optimizer=torch.optim.SGD)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    callback = ApplyDelta(folders["sst2"])
    with pytest.raises(ValueError, match="scored, not trained"):
        make_trainer(tmp_path, callbacks=[callback]).fit(module, GLUEDataModule(path=data))
    make_trainer(tmp_path, callbacks=[callback]).test(module, GLUEDataModule(path=data), verbose=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    wrong = GLUEModule("sst2", str(tmp_path / "mnli-model"), optimizer=torch.optim.SGD)
    with pytest.raises(ValueError, match="not the base of this delta"):
        make_trainer(tmp_path, callbacks=[callback]).test(wrong, GLUEDataModule(path=data, tokenizer=base))
