"""``results.jsonl``: one line for each scored model, appended as it is made, so that a killed run can be continued.

The first line, that of the base, also holds the object ``run``: what all rows have in common and what tells them from
the rows of another run. Every pruned row holds its method's own ``settings``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from dpp_lightning.experiments.earlier_run import move_aside
from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.row_groups import Row
from dpp_lightning.storage.atomic_write import atomic_file
from dpp_lightning.storage.safe_text import has_controls

PLOT_FILE = "q_curve.png"

_CURE = "Choose another output folder; a callback without resume= keeps the earlier run in a folder earlier-1"

_TYPES = {**get_type_hints(Result), "monitor": str, "settings": dict}
_LONGEST = 200  # characters of a value in a message


class ResultsLog:
    """The rows of one run in one file. Reading changes nothing, so that every rank may; only one may append.

    Args:
        path: the file; it need not exist.
        monitor: name of the score, a column of every row; that of the rows made so far where a run goes on.
        run: what makes two runs the same one, as plain values.
        settings: a method's own settings under its name.
    """

    def __init__(
        self, path: Path, monitor: str, run: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.path, self.monitor, self.run, self.settings = path, monitor, dict(run), settings
        self._whole: int | None = None

    def resume(self) -> list[Result]:
        """The rows made so far; a torn last line is dropped.

        Raises:
            ValueError: the file is damaged, or of another run; the message names the differences.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        lines = text.splitlines(keepends=True)
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            row = _parsed(line)
            if row is None and number < len(lines):
                raise ValueError(f"line {number} of {self.path} is no row of results. {_CURE}")
            if row is not None:
                rows.append(row)
        if rows:
            self._check(rows)
            self.monitor = rows[-1].get("monitor", self.monitor)
            self._whole = sum(map(len, lines[: len(rows)]))
        return [_result(row) for row in rows]

    def append(self, result: Result) -> None:
        """One more row, on the disk when this returns. Before the first one of a run that does not go on, what an
        earlier run left in the folder is moved aside.

        Raises:
            OSError: it cannot be written.
        """
        row = {**result.to_json(), "monitor": self.monitor}
        if result.pruning_rate is not None:
            row["settings"] = dict(self.settings.get(result.method, {}))
        if self._whole is None:
            row["run"] = self.run
        line = (json.dumps(row) + "\n").encode()
        if self._whole is None:
            move_aside(self.path.parent, (self.path.name, PLOT_FILE))
            with atomic_file(self.path) as temporary:
                temporary.write_bytes(line)
        else:
            with self.path.open("r+b") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self._whole = (self._whole or 0) + len(line)

    def _check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        there = rows[0].get("run")
        if not isinstance(there, dict):
            raise ValueError(f"{self.path} does not say which run its rows are of, so none can be added. {_CURE}")
        here = json.loads(json.dumps(self.run))
        differences = [
            _difference(n, there.get(n), here.get(n)) for n in {**there, **here} if there.get(n) != here.get(n)
        ]
        for method, now in self.settings.items():
            before = next(
                (r["settings"] for r in rows if r["method"] == method and r.get("settings", now) != now), None
            )
            if before is not None:
                differences.append(_difference(f"settings of {method}", before, dict(now)))
        if differences:
            raise ValueError(f"{self.path} holds the rows of another run: {'; '.join(differences)}. {_CURE}")


def read_results(path: Path) -> list[Result]:
    """The whole rows of a file that a run has written or still writes; none where there is no file.

    Raises:
        OSError: it cannot be read.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_result(row) for line in lines if (row := _parsed(line)) is not None]


def rows_of(results: Sequence[Result]) -> frozenset[Row]:
    """The (method, rate, seed) of results; base and fine-tuned have none."""
    return frozenset(
        (r.method, r.pruning_rate, r.seed) for r in results if r.pruning_rate is not None and r.seed is not None
    )


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and _is_row(row) else None


def _is_row(row: Mapping[str, Any]) -> bool:
    """Whether every field that a row needs is there, and all known ones are of their types and safe to print."""
    needed = {f.name for f in fields(Result) if f.default is MISSING}
    values = [(value, _TYPES[name]) for name, value in row.items() if name in _TYPES]
    printable = not any(has_controls(value) for value, _ in values if isinstance(value, str))
    return needed <= row.keys() and printable and all(_is_of(value, kind) for value, kind in values)


def _is_of(value: object, kind: Any) -> bool:
    kinds = get_args(kind) or (kind,)
    return type(value) in kinds or (type(value) is int and float in kinds)


def _result(row: Mapping[str, Any]) -> Result:
    return Result(**{f.name: row[f.name] for f in fields(Result) if f.name in row})


def _difference(name: str, there: Any, here: Any) -> str:
    return f"{name} {_short(there)} in the file, {_short(here)} now"


def _short(value: Any) -> str:
    if value is None:
        return "unset"
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        return "something deeply nested"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
