"""The tables of the papers in configs/papers: every training parses as dpp fit takes it, every sweep's settings are real."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from parse_only import parse

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.paper_runs import PaperRuns, fit_config, sweep_config
from dpp_lightning.experiments.paper_table import Sources, read_table
from dpp_lightning.methods import METHODS
from dpp_lightning.methods.merge_rules import MERGES

TABLES = packaged_configs.tables()
PAGE = Path(__file__).parents[2] / "configs" / "papers" / "README.md"
NUMBERS = {  # of the tables and figures of the two papers
    "DAREx": {"Table": range(1, 17), "Figure": range(1, 13)},
    "DPPA": {"Table": range(1, 10), "Figure": range(1, 4)},
}


@cache
def table(name):
    return read_table(TABLES[name], name)


def scales(name):
    return ("paper", "small") if "small" in table(name).text else ("paper",)


@pytest.mark.parametrize("name", TABLES)
def test_the_first_line_says_what_it_is_and_how_it_is_run(name):
    first = TABLES[name].read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(rf"# (DAREx|DPPA), (Table|Figure) \d+: .+: dpp reproduce {name}", first)
    assert max(map(len, TABLES[name].read_text(encoding="utf-8").splitlines())) < 320


@pytest.mark.parametrize("name", TABLES)
def test_methods_rates_and_settings_are_real(name):
    for scale in scales(name):
        for cell in table(name).cells(scale):
            for merge in cell.merges:
                assert merge.method in MERGES
            if cell.method is not None:
                assert cell.method in METHODS
                DeltaPruneCallback(cell.method, cell.rate, cell.seeds, **cell.settings)


@pytest.mark.parametrize("name", TABLES)
def test_every_training_and_sweep_parses_against_the_real_signatures(name, tmp_path):
    runs = PaperRuns(tmp_path, table(name).cells(scales(name)[-1]))  # the small scale is put on top of the paper's
    for training in runs.trainings():
        parsed(json.dumps(fit_config(training, Path("folder"))))
    for sweep in runs.sweeps():
        (callback,) = sweep_config(sweep, Path("folder"))["trainer"]["callbacks"]
        DeltaPruneCallback(**callback["init_args"])


@cache
def parsed(config):
    """Parse a training's config, once for all tables that share it."""
    return parse("fit", "--config", yaml.safe_dump(json.loads(config)))


def test_tables_share_the_trainings_that_are_the_same():
    names = ("darex-table2", "darex-table10", "dppa-table1")
    cells = {name: table(name).cells("small", Sources({"": "mine"})) for name in names}
    keys = {name: {training.key for cell in cells[name] for training in cell.trainings} for name in names}
    assert len(keys["darex-table10"]) == 32
    assert len(keys["dppa-table1"] & keys["darex-table10"]) == 3
    assert len(keys["darex-table2"] & keys["darex-table10"]) == 4


@pytest.mark.parametrize("paper", NUMBERS)
def test_every_table_and_figure_of_the_papers_has_a_row_on_the_page(paper):
    section = PAGE.read_text(encoding="utf-8").partition(f"## {paper}")[2].partition("\n## ")[0]
    for kind, numbers in NUMBERS[paper].items():
        for number in numbers:
            (row,) = re.findall(rf"^\| {kind} {number} \|.*$", section, re.MULTILINE)
            name = f"{paper.lower()}-{'table' if kind == 'Table' else 'fig'}{number}"
            assert (f"`{name}`" in row) == (name in TABLES)
