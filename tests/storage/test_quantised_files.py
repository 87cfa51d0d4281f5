"""Every command refuses quantised files in one line, before anything is written."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from quantised_files import SCHEMES, plain, quantised, write

from dpp_lightning import prune
from dpp_lightning.cli import main
from dpp_lightning.storage.checkpoints import load_tensors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_is_refused_with_source_scheme_names_and_cure(tmp_path, scheme):
    folder = write(tmp_path / "quantised", quantised(scheme), SCHEMES[scheme][1])
    with pytest.raises(ValueError, match="is quantised") as error:
        load_tensors(folder)
    told = str(error.value)
    assert told.startswith(f"{folder} is quantised (4 tensors in {scheme}")
    assert "model.layers.0." in told
    assert "take the model that it was quantised from" in told
    assert "\n" not in told


def commands(root, output):
    base, tuned, quantised_model, delta = (str(root / name) for name in ("base", "tuned", "quantised", "delta"))
    return {
        "prune": ["prune", base, quantised_model, "--output", output],
        "prune, base": ["prune", quantised_model, tuned, "--output", output],
        "prune, file": ["prune", base, f"{quantised_model}/model.safetensors", "--output", output],
        "prune, ckpt": ["prune", base, f"{root}/quantised.ckpt", "--output", output],
        "apply": ["apply", quantised_model, delta, "--output", output],
        "merge": ["merge", quantised_model, delta, "--output", output],
        "inspect": ["inspect", base, quantised_model],
        "export": ["export", f"{root}/quantised.ckpt", "--config_from", base, "--output", output],
        "export, sharded": ["export", f"{root}/sharded", "--config_from", base, "--output", output],
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    base = plain()
    tuned = {name: tensor + 0.01 * torch.randn(tensor.shape).to(tensor) for name, tensor in base.items()}
    write(root / "base", base)
    write(root / "tuned", tuned)
    write(root / "quantised", quantised("bitsandbytes int8"), {"quant_method": "bitsandbytes"})
    state = {f"model.{name}": tensor for name, tensor in quantised("bitsandbytes int8").items()}
    torch.save({"state_dict": state}, root / "quantised.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"state_dict": state}, checkpoint_id=root / "sharded")
    prune(base, tuned, "dare", 0.5).save_pretrained(root / "delta")
    return root


@pytest.mark.parametrize("command", commands(Path(), ""))
def test_every_command_refuses_them_and_writes_nothing(models, tmp_path, capfd, command):
    assert main(commands(models, str(tmp_path / "out"))[command]) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(told) == 1
    assert "is quantised (4 tensors in bitsandbytes int8" in told[0]
    assert "model.dequantize()" in told[0]
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_without_quantised_tensors_is_a_note(tmp_path):
    """As a model keeps its quantization_config that was dequantised by hand."""
    config = {"quant_method": "gptq", "bits": 4}
    with pytest.warns(
        UserWarning, match=r"quantization_config \(gptq, 4 bits\), but none of its 9 tensors is quantised"
    ):
        tensors = load_tensors(write(tmp_path / "dequantised", plain(), config))
    assert len(tensors) == 9


@pytest.mark.parametrize("content", ["[]", "{", json.dumps({"quantization_config": None}), json.dumps({"a": {"b": 1}})])
def test_a_configuration_that_declares_nothing_is_passed_over(tmp_path, content):
    folder = write(tmp_path / "plain", plain())
    (folder / "config.json").write_text(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_tensors(folder)) == 9


def test_gguf_is_named_with_its_cure(tmp_path, capfd):
    write(tmp_path / "base", plain())
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(60))
    for source in (folder, folder / "model-Q4_K_M.gguf"):
        with pytest.raises(ValueError, match=r"is GGUF.*gguf_file='model-Q4_K_M.gguf'"):
            load_tensors(source)
        assert main(["prune", str(tmp_path / "base"), str(source), "--output", str(tmp_path / "out")]) == 2
        assert "is GGUF" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
