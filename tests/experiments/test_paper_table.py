"""Tables of papers as files: which cells they have, what is trained for each, what is refused, what the page says."""

import json

import pytest
import yaml

from dpp_lightning.experiments.paper_report import Measured, Page
from dpp_lightning.experiments.paper_table import Published, Sources, layered, read_table, stand_ins

ADAMW = {"model": {"init_args": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}}}}
TABLE = {
    "source": "nobody",
    "score": "accuracy",
    "seeds": [0, 1, 2],
    "bases": {"bert": "google-bert/bert-base-uncased", "roberta": "FacebookAI/roberta-base"},
    "data": {"glue": "nyu-mll/glue", "math": {"path": "meta-math/MetaMathQA", "test_path": "openai/gsm8k"}},
    "training": {"recipe": "{base}_{task}_adamr", "data": "glue", "fragments": ["{optimizer}"]},
    "fragments": {"adamr": {}, "adamw": ADAMW, "small_sst2": {"trainer": {"max_epochs": 1}}},
    "columns": [
        {"label": "BERT", "base": "bert", "optimizer": "adamw", "task": "sst2"},
        {"label": "BERT, AdamR", "base": "bert", "optimizer": "adamr", "task": "sst2"},
        {"label": "RoBERTa", "base": "roberta", "optimizer": "adamw", "task": "sst2"},
    ],
    "rows": [
        {"label": "no pruning", "published": [90, 91.5, None]},
        {"label": "DARE", "method": "dare", "rate": 0.9, "published": [[80.0, 1.0], None, None]},
        {"label": "magnitude", "method": "magnitude", "rate": 0.99, "only": ["BERT"]},
    ],
    "small": {"seeds": [4], "fragments": ["small_{task}"], "rates": [0.9]},
    "plot": "rate",
    "show": ["bytes"],
}


@pytest.fixture
def table(tmp_path):
    """A function that reads the table, with changes."""

    def read(name="a-table", **changes):
        file = tmp_path / "a_table.yaml"
        file.write_text(f"# A table: dpp reproduce {name}\n" + yaml.safe_dump({**TABLE, **changes}), encoding="utf-8")
        return read_table(file, name)

    return read


def test_a_cell_has_the_fields_of_its_column_and_row_and_the_training_they_fill_in(table):
    cells = table().cells()
    assert [(cell.row, cell.column) for cell in cells][:4] == [
        ("no pruning", "BERT"), ("no pruning", "BERT, AdamR"), ("no pruning", "RoBERTa"), ("DARE", "BERT")
    ]  # fmt: skip
    assert len(cells) == 7  # magnitude in one column only
    (training,) = cells[3].trainings
    assert (training.recipe, training.layers, training.base) == (
        "bert_sst2_adamr", (ADAMW,), "google-bert/bert-base-uncased"
    )  # fmt: skip
    assert training.data == {"path": "nyu-mll/glue"}
    assert cells[3].published == Published(80.0, 1.0)
    assert cells[0].published == Published(90.0)
    assert cells[0].trainings == cells[3].trainings
    assert len({t.key for cell in cells for t in cell.trainings}) == 3


def test_the_small_scale_has_its_own_seeds_rates_and_fragments_and_other_trainings(table):
    cells = table().cells("small")
    assert {cell.rate for cell in cells} == {None, 0.9}
    assert {cell.seeds for cell in cells} == {(4,)}
    assert cells[0].trainings[0].layers == (ADAMW, {"trainer": {"max_epochs": 1}})
    assert cells[0].trainings[0].key != table().cells()[0].trainings[0].key


