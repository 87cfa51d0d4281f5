"""Tables and lines of text for a terminal or a pipe; names are shown as they are, never read as markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpp_lightning.storage.safe_text import printable

_SHORTEST_NAME = 12  # cells that a name keeps on a terminal that is too narrow for the table


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: a second line in it is the unit.
        text: whether cells are text, set on the left; numbers are set on the right.
        names: whether cells are names, which are cut in the middle where the terminal is too narrow for the table.
    """

    heading: str
    text: bool = False
    names: bool = False


def show_table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    console: Console | None = None,
    *,
    title: str = "",
    caption: str = "",
) -> None:
    """Show a table, one line a row: whole in a pipe, and with names cut in the middle on a narrow terminal.

    Numbers are never cut: a terminal that is too narrow for them wraps the lines itself.

    Args:
        columns: headings and alignment.
        rows: a cell for each column.
        console: where to; default the standard output.
        title, caption: above and below the table.
    """
    console = console or Console()
    cells = [[printable(cell) for cell in row] for row in rows]
    if console.file.isatty():
        excess = _width(_table(columns, cells), console) - console.width
        cells = _with_cut_names(columns, cells, excess) if excess > 0 else cells
    table = _table(columns, cells, title=title, caption=caption)
    console.width = max(console.width, _width(table, console))
    console.print(table)


def show_lines(lines: Iterable[str], console: Console | None = None) -> None:
    """Show lines of text, which a terminal wraps between words and a pipe gets as they are.

    Args:
        lines: without markup.
        console: where to; default the standard output.
    """
    console = console or Console()
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=not console.file.isatty())


def cut_names(names: Sequence[str], width: int) -> list[str]:
    """Names cut in the middle, all at the place nearest to it at which the fewest of them become the same.

    Args:
        names: of any length.
        width: cells of a terminal that each may take, at least 3.
    """
    best: list[str] = []
    for start in sorted(range(1, width - 1), key=lambda start: abs(start - (width - 1) / 2)):
        cut = [_cut(name, width, start) for name in names]
        if not best or len(set(cut)) > len(set(best)):
            best = cut
        if len(set(best)) == len(set(names)):
            break
    return best


def _cut(name: str, width: int, start: int) -> str:
    if cell_len(name) <= width:
        return name
    return f"{set_cell_size(name, start)}…{set_cell_size(name[::-1], width - 1 - start)[::-1]}"


def _table(columns: Sequence[Column], cells: Sequence[Sequence[str]], *, title: str = "", caption: str = "") -> Table:
    table = Table(
        title=Text(printable(title), style="table.title") if title else None,
        caption=Text(printable(caption), style="table.caption") if caption else None,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        table.add_column(Text(column.heading), justify="left" if column.text else "right", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _width(table: Table, console: Console) -> int:
    """Cells that the table takes if nothing is cut."""
    return table.__rich_measure__(console, console.options.update(width=10**6)).maximum


def _with_cut_names(columns: Sequence[Column], cells: Sequence[Sequence[str]], excess: int) -> list[list[str]]:
    """The cells with names shortened by ``excess`` in all, the longest columns of names first."""
    by_column = [list(column) for column in zip(*cells, strict=True)]
    widths = {i: max(map(cell_len, by_column[i])) for i, column in enumerate(columns) if column.names and cells}
    allowed = sum(widths.values()) - excess
    limit = max(widths.values(), default=_SHORTEST_NAME)
    while limit > _SHORTEST_NAME and sum(min(width, limit) for width in widths.values()) > allowed:
        limit -= 1
    for index, width in widths.items():
        if width > limit:
            by_column[index] = cut_names(by_column[index], limit)
    return [list(row) for row in zip(*by_column, strict=True)]
