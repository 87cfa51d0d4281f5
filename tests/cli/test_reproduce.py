"""dpp reproduce: a table from an empty folder to its page, killed and resumed, and what is refused before anything runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny_glue import make_data, make_model

from dpp_lightning.cli import child_command, main, paper_runs, reproduce
from dpp_lightning.cli.child_command import CommandFailed
from dpp_lightning.cli.paper_runs import Sweep, _grids
from dpp_lightning.experiments.row_groups import grid

FAST = {"trainer": {"max_epochs": 2, "enable_progress_bar": False}, "model": {"init_args": {"optimizer": {
    "class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}}}}}  # fmt: skip
TABLE = {
    "source": "nobody",
    "score": "accuracy",
    "seeds": [0, 1],
    "bases": {"bert": "google-bert/bert-base-uncased"},
    "data": {"glue": "nyu-mll/glue"},
    "training": {"recipe": "bert_{task}_adamr", "base": "bert", "data": "glue", "fragments": ["fast"]},
    "fragments": {"fast": FAST},
    "columns": [{"label": "SST-2", "task": "sst2"}],
    "rows": [
        {"label": "no pruning", "published": [90]},
        {"label": "base", "score_of": "base"},
        {"label": "mean |δ|", "statistic": "mean_abs"},
        {"label": "DARE", "method": "dare", "rate": 0.5, "published": [[80, 1]]},
        {"label": "magnitude", "method": "magnitude", "rate": 0.5},
        {"label": "DAREx-q by labels", "method": "darex-q", "rate": 0.9, "settings": {"objective": "metric"}},
    ],
    "show": ["bytes", "seconds"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A base, data of two tasks and the options that name them."""
    folder = tmp_path_factory.mktemp("sources")
    base = make_model(folder / "base")
    for task in ("sst2", "mrpc"):
        make_data(folder / "glue", task, 120, 40)
    return ["--base", base, "--data", f"glue={folder / 'glue'}"]


@pytest.fixture
def here(monkeypatch):
    """Every command runs in this process, which is quicker; the list of them."""
    commands = []

    def run_command(words, log):
        commands.append(words[0])
        assert main(list(words)) == 0

    monkeypatch.setattr(paper_runs, "run_command", run_command)
    return commands


def write_table(folder, **changes):
    file = folder / "my_table.yaml"
    file.write_text("# My table\n" + yaml.safe_dump({**TABLE, **changes}), encoding="utf-8")
    return str(file)


def cells(output):
    return {(c["row"], c["column"]): c for c in json.loads((output / "my-table" / "cells.json").read_text())}


