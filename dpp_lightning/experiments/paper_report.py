"""What a reproduced table shows: published, measured and difference side by side, as Markdown, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dpp_lightning.experiments.grid import mean_and_deviation
from dpp_lightning.experiments.paper_table import Cell, PaperTable
from dpp_lightning.experiments.plots import figure_of_lines, save_figure
from dpp_lightning.storage.atomic_write import atomic_file
from dpp_lightning.storage.safe_text import markdown_text

TABLE_FILE, CELLS_FILE, PLOT_FILE = "table.md", "cells.json", "plot.png"


@dataclass(frozen=True)
class Measured:
    """What was measured for a cell.

    Attributes:
        values: scores times 100, or values of the statistic, one for each training and mask seed.
        num_bytes: true bytes of the delta folders; of an unpruned model those of its weights.
        seconds: of the trainings.
    """

    values: tuple[float, ...]
    num_bytes: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Page:
    """A table with what was measured of it so far.

    Attributes:
        table: the file.
        cells: at the scale and with the stand-ins that were asked for.
        measured: by the index of the cell; those that are still to be measured are missing.
        notes: further lines of the page, such as what stands for what.
    """

    table: PaperTable
    cells: Sequence[Cell]
    measured: Mapping[int, Measured]
    notes: Sequence[str] = ()

    def write(self, folder: Path) -> list[Path]:
        """Write the table, its cells as JSON and, if the table has one, its plot; returns their paths.

        Args:
            folder: is made where there is none.

        Raises:
            OSError: they cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / TABLE_FILE, folder / CELLS_FILE]
        for path, text in zip(written, (self.markdown(), self._json()), strict=True):
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        if self.table.plot is not None and (lines := self._lines(self.table.plot)):
            figure = figure_of_lines(
                lines, self._levels(self.table.plot), over=self.table.plot, score="score", title=self.table.title
            )
            written.append(save_figure(figure, folder / PLOT_FILE))
        return written

    def markdown(self) -> str:
        """The page."""
        missing = len(self.cells) - len(self.measured)
        lines = [f"# {markdown_text(self.table.title)}", "", f"- source: {markdown_text(self.table.text['source'])}"]
        lines += [f"- score: {markdown_text(self.table.text['score'])}", f"- {self._seeds()}"]
        lines += [f"- {note}" for note in self.notes]
        lines += [f"- **unfinished**: {missing} of {len(self.cells)} cells are still to be measured"] if missing else []
        lines += ["", *self._grid(_three, self._has_published)]
        for what in self.table.shown:
            lines += ["", f"{_HEADINGS[what]}:", "", *self._grid(_SHOWN[what], lambda column: False)]
        return "\n".join(lines) + "\n"

    def _seeds(self) -> str:
        masks = {cell.seeds for cell in self.cells if cell.method is not None}
        trainings = len(self.cells[0].trainings)
        text = "one training" if trainings == 1 else f"{trainings} trainings"
        text += f" with {len(next(iter(masks)))} mask seeds each" if masks else ""
        return f"measured: mean (sample deviation) over {text}; difference: measured − published"

    def _grid(
        self, show: Callable[[Cell, Measured | None, bool], list[str]], three: Callable[[str], bool]
    ) -> list[str]:
        """A Markdown table of the cells.

        Args:
            show: the texts of a cell, one or three.
            three: whether a column has three texts.
        """
        columns = [name for name in self.table.columns if any(cell.column == name for cell in self.cells)]
        headings = [""]
        for name in columns:
            text = markdown_text(name)
            headings += [f"{text}: published", "measured", "difference"] if three(name) else [text]
        lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        index_of = {(cell.row, cell.column): index for index, cell in enumerate(self.cells)}
        for row in [row for row in self.table.rows if any(cell.row == row for cell in self.cells)]:
            texts = [markdown_text(row)]
            for name in columns:
                index = index_of.get((row, name))
                empty = ["", "", ""] if three(name) else [""]
                shown = show(self.cells[index], self.measured.get(index), three(name)) if index is not None else empty
                texts += shown
            lines.append("| " + " | ".join(texts) + " |")
        return lines

    def _has_published(self, column: str) -> bool:
        return any(cell.column == column and cell.published is not None for cell in self.cells)

    def _json(self) -> str:
        return json.dumps([self._plain(index, cell) for index, cell in enumerate(self.cells)], indent=1) + "\n"

    def _plain(self, index: int, cell: Cell) -> dict[str, Any]:
        measured = self.measured.get(index)
        return {
            "row": cell.row,
            "column": cell.column,
            "fields": dict(cell.fields),
            "trainings": [training.key for training in cell.trainings],
            "mask_seeds": list(cell.seeds) if cell.method is not None else [],
            "published": cell.published and [cell.published.value, cell.published.deviation],
            "measured": None if measured is None else list(measured.values),
            "bytes": [] if measured is None else list(measured.num_bytes),
            "training_seconds": [] if measured is None else list(measured.seconds),
        }

    def _lines(self, over: str) -> dict[str, list[tuple[float, float, float]]]:
        """The points of every line, in order of the abscissa."""
        points: dict[str, list[tuple[float, float, float]]] = {}
        for index, cell in enumerate(self.cells):
            if over in cell.fields and index in self.measured:
                point = (float(cell.fields[over]), *mean_and_deviation(self.measured[index].values))
                points.setdefault(self._line_name(cell, over), []).append(point)
        return {name: sorted(line) for name, line in points.items()}

    def _levels(self, over: str) -> list[tuple[str, float]]:
        return [
            (self._line_name(cell, over), fmean(self.measured[index].values))
            for index, cell in enumerate(self.cells)
            if over not in cell.fields and index in self.measured
        ]

    def _line_name(self, cell: Cell, over: str) -> str:
        """What tells a line from the others: the fields that differ between cells."""
        fields = [{name: _text(value) for name, value in c.fields.items() if name != over} for c in self.cells]
        names = dict.fromkeys(name for f in fields for name in f)
        differing = [name for name in names if len({f.get(name) for f in fields}) > 1]
        texts = [_text(cell.fields[name]) for name in differing if name in cell.fields and name != "method"]
        method = "unpruned" if cell.method is None else cell.method
        return ", ".join(([method] if "method" in differing or not texts else []) + texts)


