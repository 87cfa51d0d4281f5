"""dpp eval: refusals before a model is loaded, base plus delta against the dense model, and the real harness, offline."""

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_causal import make_decoder, make_tokenizer, save_decoder, widen_norms, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from dpp_lightning import SparseDelta
from dpp_lightning.cli import main
from dpp_lightning.cli.eval import load_model, side_folder

LENGTH = 96
WORDS = torch.tensor([[7, 9, 30, 41, 5], [3, 3, 80, 12, 270]])


@pytest.fixture
def models(tmp_path):
    """A base and a model fine-tuned from it, in bfloat16, where base + (fine-tuned - base) is exact in float32."""
    return make_pair(tmp_path)


def make_pair(folder, dtype=torch.bfloat16, words=0):
    """Folders of base and fine-tuned model; ``words`` is how many the fine-tuned vocabulary has more."""
    base = make_decoder(positions=LENGTH).to(dtype)
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    tuned = make_decoder(positions=LENGTH).to(dtype)
    if words:
        tuned.resize_token_embeddings(tuned.config.vocab_size + words)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    tuned.generation_config.eos_token_id = 5
    tuned.save_pretrained(folder / "tuned")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(words)])
    tokenizer.save_pretrained(folder / "tuned")
    return str(folder / "base"), str(folder / "tuned")


