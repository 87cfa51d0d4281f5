"""dpp sweep: a whole one, one that was killed and goes on, rows of another run, bad input, the plots."""

import json
import shlex
import signal
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml
from sweep_job import fitted

from dpp_lightning import SparseDelta, __version__
from dpp_lightning.callbacks.prune_run.evaluation import EvaluationPasses
from dpp_lightning.cli import main
from dpp_lightning.cli.sweep import SweepOptions, _settings
from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.plots import plot_over_rate, plot_over_size, points
from dpp_lightning.experiments.results import ResultsLog
from dpp_lightning.experiments.row_groups import grid
from dpp_lightning.methods.registry import METHODS

VERSION = ".".join(__version__.split(".")[:2])
METHODS_SWEPT = ("dare", "darex-q", "magnitude")
GRID = {"--methods": METHODS_SWEPT, "--rates": ("0.5", "0.9"), "--seeds": ("0", "1")}
MEASURED = ("seconds", "prune_seconds", "score_seconds", "forwards")


def options(values):
    """Options with their values as words of a command line."""
    words = ((option, *((value,) if isinstance(value, str) else value)) for option, value in values.items())
    return [word for option in words for word in option]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A config and the checkpoint of a fit of a tiny BERT: the arguments of a sweep but for grid and output."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}}
    with fitted(tmp_path_factory.mktemp("job"), 3, (200, 40), optimizer=optimizer) as words:
        yield words


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """The folder of an uninterrupted sweep."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["sweep", *job, *options(GRID), "--output", str(folder), "--curve", "darex-q"]) == 0
    return folder


@pytest.fixture
def signals():
    """Lightning leaves SIGINT ignored after a graceful stop: put the handler back."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def scored(monkeypatch):
    """Counts the scoring passes; the pass of number ``stop`` is interrupted."""
    state = {"passes": 0, "stop": -1}
    score = EvaluationPasses.score

    def counted(self, loader=None):
        state["passes"] += 1
        if state["passes"] == state["stop"]:
            raise KeyboardInterrupt
        return score(self, loader)

    monkeypatch.setattr(EvaluationPasses, "score", counted)
    return state


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def figures(folder):
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows(folder)]


def test_a_whole_sweep_has_rows_deltas_table_and_plots(whole):
    made = rows(whole)
    assert [(r["method"], r["pruning_rate"], r["seed"]) for r in made[2:]] == grid(METHODS_SWEPT, [0.5, 0.9], [0, 1])
    assert [r["method"] for r in made[:2]] == ["base", "fine-tuned"]
    assert {r["split"] for r in made} == {"test"}
    for row in made[2:]:
        delta = SparseDelta.from_pretrained(whole / row["folder"])
        assert (delta.num_bytes, delta.q) == (row["num_bytes"], row["q"])
    for name in ("score_over_rate.png", "score_over_mb.png", "q_curve.png"):
        assert (whole / name).stat().st_size > 10_000
    assert (whole / "config_sweep.yaml").is_file()


def test_the_table_is_that_of_the_rows_and_names_every_split(whole):
    text = (whole / "table.md").read_text()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert [(c[0], c[1]) for c in cells[2:4]] == [("base", ""), ("fine-tuned", "")]
    assert len(cells) == 2 + 2 + 3 * 2
    for method, rate, score, q, _, megabytes, *_ in cells[4:]:
        repeats = [r for r in rows(whole) if r["method"] == method and r["pruning_rate"] == float(rate)]
        scores = [r["score"] for r in repeats]
        spread = f" ± {stdev(scores):.4f}" if len(scores) > 1 else ""
        assert score == f"{fmean(scores):.4f}{spread}"
        assert q == f"{repeats[0]['q']:.4g}"
        assert megabytes == f"{fmean(r['num_bytes'] for r in repeats) / 1e6:.3f}"
    for words in (
        "test_score on the test split",
        "2 mask seeds",
        "items of the calibration split",
        "sst2",
        "last.ckpt",
    ):
        assert words in text


