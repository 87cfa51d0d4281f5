"""Tables and plots of results."""

from statistics import stdev

import pytest
from rich.console import Console

from dpp_lightning.experiments.grid import QCurve, Result
from dpp_lightning.experiments.plots import plot_over_q
from dpp_lightning.experiments.tables import console_table, markdown_table

ROWS = [
    Result("base", 0.5, split="validation"),
    Result("fine-tuned", 0.9, density=1.0, num_bytes=4_000_000, ratio=1.0, split="validation"),
    *(
        Result(
            "darex-q", s, 0.99, i, 0.013, 10_000, 0.01, 40_000, 100.0, 2.0, 12, "validation", "64 items of train", "x"
        )
        for i, s in enumerate((0.8, 0.82, 0.87))
    ),
]


def test_table_has_mean_and_sample_deviation_over_seeds():
    lines = markdown_table(ROWS).splitlines()
    assert len(lines) == 2 + 3
    row = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert row[:2] == ["darex-q", "0.99"]
    assert row[2] == f"0.8300 ± {stdev([0.8, 0.82, 0.87]):.4f}"
    assert row[3:7] == ["0.013", "1 %", "0.040", "100.0"]


def test_console_table_fits_eighty_columns_and_names_the_splits(capsys):
    console_table(ROWS, "val_score", Console(width=80))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "0.8300 ± 0.0361" in shown
    assert "64 items of train" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_plot_appears_whole_or_not_at_all(tmp_path):
    curve = QCurve(0.9, [0.1, 0.3, 1.0], [0.5, 0.8, 0.6], [2.0, 1.0, 3.0], 0.3)
    path = plot_over_q([curve, curve], tmp_path / "plots" / "q.png", monitor="acc", finetuned=0.9, base=0.4)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r".+"):
        plot_over_q([QCurve(0.9, [0.1], [1.0, 2.0], [1.0])], tmp_path / "plots" / "bad.png", monitor="acc")
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["q.png"]