def make_delta(base, tuned, folder, rate=0.0):
    command = ["prune", base, tuned, "--pruning_rate", str(rate), "--dtype", "float32", "--output", str(folder)]
    assert main(command) == 0
    return str(folder)


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for lm_eval with one task, whose score is the sum of the model's logits; its ``calls`` are noted."""
    calls = []

    class Manager:
        all_tasks = ("gsm8k", "gsm8k_cot", "gsm_plus", "humaneval", "mmlu")

        def __init__(self, include_path=None):
            self.include_path = include_path

        def match_tasks(self, names):
            return [name for name in self.all_tasks if name in names]

        def load(self, names):
            config = SimpleNamespace(generation_kwargs={"max_gen_toks": 90})
            kind = partial(SimpleNamespace, OUTPUT_TYPE="generate_until", config=config)
            return {"tasks": {n: kind(task_name=n, UNSAFE_CODE=n == "humaneval") for n in names}}

    class HFLM:
        max_gen_toks = 256

        def __init__(self, pretrained, tokenizer, batch_size, max_length):
            self.model, self.tokenizer, self.max_length = pretrained, tokenizer, max_length or LENGTH

    def simple_evaluate(model, tasks, **settings):
        calls.append((model, tasks, settings))
        with torch.no_grad():
            total = model.model(WORDS).logits.double().sum().item()
        scores = {"alias": "gsm8k", "sample_len": 2, "sum,none": total, "sum_stderr,none": "N/A", "acc,strict": 0.25}
        scores["acc_stderr,strict"] = 0.125
        return {"results": {task.task_name: scores for task in tasks}, "n-shot": {"gsm8k": 5}, "config": {"f": len}}

    contents = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }
    for name, inside in contents.items():
        module = ModuleType(name)
        vars(module).update(inside)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def run_eval(model, output, *options):
    defaults = {"--tasks": "gsm8k", "--device": "cpu", "--output": str(output)}
    words = [word for option in defaults.items() if option[0] not in options for word in option]
    return main(["eval", str(model), *words, *options])


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit", "0"], "--limit is 0, expected 1 or more"),
        (["--num_fewshot", "-1"], "--num_fewshot is -1, expected 0 or more"),
        (["--batch_size", "0"], "--batch_size is 0, expected 1 or more"),
        (["--max_length", "1"], "--max_length is 1, expected 2 or more"),
        (["--task", "sst2"], "--task sst2 chooses a task of a merged delta: give --delta DELTA"),
        (["--include_path", "nowhere"], "--include_path nowhere: no such folder"),
        (["--output", "/proc/nowhere/x.json"], "cannot write into /proc/nowhere"),
        (["--output", "."], "--output . is a folder, expected a file in it"),
        (["--device", "cuba"], "--device cuba cannot be used here"),
    ],
)
def test_wrong_options_are_refused_in_one_line_also_without_the_harness(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_eval("nowhere", tmp_path / "x.json", *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_missing_harness_is_named_with_its_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_eval("nowhere", tmp_path / "x.json") == 2
    error = capsys.readouterr().err
    assert "pip install 'dpp_lightning[eval]'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "gsm8"], "has no task 'gsm8' (near: gsm8k, "),
        (["--tasks", "gsm8k,qqqqq"], "has no task 'qqqqq'; `lm_eval ls tasks` lists all"),
        (["--tasks", "humaneval"], "humaneval runs code that the model writes"),
        (["--delta", "/nowhere"], "/nowhere: no such folder"),
        (["--delta", "{base}"], "base is no delta folder but a model"),
        (["--delta", "{delta}", "--task", "sst2"], "has no task 'sst2': it is no merged delta"),
        (["--apply_chat_template"], "the tokenizer has no chat template"),
    ],
)
def test_wrong_tasks_and_deltas_are_refused_before_the_model_is_loaded(
    options, said, models, tmp_path, harness, monkeypatch, capsys
):
    base, tuned = models
    delta = make_delta(base, tuned, tmp_path / "delta")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    capsys.readouterr()
    assert run_eval(base, tmp_path / "x.json", *(option.format(base=base, delta=delta) for option in options)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(("model", "said"), [("/nowhere", "no such file or folder"), ("{empty}", "is an empty folder")])
def test_what_is_no_model_is_refused(model, said, tmp_path, harness, capsys):
    assert run_eval(model.format(empty=tmp_path), tmp_path / "x.json") == 2
    assert said in capsys.readouterr().err


def test_another_base_a_classifier_and_answers_without_room_are_refused(models, tmp_path, harness, capsys):
    base, tuned = models
    delta = make_delta(base, tuned, tmp_path / "delta", 0.5)
    other = save_decoder(tmp_path / "other", seed=5, positions=LENGTH)
    assert run_eval(other, tmp_path / "x.json", "--delta", delta) == 2
    assert "is not the base of this delta" in capsys.readouterr().err
    classifier = AutoModelForSequenceClassification.from_config(make_decoder(tied=False).config)
    classifier.save_pretrained(tmp_path / "classifier")
    make_tokenizer().save_pretrained(tmp_path / "classifier")
    assert run_eval(tmp_path / "classifier", tmp_path / "x.json") == 2
    assert "lacks 1 tensors of Qwen2ForCausalLM, such as lm_head.weight" in capsys.readouterr().err
    assert run_eval(base, tmp_path / "x.json", "--max_length", "90") == 2
    assert "gsm8k writes up to 90 tokens, no room for a prompt within 90: raise --max_length" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_result_is_replaced_on_request_and_no_other_file_ever(models, tmp_path, harness, capsys):
    base, _ = models
    output, model = tmp_path / "x.json", Path(base, "config.json")
    assert run_eval(base, output) == 0
    output.write_text(output.read_text().replace(base, "an earlier model"))
    first, config = output.read_text(), model.read_bytes()
    capsys.readouterr()
    assert run_eval(base, output, "--limit", "2") == 2
    assert "x.json holds results of dpp eval already: give --overwrite to replace it" in capsys.readouterr().err
    assert output.read_text() == first
    assert run_eval(base, output, "--limit", "2", "--overwrite") == 0
    assert json.loads(output.read_text())["dpp"]["model"] == base
    for other in (model, Path(base, "model.safetensors")):
        assert run_eval(base, other, "--overwrite") == 2
        assert (
            f"--output {other} is there and holds no results of dpp eval, so that it is not overwritten"
            in capsys.readouterr().err
        )
    assert model.read_bytes() == config
    assert len(harness) == 2


# --- what is scored -------------------------------------------------------------------------------------------------


def test_base_plus_delta_scores_as_the_dense_model(models, tmp_path, harness, capsys):
    base, tuned = models
    delta = make_delta(base, tuned, tmp_path / "delta")
    capsys.readouterr()
    settings = ("--limit", "3", "--num_fewshot", "2", "--batch_size", "4")
    for name, model, options in (("base", base, ()), ("tuned", tuned, ()), ("both", base, ("--delta", delta))):
        assert run_eval(model, tmp_path / f"{name}.json", *options, *settings) == 0
    shown = capsys.readouterr()
    read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("base", "tuned", "both")}
    assert read["both"]["results"] == read["tuned"]["results"] != read["base"]["results"]
    assert read["tuned"]["dpp"]["delta"] is None
    info = SparseDelta.from_pretrained(delta).info
    assert read["both"]["dpp"]["base_fingerprint"] == info.base_fingerprint
    assert (read["both"]["dpp"]["method"], read["both"]["dpp"]["delta"]) == ("dare", delta)
    last = [line.split() for line in shown.out.splitlines() if line.strip().startswith("gsm8k")][-2:]
    assert last == [
        ["gsm8k", "sum", f"{read['both']['results']['gsm8k']['sum,none']:.4f}"],
        ["gsm8k", "acc", "(strict)", "0.2500", "0.1250"],
    ]
    assert "--num_fewshot 2 is not used where a task fixes its own: {'gsm8k': 5}" in shown.err
    asked = {"num_fewshot": 2, "limit": 3, "batch_size": 4, "device": "cpu"}
    assert all(asked.items() <= settings.items() for _, _, settings in harness)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("words", [0, 3])
def test_model_with_a_delta_is_what_apply_writes(words, dtype, tmp_path):
    base, tuned = make_pair(tmp_path, torch.float32, words)
    folder = make_delta(base, tuned, tmp_path / "delta", 0.5)
    assert main(["apply", base, folder, "--output", str(tmp_path / "dense")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype or "auto")
    with side_folder(base, folder, None) as beside:
        model = load_model(base, SparseDelta.from_pretrained(folder), beside, dtype)
    expected, got = dense.state_dict(), model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert torch.equal(model(WORDS).logits, dense(WORDS).logits)
    assert model.dtype == getattr(torch, dtype or "float32")
    assert model.generation_config.eos_token_id == dense.generation_config.eos_token_id == 5


@pytest.mark.parametrize(("of_files", "of_config"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_a_configuration_that_names_another_dtype_than_the_files_have(of_files, of_config, tmp_path):
    base, tuned = make_pair(tmp_path, of_files)
    for place in (base, tuned):
        config = json.loads((Path(place) / "config.json").read_text())
        (Path(place) / "config.json").write_text(json.dumps(config | {"dtype": of_config}))
    folder = make_delta(base, tuned, tmp_path / "delta", 0.5)
    assert main(["apply", base, folder, "--output", str(tmp_path / "dense")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    with side_folder(base, folder, None) as beside:
        model = load_model(base, SparseDelta.from_pretrained(folder), beside, None)
    assert model.dtype == dense.dtype == of_files
    assert torch.equal(model(WORDS).logits, dense(WORDS).logits)


def test_a_base_whose_norms_have_another_dtype_than_its_maps(tmp_path):
    base, tuned = make_pair(tmp_path, torch.bfloat16)
    widen_norms(base)
    widen_norms(tuned)
    folder = make_delta(base, tuned, tmp_path / "delta", 0.5)
    assert main(["apply", base, folder, "--output", str(tmp_path / "dense")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    with side_folder(base, folder, None) as beside:
        model = load_model(base, SparseDelta.from_pretrained(folder), beside, "bfloat16")
        wide = load_model(base, SparseDelta.from_pretrained(folder), beside, None)
    assert torch.equal(model(WORDS).logits, dense(WORDS).logits)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert wide.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(w.bfloat16(), m) for w, m in zip(wide.parameters(), model.parameters(), strict=True))


def test_a_base_s_generation_settings_are_not_those_of_a_fine_tuned_model_without_any(tmp_path):
    base, tuned = make_pair(tmp_path, torch.float32)
    settings = GenerationConfig.from_pretrained(base)
    settings.repetition_penalty = 3.0
    settings.save_pretrained(base)
    (Path(tuned) / "generation_config.json").unlink()
    folder = make_delta(base, tuned, tmp_path / "delta", 0.5)
    with side_folder(base, folder, None) as beside:
        model = load_model(base, SparseDelta.from_pretrained(folder), beside, None)
    assert model.generation_config.repetition_penalty in (None, 1.0)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_model_with_a_delta_has_the_dtype_that_apply_writes_and_the_tuned_models_files(dtypes, tmp_path):
    base, tuned = make_pair(tmp_path, dtypes[0])
    AutoModelForCausalLM.from_pretrained(tuned).to(dtypes[1]).save_pretrained(tuned)
    (Path(base) / "chat_template.jinja").write_text("BASE")
    folder = make_delta(base, tuned, tmp_path / "delta", 0.5)
    assert main(["apply", base, folder, "--output", str(tmp_path / "dense")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with side_folder(base, folder, None) as beside:
        assert not (Path(beside) / "chat_template.jinja").exists()
        model = load_model(base, SparseDelta.from_pretrained(folder), beside, None)
    assert model.dtype == dense.dtype == dtypes[0]
    assert torch.equal(model(WORDS).logits, dense(WORDS).logits)


def test_base_without_a_head_takes_the_delta_s(tmp_path, harness):
    tuned = make_decoder(tied=False, positions=LENGTH)
    tuned.model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned")
    base = str(tmp_path / "base")
    delta = make_delta(base, str(tmp_path / "tuned"), tmp_path / "delta")
    assert run_eval(base, tmp_path / "x.json") == 2
    assert run_eval(base, tmp_path / "x.json", "--delta", delta) == 0
    (call,) = harness
    assert torch.equal(call[0].model(WORDS).logits, tuned(WORDS).logits)


def test_tokenizer_is_the_fine_tuned_one(tmp_path, harness):
    base, tuned = make_pair(tmp_path, words=2)
    delta = make_delta(base, tuned, tmp_path / "delta")
    assert run_eval(base, tmp_path / "x.json", "--delta", delta) == 0
    (call,) = harness
    assert len(call[0].tokenizer) == len(make_tokenizer()) + 2


def test_merged_delta_is_scored_as_a_task_of_it(models, tmp_path, harness):
    base, tuned = models
    deltas = [make_delta(base, tuned, tmp_path / name, rate) for name, rate in (("one", 0.2), ("two", 0.4))]
    assert main(["merge", base, *deltas, "--output", str(tmp_path / "merged")]) == 0
    for name, options in (("as", ("--task", "two")), ("plain", ())):
        assert run_eval(base, tmp_path / f"{name}.json", "--delta", str(tmp_path / "merged"), *options) == 0
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("as", "plain"))
    assert (one["dpp"]["task"], one["results"]) == ("two", other["results"])


# --- the real harness -----------------------------------------------------------------------------------------------


def write_task(folder, name, rows, kind, **further):
    """A task YAML (JSON is YAML) over a local file, for ``--include_path``."""
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": rows}, "cache_dir": str(folder / "cache")},
        "output_type": kind,
        "test_split": "test",
        "doc_to_text": "{{question}} The answer is:",
        **further,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config))


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder with a task of choices, a task of answers and a group of both; the harness indexes no others."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    sums = [(a, b) for a in range(3) for b in range(4)]
    rows = [
        {"question": f"What is {a}+{b}?", "answer": f" {a + b}", "choices": [f" {a + b + k}" for k in (0, 1, 3)]}
        for a, b in sums
    ]
    folder = tmp_path / "tasks"
    path = write_rows(folder / "rows.jsonl", [row | {"gold": 0} for row in rows])
    write_task(folder, "sum_choices", path, "multiple_choice", doc_to_target="gold", doc_to_choice="{{choices}}")
    generation = {"until": ["."], "do_sample": False, "max_gen_toks": 6}
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    further = {"doc_to_target": "{{answer}}", "generation_kwargs": generation, "metric_list": metrics}
    write_task(folder, "sum_answers", path, "generate_until", **further)
    (folder / "sums.yaml").write_text(json.dumps({"group": "sums", "task": ["sum_choices", "sum_answers"]}))
    return str(folder)


def test_real_harness_gives_base_plus_delta_the_dense_scores(models, own_tasks, tmp_path, capsys):
    base, tuned = models
    delta = make_delta(base, tuned, tmp_path / "delta")
    capsys.readouterr()

    def scored(model, name, *options):
        output = tmp_path / f"{name}.json"
        assert run_eval(model, output, "--include_path", own_tasks, "--tasks", "sums", "--log_samples", *options) == 0
        result = json.loads(output.read_text())
        tasks = ("sum_choices", "sum_answers")
        return result["results"], [sample["resps"] for task in tasks for sample in result["samples"][task]]

    of_base, of_tuned = scored(base, "base"), scored(tuned, "tuned")
    shown = capsys.readouterr().out
    assert "sum_choices  acc " in shown
    assert "sum_answers  exact_match " in shown
    assert len(of_tuned[1]) == 24
    assert all(a != b for a, b in zip(of_base[1], of_tuned[1], strict=True))
    assert scored(base, "both", "--delta", delta) == of_tuned


def test_real_harness_refuses_unknown_tasks_and_keeps_to_the_limit(models, own_tasks, tmp_path, capsys):
    base, _ = models
    options = ("--include_path", own_tasks, "--limit", "2", "--dtype", "float32", "--tasks")
    assert run_eval(base, tmp_path / "x.json", *options, "sum_choice") == 2
    assert "has no task 'sum_choice' (near: sum_choices" in capsys.readouterr().err
    assert run_eval(base, tmp_path / "x.json", *options, "sum_choices,sum_answers", "--num_fewshot", "1") == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert {task: count["effective"] for task, count in result["n-samples"].items()} == dict.fromkeys(
        ("sum_choices", "sum_answers"), 2
    )
    assert result["config"]["model_dtype"] == "torch.float32"
