"""A table or figure of a paper as a file: what is trained, pruned and scored for each cell, and what was published.

The file is YAML, see ``configs/papers/README.md``. Rows and columns are mappings of fields; a cell has the fields of
its column and its row, of which the row's win. Nothing of torch or Lightning is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from dpp_lightning.storage.safe_text import read_utf8

STATISTICS = ("mean_abs", "variance", "min", "p10", "p90", "max")
_KEYS = {"source", "score", "seeds", "training_seeds", "bases", "data", "training", "fragments", "columns", "rows",
         "small", "plot", "show", "relative"}  # fmt: skip
_NEEDED = ("source", "score", "seeds", "bases", "data", "training", "columns", "rows")
_TRAINING = {"recipe", "base", "data", "fragments"}
_MERGE = {"tasks", "method", "scale", "distinct_seeds"}
_SMALL = {"seeds", "training_seeds", "fragments", "rates"}
_SHOWN = ("bytes", "seconds")


@dataclass(frozen=True)
class Training:
    """One fine-tuning: a recipe, what is put on top of it, its base and data, and its seed.

    Attributes:
        recipe: name of a packaged recipe.
        layers: partial configs put on top of it, in order.
        base: hub id or folder of the base.
        data: hub ids, files or folders by the data module's argument, such as ``path``.
        seed: of the whole training.
        name: what it is called in messages.
    """

    recipe: str
    layers: tuple[Mapping[str, Any], ...]
    base: str
    data: Mapping[str, str]
    seed: int
    name: str = field(compare=False)

    @property
    def key(self) -> str:
        """Name of its folder: the same for the same training, whichever table it is of."""
        parts = [self.recipe, list(self.layers), self.base, dict(self.data), self.seed]
        return f"{self.name}-seed{self.seed}-{sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]}"

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Merge:
    """How the deltas of several tasks become one.

    Attributes:
        trainings: one for each task, by its name.
        task: the one that is scored.
        method: a name of :data:`dpp_lightning.methods.merge_rules.MERGES`.
        scale: of the merged delta.
        distinct_seeds: every delta has a mask of its own.
    """

    trainings: Mapping[str, Training]
    task: str
    method: str
    scale: float
    distinct_seeds: bool


@dataclass(frozen=True)
class Published:
    """A number of the paper, and its deviation where it has one."""

    value: float
    deviation: float | None = None


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        row, column: labels.
        trainings: one for each seed of training.
        fields: of row and column together.
        method: None for an unpruned model.
        rate: fraction of the delta that is dropped, in [0, 1).
        settings: further settings of the callback that prunes.
        seeds: of masks.
        of_base: the base is scored: all of the delta is dropped.
        statistic: of the delta's entries, in place of a score.
        merges: one for each seed of training, if a merge is scored.
        published: None where the paper gives no number.
    """

    row: str
    column: str
    trainings: tuple[Training, ...]
    fields: Mapping[str, Any]
    method: str | None
    rate: float | None
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    of_base: bool = False
    statistic: str | None = None
    merges: tuple[Merge, ...] = ()
    published: Published | None = None


@dataclass(frozen=True)
class Sources:
    """What stands for the paper's bases and data.

    Attributes:
        bases: hub ids or folders by the names of the table's file; ``""`` is for all others.
        data: files or folders by the names of the table's file, with ``.argument`` behind it where it is not ``path``.
    """

    bases: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    def base(self, name: str, published: str) -> str:
        """The source of one base."""
        return self.bases.get(name, self.bases.get("", published))

    def of_data(self, name: str, published: Mapping[str, str]) -> dict[str, str]:
        """The sources of one data module's arguments."""
        path = self.data.get(name, self.data.get("", published.get("path")))
        others = {argument: self.data[key] for argument in published if (key := f"{name}.{argument}") in self.data}
        return {**published, **({} if path is None else {"path": path}), **others}


