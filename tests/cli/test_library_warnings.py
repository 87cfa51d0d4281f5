"""A warning of the library is one line on the command line, and names no place in the code."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file


def test_code_that_dpp_apply_does_not_copy_is_named_in_one_line(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.randn(40, 5, generator=generator)}, tmp_path / name / "model.safetensors")
        config = {"auto_map": {"AutoModel": "modeling_own.Own"}, "name": name}
        (tmp_path / name / "config.json").write_text(json.dumps(config))

    def dpp(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "dpp_lightning", *map(str, arguments)], capture_output=True, text=True, check=True
        ).stderr.splitlines()

    dpp("prune", tmp_path / "base", tmp_path / "tuned", "--output", tmp_path / "delta")
    lines = dpp("apply", tmp_path / "base", tmp_path / "delta", "--output", tmp_path / "dense")
    (warned,) = [line for line in lines if "modeling_own.py" in line]
    assert warned.startswith("dpp: warning: code of the model's own is not copied, modeling_own.py: put it")
    assert not [line for line in lines if "UserWarning" in line or "write_dense_files" in line]


@pytest.mark.parametrize(
    "line", ["warnings.warn('of others')", "import lightning, warnings; warnings.warn('of others')"]
)
def test_warnings_of_others_are_shown_as_they_were(line):
    code = f"import warnings; from dpp_lightning.cli.library_warnings import show_plainly; show_plainly(); {line}"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "UserWarning: of others" in shown
    assert "dpp: warning" not in shown