def test_one_base_for_all_leaves_out_the_columns_that_it_makes_equal(table):
    given = Sources({"": "mine"}, {"glue": "here", "math.test_path": "there"})
    assert {cell.column for cell in table().cells(given=given)} == {"BERT", "BERT, AdamR"}
    assert {cell.column for cell in table().cells(given=Sources({"bert": "mine"}))} == {
        "BERT",
        "BERT, AdamR",
        "RoBERTa",
    }
    assert stand_ins(table(), given) == [
        "`mine` for google-bert/bert-base-uncased and FacebookAI/roberta-base", "`here` for nyu-mll/glue",
        "`there` for openai/gsm8k",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--base gpt=…: a-table knows bert, roberta"):
        table().cells(given=Sources({"gpt": "mine"}))


def test_a_number_of_several_trainings_has_one_training_a_seed(table):
    cells = table().cells(training_seeds=[3, 5])
    assert [training.seed for training in cells[0].trainings] == [3, 5]
    assert len({training.key for training in cells[0].trainings}) == 2


def test_another_precision_is_another_training_and_comes_last(table):
    cells = table().cells("small", precision="bf16-mixed")
    assert cells[0].trainings[0].layers[-1] == {"trainer": {"precision": "bf16-mixed"}}
    assert cells[0].trainings[0].key != table().cells("small")[0].trainings[0].key


def test_a_merge_has_a_training_of_every_task(table):
    merge = {"tasks": ["sst2", "cola"], "method": "ties"}
    rows = [{"label": "merged", "method": "dare", "rate": 0.9, "merge": merge}]
    (merged,) = table(rows=rows).cells()[0].merges
    assert {task: training.recipe for task, training in merged.trainings.items()} == {
        "sst2": "bert_sst2_adamr", "cola": "bert_cola_adamr"
    }  # fmt: skip
    assert merged.distinct_seeds
    assert merged.task == "sst2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "the file knows .* not sead"),
        ({"source": None, "rows": [{"label": "a", "published": [1]}]}, "1 published values for 3 columns"),
        ({"rows": [{"label": "a"}, {"label": "a"}]}, "every one of rows needs a label of its own"),
        ({"rows": [{"label": "a", "method": "dare"}]}, "method and rate go together"),
        ({"rows": [{"label": "a", "only": ["GPT"]}]}, "there is no column 'GPT'"),
        ({"rows": [{"label": "a", "base": "gpt"}]}, "base 'gpt' is none of bases"),
        ({"rows": [{"label": "a", "optimizer": "sgd"}]}, "there is no fragment 'sgd'"),
        ({"rows": [{"label": "a", "statistic": "mode"}]}, "statistic must be one of"),
        ({"training": {"recipe": "{model}", "data": "glue"}}, "needs the field model"),
        ({"show": ["time"]}, "show takes bytes and seconds, not time"),
    ],
)
def test_a_file_that_says_something_else_is_refused_with_the_place(table, changes, message):
    with pytest.raises(ValueError, match=rf"a_table\.yaml: .*{message}"):
        table(**changes)


def test_settings_of_another_class_are_replaced_whole_and_others_key_by_key():
    config = {"a": {"class_path": "X", "init_args": {"x": 1, "y": 2}}, "callbacks": [1, 2], "b": {"c": 1, "d": 2}}
    assert layered(config, {"a": {"init_args": {"y": 3}}, "callbacks": [3], "b": {"d": 4}}) == {
        "a": {"class_path": "X", "init_args": {"x": 1, "y": 3}}, "callbacks": [3], "b": {"c": 1, "d": 4}
    }  # fmt: skip
    assert layered(config, {"a": {"class_path": "Z", "init_args": {"z": 1}}})["a"] == {
        "class_path": "Z", "init_args": {"z": 1}
    }  # fmt: skip
    assert layered(config, {"a": {"class_path": "Z"}})["a"] == {"class_path": "Z"}


def test_the_page_has_published_measured_and_difference_side_by_side(table, tmp_path):
    cells = table().cells()
    measured = {0: Measured((88.0,), (90_000_000,)), 3: Measured((70.0, 74.0, 78.0), (1000, 2000, 3000))}
    page = Page(table(), cells, measured, ["**a stand-in**: x for y"])
    written = page.write(tmp_path / "out")
    assert [path.name for path in written] == ["table.md", "cells.json", "plot.png"]
    text = written[0].read_text(encoding="utf-8")
    assert "| no pruning | 90.00 | 88.00 | -2.00 | 91.50 |  |  |  |" in text
    assert "| DARE | 80.00 (1.00) | 74.00 (4.00) | -6.00 |  |  |  |  |" in text
    assert "**unfinished**: 5 of 7 cells" in text
    assert "| DARE | 2.0 |  |  |" in text
    rows = json.loads(written[1].read_text())
    assert rows[3]["measured"] == [70.0, 74.0, 78.0]
    assert rows[3]["published"] == [80.0, 1.0]
    assert rows[1]["measured"] is None
    done = Page(table(), cells, dict.fromkeys(range(7), Measured((1.0,)))).markdown()
    assert "unfinished" not in done


def test_lines_of_a_plot_are_named_by_what_differs(table):
    page = Page(table(), table().cells(), {i: Measured((float(i),)) for i in range(7)})
    lines = page._lines("rate")
    assert list(lines)[:2] == ["dare, bert, adamw", "dare, bert, adamr"]
    assert lines["magnitude, bert, adamw"] == [(0.99, 6.0, 0.0)]
    assert ("unpruned, bert, adamw", 0.0) in page._levels("rate")
