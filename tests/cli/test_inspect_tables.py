"""The tables of dpp inspect as a terminal and a pipe get them: whole lines, units, names as they are in the files."""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dpp_lightning.cli import main

NAMES = [
    "a[bold]b[/bold].weight",
    "[red]/[/red].weight",
    "visual.with_a_very_long_name.transformer.blocks.of_both_towers.11.output.weight",
    "visual.with_a_very_long_name.transformer.blocks.of_both_towers.12.output.weight",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models with such names, and deltas between them with and without stored positions."""
    folder = tmp_path_factory.mktemp("named") / "[red]models"
    folder.mkdir()
    torch.manual_seed(0)
    base = {name: torch.randn(48, 32) for name in NAMES}
    save_file(base, folder / "base.safetensors")
    tuned = {name: tensor + 0.01 * torch.randn(48, 32) for name, tensor in base.items()}
    save_file(tuned, folder / "tuned.safetensors")
    for method in ("dare", "magnitude"):
        files = (str(folder / f"{name}.safetensors") for name in ("base", "tuned"))
        assert main(["prune", *files, "--method", method, "--output", str(folder / method)]) == 0
    return folder


def words(place, form):
    files = ["base.safetensors", "tuned.safetensors"] if form == "pair" else [form]
    return [str(place / name) for name in files]


@pytest.mark.parametrize("form", ["dare", "magnitude", "pair"])
def test_a_pipe_gets_one_line_a_tensor_with_its_whole_name(place, form):
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "dpp_lightning", "inspect", *words(place, form)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, check=True)
    lines = done.stdout.splitlines()
    for name in NAMES:
        (line,) = (line for line in lines if name in line)
        assert line.split()[:2] == [name, "48×32"]
    if form == "pair":
        (summary,) = (line for line in lines if "tensors with a delta of" in line)
        assert str(place / "base.safetensors") in summary


@pytest.mark.parametrize(
    ("form", "headings", "units"),
    [
        ("dare", ["density", "values"], ["tensor", "shape", "%", "bytes"]),
        ("magnitude", ["density", "positions", "entropy", "values"], ["tensor", "shape", "%", *["bytes"] * 3]),
        ("pair", ["share"], ["tensor", "shape", "mean", "|δ|", "max", "|δ|", "%", "of", "Σ|δ|"]),
    ],
)
def test_headings_have_units_and_empty_columns_are_left_out(place, capsys, form, headings, units):
    assert main(["inspect", *words(place, form)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[:2] == [headings, units]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("form", ["magnitude", "pair"])
def test_a_narrow_terminal_cuts_long_names_in_the_middle(place, form):
    lines = on_a_terminal(70, [sys.executable, "-m", "dpp_lightning", "inspect", *words(place, form)])
    rows = [line.split() for line in lines if "48×32" in line]
    assert len(rows) == len(NAMES)
    assert all(len(line.rstrip()) <= 70 for line in lines if "48×32" in line)
    cut = {row[0] for row in rows}
    assert {"[red]/[/red].weight", "a[bold]b[/bold].weight"} < cut
    long = sorted(name for name in cut if name.startswith("visual"))
    assert len(long) == 2, "two layers are not shown by one name"
    assert all("…" in name and not name.endswith("…") for name in long)
    assert not any("…" in cell for row in rows for cell in row[1:])


def on_a_terminal(width, command):
    """The lines that a command shows on a terminal of a width, without colours."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux reports the end of a terminal so
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).splitlines()
