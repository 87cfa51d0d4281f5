"""A tiny decoder and sums in words, put together as a fit does: data, module, trainer."""

import lightning.pytorch as pl
from tiny_causal import make_rows, write_rows

from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.causal_lm import CausalLMModule, InstructionDataModule

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def write_files(folder):
    """Files of 200 sums to train on and 21 to test, as settings of ``data_of``."""
    return {
        "path": write_rows(folder / "sums.jsonl", make_rows(200)),
        "test_path": write_rows(folder / "more.jsonl", make_rows(21, seed=1)),
    }


def data_of(files, **settings):
    return InstructionDataModule(**{**files, "prompt": "plain", "max_length": 32, "seed": 0, **settings})


def module_of(base, **settings):
    return CausalLMModule(
        base, **{"max_new_tokens": 12, "seed": 0, "optimizer": lambda groups: AdamR(groups, lr=3e-3), **settings}
    )


def trainer_of(folder, *callbacks, **settings):
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**QUIET, "max_epochs": 1, **settings})


def attached(base, files, folder, **settings):
    """Module, in evaluation mode, and data after setup, brought together as a trainer does it."""
    data, module = data_of(files, **settings), module_of(base)
    trainer = trainer_of(folder)
    trainer.strategy.connect(module)
    data.trainer = trainer
    data.setup()
    return module.eval(), data