def test_a_stopped_sweep_goes_on_where_it_was(job, whole, tmp_path, scored, signals, capsys):
    command = ["sweep", *job, *options(GRID), "--output", str(tmp_path), "--no_deltas"]
    scored["stop"] = 2 + 5  # base, fine-tuned and four rows are made
    assert main(command) == 130
    assert "repeat the command" in capsys.readouterr().err
    made = (tmp_path / "results.jsonl").read_text()
    assert len(made.splitlines()) == 2 + 4
    assert not list(tmp_path.glob("dare-*"))

    (tmp_path / "results.jsonl").write_text(made + '{"method": "darex-q", "sco')  # killed while it wrote the next
    scored.update(passes=0, stop=-1)
    assert main(command) == 0
    assert scored["passes"] == 10 - 4, "the rows that were made are not made again"
    assert (tmp_path / "results.jsonl").read_text().startswith(made)
    assert figures(tmp_path) == [{**row, "folder": None} for row in figures(whole)]
    assert "4 rows were made before" in capsys.readouterr().err


def test_a_finished_sweep_only_reports_and_takes_further_rates(job, whole, scored):
    command = ["sweep", *job, "--output", str(whole), "--methods", "dare", "--seeds", "0", "1", "--rates"]
    before = rows(whole)
    (whole / "table.md").unlink()
    assert main([*command, "0.9"]) == 0
    assert (scored["passes"], rows(whole)) == (0, before)
    assert (whole / "table.md").is_file()
    text = (whole / "results.jsonl").read_text()
    assert main([*command, "0.8", "0.9"]) == 0
    assert scored["passes"] == 2
    assert rows(whole)[: len(before)] == before
    (whole / "results.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"--split": "validation"}, "split test in the file, validation now"),
        ({"--seeds": "1"}, "first seed 0 in the file, 1 now"),
        ({"--data.max_length": "3"}, "fine-tuned model"),
        ({"--trainer.limit_test_batches": "1"}, "limit of batches "),
        ({"--trainer.precision": "bf16-mixed"}, "precision 32-true in the file, bf16-mixed now"),
        ({"--data.split_seed": "3"}, "split_seed 0 in the file, 3 now"),
        ({"--data.calibration_fraction": "0.2"}, "fractions {"),
    ],
)
def test_rows_of_another_run_are_refused(changed, named, job, whole, capsys):
    before = (whole / "results.jsonl").read_text()
    assert main(["sweep", *job, "--output", str(whole), *options(GRID | changed)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "another output folder" in error
    assert (whole / "results.jsonl").read_text() == before


def test_rows_of_another_version_are_refused_since_its_defaults_may_be_others(job, whole, tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text((whole / "results.jsonl").read_text().replace(f'"{VERSION}"', '"0.0"'))
    assert main(["sweep", *job, "--output", str(tmp_path), *options(GRID)]) == 2
    assert f"dpp_lightning 0.0 in the file, {VERSION} now" in capsys.readouterr().err


def test_a_limit_of_bytes_leaves_the_other_settings_of_auto_as_they_are():
    configured = {"method": ["auto"], "method_settings": {"auto": {"max_loss": 0.1, "steps": 7, "loss": "block"}}}
    settings = _settings(configured, SweepOptions(output="x", max_bytes="50kB"))
    assert settings["method_settings"] == {"auto": {"max_bytes": 50_000, "steps": 7, "loss": "block"}}


def test_the_configs_own_callback_is_used_but_for_the_grid(job, tmp_path):
    pruning = {
        "class_path": "DeltaPruneCallback",
        "init_args": {
            "method": ["magnitude", "dp"],
            "method_settings": {"magnitude": {"budget": "model"}, "dp": {"a": 0.2}},
            "dtype": "bfloat16",
            "monitor": "val_accuracy",
        },
    }
    (tmp_path / "callback.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [pruning]}}))
    command = ["sweep", *job, "--config", str(tmp_path / "callback.yaml"), "--output", str(tmp_path / "out")]
    assert main([*command, "--split", "validation", "--methods", "magnitude", "--rates", "0.5"]) == 0
    made = rows(tmp_path / "out")
    assert (made[0]["run"]["dtype"], made[2]["settings"]) == ("bfloat16", {"budget": "model"})
    assert {(r["monitor"], r["split"]) for r in made} == {("val_accuracy", "validation")}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"--methods": "dar"}, "did you mean 'dare'"),
        ({"--rates": "1.0"}, "[0, 1)"),
        ({"--rates": "x"}, "--rates"),
        ({"--seeds": ("0", "0")}, "none twice"),
        ({"--methods": "dare", "--curve": "importance"}, "importance"),
        ({"--methods": "darex-q-layer", "--curve": "darex-q-layer"}, "more than one q"),
        ({"--split": "train"}, "--split train is not one of test, validation"),
        ({"--ckpt_path": "nope.ckpt"}, "nope.ckpt"),
        ({"--output": "/proc/nowhere"}, "/proc/nowhere"),
        ({"--methds": "dare"}, "did you mean --methods?"),
        ({"--rates": ("0.9", "0.5", "--rates", "0.1")}, "--rates is given twice, 0.9 0.5 and 0.1: keep one"),
        ({"--no-deltas": ()}, "did you mean --no_deltas?"),
        ({"--nonsense": "1"}, "--nonsense is not an option"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_built(wrong, said, job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dpp_lightning.cli.lightning.DPPCLI.instantiate_classes", None)
    config, checkpoint = job[:2], {"--ckpt_path": job[3]}
    assert main(["sweep", *config, *options(checkpoint | {"--output": str(tmp_path / "out")} | wrong)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("dpp sweep: error: ")
    assert error.count("\n") == 1


def test_checkpoint_and_output_are_needed(job, tmp_path, capsys):
    assert main(["sweep", *job[:2], "--output", str(tmp_path)]) == 2
    assert "--ckpt_path" in capsys.readouterr().err
    assert main(["sweep", *job]) == 2
    assert "--output is missing" in capsys.readouterr().err
    assert main(["sweep", *job[2:], "--output", str(tmp_path)]) == 2
    assert "dpp configs lists them" in capsys.readouterr().err


def test_the_commands_that_fit_printed_work(job, tmp_path, capsys):
    checkpoint = Path(job[-1])
    printed = (checkpoint.parent / "stderr.txt").read_text().splitlines()[-3:]
    assert printed[0] == f"The checkpoint is {checkpoint}"
    score, sweep = (shlex.split(line.partition(": dpp ")[2].replace("DIR", str(tmp_path))) for line in printed[1:])
    assert (score[0], sweep[0]) == ("test", "sweep")
    assert main(score) == 0
    assert main([*sweep, "--methods", "magnitude", "--rates", "0.5", "--no_deltas"]) == 0
    assert (tmp_path / "table.md").is_file()


def test_its_options_stand_in_a_config_too(job, tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text("{methods: [dare, dp], rates: [0.5, 1e-1], deltas: false, output: there}")
    assert main(["sweep", *job, "--config", str(tmp_path / "sweep.yaml"), "--seeds", "3", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {name: printed[name] for name in ("methods", "rates", "seeds", "deltas", "output", "split")} == {
        "methods": ["dare", "dp"],
        "rates": [0.5, 0.1],
        "seeds": [3],
        "deltas": False,
        "output": "there",
        "split": "test",
    }


# --- the file and the plots -----------------------------------------------------------------------------------------


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path, row = tmp_path / "results.jsonl", Result("dare", 0.5, 0.9, 0)
    log = ResultsLog(path, "acc", {"base": "a"}, {"dare": {}})
    assert log.resume() == []
    for result in (Result("base", 0.1), row):
        log.append(result)
    text = path.read_text()
    assert ResultsLog(path, "acc", {"base": "a"}, {"dare": {}}).resume() == [Result("base", 0.1), row]
    with pytest.raises(ValueError, match="base a in the file, b now"):
        ResultsLog(path, "acc", {"base": "b"}, {}).resume()
    with pytest.raises(ValueError, match="settings of dare"):
        ResultsLog(path, "acc", {"base": "a"}, {"dare": {"budget": "model"}}).resume()
    path.write_text("x\n" + text)
    with pytest.raises(ValueError, match="line 1"):
        log.resume()
    path.write_text(text.splitlines()[1] + "\n")
    with pytest.raises(ValueError, match="does not say which run"):
        log.resume()
    path.write_text(text[:30])
    assert log.resume() == []


def test_plots_take_every_method_and_rate_0(tmp_path):
    made = [Result("base", 0.5, split="test"), Result("fine-tuned", 0.9, split="test")]
    for method in METHODS:
        made += [Result(method, 0.6 + s / 10, p, s, num_bytes=10**6) for p in (0.9, 0.0) for s in (0, 1)]
    (zero, _), *_ = points(made).values()
    assert (zero.rate, zero.megabytes, zero.score) == (0.0, 1.0, pytest.approx(0.65))
    for number, plot in enumerate((plot_over_rate, plot_over_size)):
        path = plot(made, tmp_path / f"{number}.png", score="acc (test split)")
        assert path.read_bytes().startswith(b"\x89PNG")
