"""Tables on terminals and in pipes: one line a row, names as they are, cut in the middle only where they must be."""

import io

import pytest
from rich.console import Console

from dpp_lightning.callbacks.prune_run.rows_bar import RowsBar
from dpp_lightning.cli.eval import _show
from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.tables import console_table, markdown_table
from dpp_lightning.experiments.terminal_tables import Column, cut_names, show_lines, show_table

COLUMNS = [Column("tensor", text=True, names=True), Column("size\nbytes")]
LONG = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(24) for p in "qkvo"]
MARKUP = ["a[bold]b[/bold]", "[red]", "[/red]", "x:bug:y", "[link=http://a]b", "back\\[slash]"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(width, show, *arguments, terminal=True, **settings):
    file = Terminal() if terminal else io.StringIO()
    show(*arguments, console=Console(file=file, width=width, color_system=None), **settings)
    return file.getvalue().splitlines()


def rows_of(lines):
    return [line.split() for line in lines if line.split() and line.split()[-1].isdigit()]


def test_a_pipe_gets_one_whole_line_a_row_however_narrow_it_claims_to_be():
    rows = [(name, str(10**9 + i)) for i, name in enumerate(LONG)]
    assert rows_of(shown(20, show_table, COLUMNS, rows, terminal=False)) == [list(row) for row in rows]
    text = "word " * 60
    assert shown(20, show_lines, [text], terminal=False) == [text]


@pytest.mark.parametrize("width", [30, 40, 60])
def test_a_narrow_terminal_cuts_names_in_the_middle_and_numbers_never(width):
    rows = [(name, str(10**9 + i)) for i, name in enumerate(LONG)]
    lines = shown(width, show_table, COLUMNS, rows)
    assert max(map(len, lines)) <= width
    cells = rows_of(lines)
    assert [number for _, number in cells] == [number for _, number in rows]
    for (cut, _), (name, _) in zip(cells, rows, strict=True):
        start, mark, end = cut.partition("…")
        assert (cut == name) if not mark else (start and end and name.startswith(start) and name.endswith(end))
    assert any("…" in cut for cut, _ in cells) == (width < 60)


def test_a_terminal_that_is_too_narrow_even_for_numbers_gets_them_whole():
    lines = shown(10, show_table, COLUMNS, [("x" * 40, "123456789012")])
    assert any("123456789012" in line for line in lines)


def test_names_are_cut_where_they_stay_different():
    cut = cut_names(LONG, 30)
    assert len(set(cut)) == len(LONG)
    assert {len(name) for name in cut} == {30}
    assert cut_names(["short", "y" * 20], 9) == ["short", "yyyy…yyyy"]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", MARKUP)
def test_names_are_no_markup(name, terminal, capsys):
    lines = shown(200, show_table, COLUMNS, [(name, "1")], terminal=terminal, title=name, caption=name)
    assert sum(name in line for line in lines) == 3
    assert shown(200, show_lines, [name], terminal=terminal) == [name]
    results = [Result(name, 0.5, 0.9, 0, split="validation"), Result("base", 0.5, split="validation")]
    lines = shown(200, console_table, results, f"acc{name}", terminal=terminal)
    assert any(line.split()[:1] == [name.split()[0]] for line in lines if line.strip())
    assert any(f"acc{name} on validation" in line for line in lines)
    _show({"results": {name: {f"acc{name},none": 0.25, f"acc{name}_stderr,none": 0.125}}})
    assert f"{name}  acc{name}  0.2500  0.1250" in capsys.readouterr().out
    file = io.StringIO()
    reporter = RowsBar(console=Console(file=file, width=200))
    reporter.row(Result("base", 0.5), name)
    assert f"base: {name} 0.5000" in file.getvalue()


def test_a_row_stays_a_row_whatever_characters_a_name_has():
    lines = shown(200, show_table, COLUMNS, [("a\nb\x1b[31mc\r", "1"), ("d", "2")], terminal=False)
    assert rows_of(lines) == [["a\\nb\\x1b[31mc\\r", "1"], ["d", "2"]]


def test_a_name_with_a_bar_is_one_cell_in_markdown():
    assert r"| a\|b |" in markdown_table([Result("a|b", 0.5)])