@dataclass(frozen=True)
class PaperTable:
    """A table's file, checked.

    Attributes:
        name: as ``dpp reproduce`` takes it, such as ``darex-table2``.
        title: the first line of the file without what is typed.
        text: what the file says.
    """

    name: str
    title: str
    text: Mapping[str, Any] = field(repr=False)

    @property
    def columns(self) -> list[str]:
        """Headings in order."""
        return [column["label"] for column in self.text["columns"]]

    @property
    def rows(self) -> list[str]:
        """Labels in order."""
        return [row["label"] for row in self.text["rows"]]

    @property
    def shown(self) -> list[str]:
        """Of ``bytes`` and ``seconds``, those that have tables of their own."""
        return list(self.text.get("show", ()))

    @property
    def relative(self) -> bool:
        """Whether scores are in per cent of the unpruned model's."""
        return bool(self.text.get("relative", False))

    @property
    def plot(self) -> str | None:
        """The field that a plot is drawn over."""
        return self.text.get("plot")

    def sources(self, given: Sources) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """Bases and data as they are used: by the names of the file.

        Raises:
            ValueError: ``given`` names a base or data that the table has not.
        """
        bases, data = self.text["bases"], {name: _arguments(value) for name, value in self.text["data"].items()}
        known = {"", *data, *(f"{name}.{argument}" for name, arguments in data.items() for argument in arguments)}
        for option, names, there in (("--base", given.bases, {"", *bases}), ("--data", given.data, known)):
            if unknown := sorted(set(names) - there):
                raise ValueError(
                    f"{option} {unknown[0]}=…: {self.name} knows {', '.join(sorted(there - {''}))}; a value without a "
                    "name is for all"
                )
        return (
            {name: given.base(name, published) for name, published in bases.items()},
            {name: given.of_data(name, published) for name, published in data.items()},
        )

    def cells(
        self,
        scale: str = "paper",
        given: Sources | None = None,
        training_seeds: Sequence[int] = (),
        precision: str | None = None,
    ) -> list[Cell]:
        """All cells, row by row; those of a second column that a stand-in makes equal to a first one are left out.

        Args:
            scale: ``paper``, or ``small`` for what the file puts on top under that name.
            given: what stands for the paper's bases and data.
            training_seeds: of the trainings that every cell is the mean of; by default those of the file.
            precision: of the Trainer, as ``bf16-mixed``, in place of the recipes'.

        Raises:
            ValueError: the file has no ``small``, or ``given`` names what the table has not.
        """
        return list(_Cells(self, scale, given or Sources(), tuple(training_seeds), precision))


