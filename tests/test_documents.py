"""The README's Python blocks run as they stand, in order, in one folder."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        names["model"] = names["Lit"]() if "Lit" in names else None
        exec(compile(block, "README.md", "exec"), names)
    assert "darex-q" in capsys.readouterr().out
    assert len(list((tmp_path / "deltas").glob("darex-q-*"))) == 2 * 3


def test_the_two_commands_are_there():
    text = README.read_text(encoding="utf-8")
    assert "pip install -e . && dpp fit --config quickstart.yaml" in text
    assert "pip install -e '.[dev]' && pytest" in text