def _three(cell: Cell, measured: Measured | None, three: bool) -> list[str]:
    """Published, measured and difference."""
    precise = cell.statistic is not None
    here = "" if measured is None else _number(*mean_and_deviation(measured.values), len(measured.values) > 1, precise)
    if not three:
        return [here]
    there = cell.published
    if there is None:
        return ["", here, ""]
    published = _number(there.value, there.deviation or 0.0, there.deviation is not None, precise)
    if measured is None:
        return [published, "", ""]
    difference = fmean(measured.values) - there.value
    return [published, here, f"{difference:+.3g}" if precise else f"{difference:+.2f}"]


def _number(value: float, deviation: float, with_deviation: bool, precise: bool) -> str:
    """A value, and its deviation in brackets; three digits of a statistic, else two behind the point."""
    form = ".3g" if precise else ".2f"
    return f"{value:{form}}" + (f" ({deviation:{form}})" if with_deviation else "")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(v)}" for name, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bytes(cell: Cell, measured: Measured | None, three: bool) -> list[str]:
    sizes = () if measured is None else measured.num_bytes
    return [f"{fmean(sizes) / 1e3:,.1f}" if sizes else ""]


def _seconds(cell: Cell, measured: Measured | None, three: bool) -> list[str]:
    seconds = () if measured is None else measured.seconds
    return [f"{fmean(seconds):,.0f}" if seconds else ""]


_HEADINGS = {"bytes": "kB (10³ true bytes) of a delta's folder", "seconds": "Seconds of the training"}
_SHOWN = {"bytes": _bytes, "seconds": _seconds}