class _Cells:
    """The cells of a table at one scale."""

    def __init__(
        self, table: PaperTable, scale: str, given: Sources, training_seeds: tuple[int, ...], precision: str | None
    ) -> None:
        text = table.text
        if scale == "small" and "small" not in text:
            raise ValueError(f"{table.name} has no small scale: leave --scale out")
        small = text.get("small", {}) if scale == "small" else {}
        self._table = table
        self._bases, self._data = table.sources(given)
        self._seeds = tuple(small.get("seeds", text["seeds"]))
        self._rates = small.get("rates")
        self._training_seeds = training_seeds or tuple(small.get("training_seeds", text.get("training_seeds", [0])))
        self._on_top = list(small.get("fragments", ()))
        self._last: tuple[Mapping[str, Any], ...] = ({"trainer": {"precision": precision}},) if precision else ()

    def __iter__(self) -> Iterator[Cell]:
        kept = self._distinct_columns()
        for row in self._table.text["rows"]:
            published = row.get("published") or [None] * len(self._table.columns)
            for index, column in enumerate(self._table.text["columns"]):
                wanted = "only" not in row or column["label"] in row["only"]
                fields = {**column, **row}
                too_high = self._rates is not None and fields.get("rate") not in (None, *self._rates)
                if wanted and index in kept and not too_high:
                    yield self._cell(row["label"], column["label"], fields, _published(published[index]))

    def _distinct_columns(self) -> list[int]:
        """Indices of columns; of those that only differ in bases for which one stands the first."""
        seen: list[dict[str, Any]] = []
        kept = []
        for index, column in enumerate(self._table.text["columns"]):
            fields = {name: value for name, value in column.items() if name not in ("label", "only")}
            if "base" in fields:
                fields["base"] = self._bases[fields["base"]]
            if not fields or fields not in seen:
                kept.append(index)
            seen.append(fields)
        return kept

    def _cell(self, row: str, column: str, fields: Mapping[str, Any], published: Published | None) -> Cell:
        merge = fields.get("merge")
        return Cell(
            row, column, tuple(self._training(fields, seed) for seed in self._training_seeds),
            {name: value for name, value in fields.items() if name not in ("label", "published", "only")},
            fields.get("method"), fields.get("rate"), fields.get("settings", {}),
            tuple(fields.get("seeds", self._seeds)),
            fields.get("score_of") == "base", fields.get("statistic"),
            tuple(self._merge(merge, fields, seed) for seed in self._training_seeds) if merge else (), published,
        )  # fmt: skip

    def _training(self, fields: Mapping[str, Any], seed: int) -> Training:
        template = {**self._table.text["training"], **{k: fields[k] for k in ("base", "data") if k in fields}}
        recipe, base, data = (_filled(template[name], fields) for name in ("recipe", "base", "data"))
        fragments = self._table.text.get("fragments", {})
        names = [_filled(name, fields).removesuffix("?") for name in [*template.get("fragments", ()), *self._on_top]]
        layers = tuple(fragment for name in names if (fragment := fragments.get(name)))
        shown = "-".join([recipe, *(name for name in names if fragments.get(name))])
        return Training(recipe, (*layers, *self._last), self._bases[base], self._data[data], seed, shown)

    def _merge(self, merge: Mapping[str, Any], fields: Mapping[str, Any], seed: int) -> Merge:
        trainings = {task: self._training({**fields, "task": task}, seed) for task in merge["tasks"]}
        return Merge(
            trainings, fields["task"], merge["method"], merge.get("scale", 1.0), merge.get("distinct_seeds", True)
        )


def read_table(path: Path, name: str) -> PaperTable:
    """Read and check a table's file.

    Args:
        path: the file.
        name: what the table is called.

    Raises:
        ValueError: something is missing or unknown in it; the message names the file and the key.
    """
    content = read_utf8(path)
    text = yaml.safe_load(content)
    first = next(iter(content.splitlines()), "")
    title = first.removeprefix("#").partition(": dpp reproduce ")[0].strip() if first.startswith("#") else name
    try:
        _check(text)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return PaperTable(name, title, text)


