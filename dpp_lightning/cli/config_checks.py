"""What can be refused of a parsed config before a model is built, data are loaded or a bar is drawn."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.cli.packaged_configs import UsageError, did_you_mean, nearest
from dpp_lightning.cli.signatures import find_class, subclasses

_LOADERS = {"fit": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader"}
_RESOLVED_LATER = re.compile("last$|hpc$|registry|.*://")  # words and addresses that Lightning finds a checkpoint by


def check_config(command: str, config: Namespace) -> None:
    """Refuse what cannot work whatever the data are.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: as parsed, nothing instantiated; a strategy given by the name of its class is replaced by the class.

    Raises:
        UsageError: no data, a checkpoint that does not exist, a callback listed twice, a strategy of an unknown name.
    """
    if config.trainer.get("num_nodes", 1) == 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        _check_checkpoint(config.get("ckpt_path"))  # several nodes ask one another first, see SameCheckpoint
    _check_data(command, config)
    _check_callbacks(listed(config.trainer.get("callbacks")))
    _resolve_strategy(config.trainer)


def listed(setting: Any) -> list[Any]:
    """A setting of the trainer that may be nothing, one thing or several, as a list."""
    if setting is None:
        return []
    return list(setting) if isinstance(setting, list) else [setting]


def is_callback(callback: Any, cls: type) -> bool:
    """Whether a callback, as a config or an object, is of a class."""
    callback_class = locate(callback.class_path) if isinstance(callback, Namespace) else type(callback)
    return isinstance(callback_class, type) and issubclass(callback_class, cls)


def class_config(cls: type, **init_args: Any) -> Namespace:
    """An object in a config, as the parser leaves it: its class by import path, with the settings it is made of."""
    return Namespace(class_path=f"{cls.__module__}.{cls.__name__}", init_args=Namespace(**init_args))


def _check_checkpoint(path: Any) -> None:
    """Refuse a checkpoint that is not there, with the names of those beside it."""
    if path is None or _RESOLVED_LATER.match(str(path)):
        return
    if str(path) == "best":
        raise UsageError("--ckpt_path best means the best of a fit in this process: give the file itself")
    file = Path(path)
    if file.exists():
        return
    beside = sorted(neighbour.name for neighbour in file.parent.glob("*.ckpt"))
    near = nearest(file.name, beside)
    cure = f": did you mean {file.parent / near}?" if near else f"; beside it are {', '.join(beside)}" if beside else ""
    raise UsageError(f"there is no checkpoint {str(path)!r} (--ckpt_path){cure}")


def _check_data(command: str, config: Namespace) -> None:
    """Refuse a model without a data module that loads no data itself."""
    loader = _LOADERS.get(command, "predict_dataloader")
    model = locate(config.model.class_path) if config.get("data") is None and config.get("model") else None
    if isinstance(model, type) and getattr(model, loader, None) is getattr(LightningModule, loader):
        raise UsageError(
            f"--data is missing: {model.__name__} loads no data itself. Name a data module (--data CLASS), or give a "
            "config that does (dpp configs lists them)"
        )


def _check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuse a callback listed twice, and two that prune into one folder."""
    for index, callback in enumerate(callbacks):
        if callback in callbacks[:index]:
            name = (
                callback.class_path.rpartition(".")[2] if isinstance(callback, Namespace) else type(callback).__name__
            )
            raise UsageError(f"trainer.callbacks lists {name} twice with the same settings: remove one")
    pruning = [c for c in callbacks if isinstance(c, Namespace) and is_callback(c, DeltaPruneCallback)]
    folders = [(c.get("init_args") or Namespace()).get("output_dir") for c in pruning]
    if len(set(folders)) < len(folders):
        raise UsageError(
            f"trainer.callbacks lists {len(pruning)} DeltaPruneCallbacks that write into one folder: give each an "
            "output_dir of its own, or remove all but one"
        )


def _resolve_strategy(trainer: Namespace) -> None:
    """Put the class in place of its name, which the parser leaves as text; refuse a name that nothing has."""
    strategy = trainer.get("strategy")
    if not isinstance(strategy, str) or strategy == "auto" or strategy.lower() in StrategyRegistry:
        return
    cls = find_class((Strategy,), strategy)
    if cls is not None:
        trainer.strategy = class_config(cls)
        return
    classes = [cls.__name__ for cls in subclasses((Strategy,)) if cls is not Strategy]
    known = ["auto", *StrategyRegistry.available_strategies(), *classes]
    raise UsageError(f"trainer.strategy {strategy} is not known{did_you_mean(strategy, known)}")
