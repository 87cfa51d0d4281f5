"""A fit of a tiny BERT whose checkpoint ``dpp sweep`` takes."""

from contextlib import contextmanager, redirect_stderr

import datasets
import yaml
from tiny_glue import make_data, make_model

from dpp_lightning.cli import main


@contextmanager
def fitted(folder, epochs, rows, **model):
    """Fit, and give the arguments of a sweep but for grid and output; the data sets' cache lies in the folder meanwhile.

    Args:
        folder: of all files.
        epochs: of the fit.
        rows: of the training and of each other split.
        model: further settings of the module.
    """
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    checkpoint = {"dirpath": str(folder), "filename": "last", "save_weights_only": True}
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    settings = {"task": "sst2", "pretrained": make_model(folder / "base"), **model}
    data = {"path": make_data(folder / "data", "sst2", *rows)}
    config = {
        "trainer": {"max_epochs": epochs, "accelerator": "cpu", "callbacks": [saving], **quiet},
        "model": {"class_path": "GLUEModule", "init_args": settings},
        "data": {"class_path": "GLUEDataModule", "init_args": data},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    with (folder / "stderr.txt").open("w") as file, redirect_stderr(file):
        assert main(["fit", "--config", str(folder / "fit.yaml"), "--trainer.default_root_dir", str(folder)]) == 0
    yield ["--config", str(folder / "fit.yaml"), "--ckpt_path", str(folder / "last.ckpt")]
    datasets.config.HF_DATASETS_CACHE = cache