def layered(config: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """A config with another put on top, key by key; lists, and the settings of another class, are replaced whole.

    Args:
        config: as a recipe's YAML has it.
        layer: likewise, partial.
    """
    merged = dict(config)
    other_class = "class_path" in layer and layer["class_path"] != config.get("class_path")
    for key, value in layer.items():
        below = config.get(key)
        replaced = key == "init_args" and other_class
        both = isinstance(value, Mapping) and isinstance(below, Mapping) and not replaced
        merged[key] = layered(below, value) if both else value  # type: ignore[arg-type]
    if other_class and "init_args" not in layer:
        merged.pop("init_args", None)
    return merged


def with_sources(training: Training) -> Mapping[str, Any]:
    """The layer that gives a training its base and data."""
    return {"model": {"init_args": {"pretrained": training.base}}, "data": {"init_args": dict(training.data)}}


def stand_ins(table: PaperTable, given: Sources) -> list[str]:
    """What stands for what, one line each, for the page of the result."""
    bases, data = table.sources(given)
    replaced: dict[str, list[str]] = {}
    for name, was in table.text["bases"].items():
        replaced.setdefault(bases[name], []).extend([was] if bases[name] != was else [])
    for name, value in table.text["data"].items():
        for argument, was in _arguments(value).items():
            source = data[name][argument]
            replaced.setdefault(source, []).extend([was] if source != was else [])
    return [f"`{source}` for {' and '.join(dict.fromkeys(were))}" for source, were in replaced.items() if were]


def _check(text: Any) -> None:
    """Refuse a file that says too little, too much or something else."""
    if not isinstance(text, Mapping):
        raise ValueError("it holds no mapping")
    _check_keys(text, _KEYS, _NEEDED, "the file")
    _check_keys(text["training"], _TRAINING, ("recipe", "data"), "training")
    _check_keys(text.get("small", {}), _SMALL, (), "small")
    if unknown := set(text.get("show", ())) - set(_SHOWN):
        raise ValueError(f"show takes {' and '.join(_SHOWN)}, not {unknown.pop()}")
    for kind in ("columns", "rows"):
        labels = [entry.get("label") for entry in text[kind]]
        if None in labels or len(set(labels)) < len(labels):
            raise ValueError(f"every one of {kind} needs a label of its own")
    for row in text["rows"]:
        _check_row(row, text)
    for column in text["columns"]:
        if "merge" in column or "published" in column:
            raise ValueError(f"column {column['label']!r}: merge and published belong to rows")


def _check_row(row: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    columns = [column["label"] for column in text["columns"]]
    where = f"row {row['label']!r}"
    if row.get("published") is not None and len(row["published"]) != len(columns):
        raise ValueError(f"{where} has {len(row['published'])} published values for {len(columns)} columns")
    if unknown := [label for label in row.get("only", ()) if label not in columns]:
        raise ValueError(f"{where}: there is no column {unknown[0]!r}")
    if "merge" in row:
        _check_keys(row["merge"], _MERGE, ("tasks", "method"), f"merge of {where}")
    for column in text["columns"]:
        fields = {**text["training"], **column, **row}
        where = f"row {row['label']!r}, column {column['label']!r}"
        if fields.get("base") not in text["bases"]:
            raise ValueError(f"{where}: base {fields.get('base')!r} is none of bases")
        if fields["data"] not in text["data"]:
            raise ValueError(f"{where}: data {fields['data']!r} is none of data")
        if (fields.get("method") is None) != (fields.get("rate") is None):
            raise ValueError(f"{where}: method and rate go together")
        if fields.get("statistic", STATISTICS[0]) not in STATISTICS:
            raise ValueError(f"{where}: statistic must be one of {', '.join(STATISTICS)}")
        _check_templates(fields, text, where)


def _check_templates(fields: Mapping[str, Any], text: Mapping[str, Any], where: str) -> None:
    template = text["training"]
    fragments = [*template.get("fragments", ()), *text.get("small", {}).get("fragments", ())]
    for name in [_filled(name, fields, where) for name in fragments]:
        if not name.endswith("?") and name not in text.get("fragments", {}):
            raise ValueError(f"{where}: there is no fragment {name!r}")
    _filled(template["recipe"], fields, where)


def _check_keys(mapping: Any, known: set[str], needed: Sequence[str], where: str) -> None:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where} must be a mapping, not {mapping!r}")
    if unknown := sorted(set(mapping) - known):
        raise ValueError(f"{where} knows {', '.join(sorted(known))}, not {unknown[0]}")
    if missing := [name for name in needed if name not in mapping]:
        raise ValueError(f"{where} needs {missing[0]}")


def _filled(template: str, fields: Mapping[str, Any], where: str = "") -> str:
    try:
        return template.format_map(fields)
    except KeyError as error:
        raise ValueError(f"{where}: {template!r} needs the field {error.args[0]}") from None


def _arguments(data: str | Mapping[str, str]) -> dict[str, str]:
    """Sources by the data module's arguments."""
    return {"path": data} if isinstance(data, str) else dict(data)


def _published(value: Any) -> Published | None:
    if value is None:
        return None
    return Published(*value) if isinstance(value, list) else Published(float(value))
