"""What libraries say on the command line: nothing that no user can act on, everything under DPP_VERBOSE."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import BertConfig, BertModel

from dpp_lightning.storage.quiet_loading import VERBOSE, without_load_report
from dpp_lightning.tasks import GLUEModule

FIT = [
    "fit", "--config", "quickstart.yaml", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2",
]  # fmt: skip
NOISE = (
    "FLOPs",
    "Modules in",
    "stopped:",
    "TPU available",
    "to estimate number of stepping",
    "litmodels",
    "many workers",
)


def run(tmp_path, **environment):
    words = [sys.executable, "-m", "dpp_lightning", *FIT]
    env = {**os.environ, **environment}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_fit_says_what_it_does_and_nothing_else(tmp_path):
    text = run(tmp_path)
    assert not [noise for noise in NOISE if noise in text]
    assert "parameters, all trained," in text
    assert "Pruned deltas" in text


def test_a_verbose_fit_says_everything(tmp_path):
    text = run(tmp_path, **{VERBOSE: "1"})
    assert [noise for noise in NOISE if noise in text][:3] == ["FLOPs", "Modules in", "stopped:"]


@pytest.fixture
def encoder(tmp_path):
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def records(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]


def test_a_head_that_is_new_on_purpose_is_not_reported(encoder, caplog):
    from transformers.utils import logging as of_transformers

    of_transformers.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            module = GLUEModule("sst2", encoder)
            module.configure_model()
    finally:
        of_transformers.disable_propagation()
    assert not [text for text in records(caplog) if "MISSING" in text]


def test_a_base_that_lacks_other_weights_is_refused_all_the_same(encoder):
    from safetensors.torch import load_file, save_file

    file = f"{encoder}/model.safetensors"
    tensors = load_file(file)
    tensors.pop("encoder.layer.0.attention.self.query.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder.layer.0.attention.self.query.weight"):
        GLUEModule("sst2", encoder).configure_model()


def failing():
    with without_load_report():
        assert logging.getLogger("transformers.modeling_utils").level == logging.ERROR
        raise RuntimeError


def test_levels_are_put_back_after_an_error():
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    with pytest.raises(RuntimeError):
        failing()
    assert logger.level == before


def test_real_warnings_are_shown():
    from dpp_lightning.cli.library_warnings import quiet_libraries

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn("The dirpath has changed from 'a' to 'b'", stacklevel=1)
        warnings.warn("the loss is NaN", stacklevel=1)
    assert [str(w.message) for w in caught] == ["the loss is NaN"]