def test_a_table_is_trained_pruned_and_written_and_not_a_second_time(sources, here, tmp_path, capsys):
    words = ["reproduce", write_table(tmp_path), *sources, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert here == ["fit", "sweep", "sweep"]  # one sweep by the output's change and one by labels
    page = capsys.readouterr().out
    assert "**a stand-in**" in page
    made = cells(tmp_path / "out")
    tuned, dare = made[("no pruning", "SST-2")], made[("DARE", "SST-2")]
    assert all(cell["measured"] for cell in made.values())
    assert len(dare["measured"]) == 2
    assert f"| no pruning | 90.00 | {tuned['measured'][0]:.2f} | {tuned['measured'][0] - 90:+.2f} |" in page
    (training,) = (tmp_path / "out" / "trainings").iterdir()
    rows = [json.loads(line) for line in (training / "sweep" / "results.jsonl").read_text().splitlines()]
    assert [100 * row["score"] for row in rows if row["method"] == "dare"] == dare["measured"]
    assert [100 * row["score"] for row in rows if row["method"] == "fine-tuned"] == tuned["measured"]
    by_labels = json.loads((training / Sweep(None, '{"objective": "metric"}').name / "results.jsonl")
                           .read_text().splitlines()[0])  # fmt: skip
    assert by_labels["run"]["objective"] == "metric"
    assert 0 < made[("mean |δ|", "SST-2")]["measured"][0] < 0.1
    assert main(words) == 0
    assert len(here) == 3
    more = write_table(tmp_path, seeds=[0, 1, 2])
    assert main(["reproduce", more, *sources, "--output", str(tmp_path / "out")]) == 0
    assert here[3:] == ["sweep", "sweep"]
    assert len(cells(tmp_path / "out")[("DARE", "SST-2")]["measured"]) == 3


def test_merges_take_deltas_of_different_masks_and_score_each_task(sources, here, tmp_path):
    merge = {"tasks": ["sst2", "mrpc"], "method": "task-arithmetic", "scale": 0.5}
    rows = [{"label": "merged", "method": "dare", "rate": 0.5, "merge": merge}]
    columns = [{"label": "SST-2", "task": "sst2"}, {"label": "MRPC", "task": "mrpc"}]
    words = ["reproduce", write_table(tmp_path, rows=rows, columns=columns, show=[], seeds=[3]), *sources]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    made = cells(tmp_path / "out")
    assert [len(cell["measured"]) for cell in made.values()] == [1, 1]
    assert sorted(here) == ["fit", "fit", "merge", "sweep", "sweep", "test", "test"]
    deltas = sorted(path.name for path in (tmp_path / "out" / "trainings").glob("*/deltas-*/dare-*"))
    assert deltas == ["dare-p0.5-seed6", "dare-p0.5-seed7"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["my-tabel"], "there is no table 'my-tabel'"),
        (["{table}"], "google-bert/bert-base-uncased would be downloaded (--download allows it"),
        (["{table}", "--base", "./absent"], "--base ./absent does not exist; nyu-mll/glue would be downloaded"),
        (["{table}", "--base", "gpt=./absent"], "--base gpt=…: my-table knows bert"),
        (["{table}", "--base", "x", "y"], "--base is given twice for all: x and y"),
        (["{table}", "--columns", "RTE"], "--columns 'RTE' is none of my-table: SST-2"),
        (["{table}", "--scale", "small"], "my-table has no small scale"),
        (["{table}", "--precision", "bf16"], "--precision bf16 is not one of 32-true, bf16-mixed, 16-mixed, bf16-true"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_runs(words, message, here, tmp_path, capsys):
    table = write_table(tmp_path)
    words = [word.format(table=table) for word in words]
    assert main(["reproduce", *words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert here == []
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_the_trainings_and_makes_nothing(sources, here, tmp_path, capsys):
    words = ["reproduce", write_table(tmp_path), *sources, "--output", str(tmp_path / "out"), "--dry_run"]
    assert main([*words, "--rows", "no*"]) == 0
    assert "1 trainings and 1 pruned models" in capsys.readouterr().err
    assert main([*words, "--training_seeds", "0", "1"]) == 0
    said = capsys.readouterr()
    assert [line.split("-seed")[1][0] for line in said.out.splitlines()] == ["0", "1"]
    assert "2 trainings and 10 pruned models" in said.err
    assert here == []
    assert not (tmp_path / "out").exists()


def test_without_a_name_the_tables_are_listed_in_order(monkeypatch, tmp_path, capsys):
    file = tmp_path / "table.yaml"
    file.write_text("# A title: dpp reproduce x\n" + yaml.safe_dump(TABLE))
    names = ("b-table10", "b-table2", "a-fig1")
    monkeypatch.setattr(reproduce.packaged_configs, "tables", lambda: dict.fromkeys(names, file))
    assert main(["reproduce"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a-fig1", "b-table2", "b-table10"]
    assert lines[0].endswith("  A title")


def test_rows_become_the_grids_that_make_exactly_them():
    rows = set(grid(["dare", "darex-q", "magnitude"], [0.9, 0.99], [0, 1])) | set(grid(["dare"], [0.5], [0, 1]))
    made = [set(grid(*words)) for words in _grids(rows)]
    assert set().union(*made) == rows
    assert len(made) == 2
    assert sum(map(len, made)) == len(rows)


def test_a_command_that_fails_is_told_with_its_own_words(tmp_path):
    with pytest.raises(child_command.CommandFailed, match=r"dpp configs ended with code 2: .*no packaged config"):
        child_command.run_command(["configs", "absent"], tmp_path / "log.txt")


def test_what_fails_is_named_at_the_end_and_stops_only_what_needs_it(sources, monkeypatch, tmp_path, capsys):
    """A training of one task, and one method of a sweep, fail; all else of the table is made."""

    def run_command(words, log):
        if (words[0] == "fit" and "mrpc" in str(log)) or (words[0] == "sweep" and "magnitude" in words):
            raise CommandFailed(f"{words[0]} ended with code 1: no memory")
        assert main(list(words)) == 0

    monkeypatch.setattr(paper_runs, "run_command", run_command)
    columns = [{"label": "MRPC", "task": "mrpc"}, {"label": "SST-2", "task": "sst2"}]
    rows = [{"label": "no pruning"}] + [{"label": m, "method": m, "rate": 0.5} for m in ("magnitude", "dare")]
    words = ["reproduce", write_table(tmp_path, rows=rows, columns=columns), *sources]
    assert main([*words, "--output", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("dpp reproduce: failed: ")]
    assert "training bert_mrpc" in line
    assert "by magnitude: sweep ended with code 1: no memory" in line
    made = {key for key, cell in cells(tmp_path / "out").items() if cell["measured"]}
    assert made == {("no pruning", "SST-2"), ("dare", "SST-2")}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_while_it_trains_it_goes_on_and_leaves_no_process(sources, tmp_path, number):
    longer = {**FAST, "trainer": {"max_epochs": 30, "enable_progress_bar": False}}
    table = write_table(tmp_path, fragments={"fast": longer}, rows=TABLE["rows"][:4], show=[])
    words = [sys.executable, "-m", "dpp_lightning", "reproduce", table, *sources, "--output", str(tmp_path / "out")]
    process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    folder = wait_for(lambda: next((tmp_path / "out").glob("trainings/*/last.ckpt"), None)).parent
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.wait(60)
    assert process.returncode in (-number, 128 + number)
    wait_for(lambda: not running(process.pid))
    assert not (folder / "training.json").exists()
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| no pruning | 90.00 |" in done.stdout
    assert "unfinished" not in done.stdout
    assert "resum" in (folder / "log.txt").read_text().lower() or "Restor" in (folder / "log.txt").read_text()


def running(session):
    """Whether a process of a session still runs."""
    listed = subprocess.run(["ps", "-s", str(session), "-o", "stat="], capture_output=True, text=True).stdout.split()
    return any(not state.startswith("Z") for state in listed)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value
