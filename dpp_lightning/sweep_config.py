"""The config of a sweep: that of ``dpp test`` with the callback's grid, output and trainer's surroundings replaced."""

from __future__ import annotations

import argparse
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.lightning_cli import is_callback


def place_callback(trainer: Namespace, options: argparse.Namespace) -> None:
    """Give the trainer's config the sweep's callback; what else the config says of it stays.

    Args:
        trainer: the config's ``trainer``, changed in place.
        options: of ``dpp sweep``.

    Raises:
        ValueError: the config has several DeltaPruneCallbacks.
    """
    given = trainer.get("callbacks") or []
    callbacks = list(given) if isinstance(given, list) else [given]
    own = [c for c in callbacks if is_callback(c, DeltaPruneCallback)]
    if len(own) > 1:
        raise ValueError(f"a sweep takes one DeltaPruneCallback, the config has {len(own)}: remove all but one")
    path = f"{DeltaPruneCallback.__module__}.{DeltaPruneCallback.__name__}"
    callback = own[0] if own else Namespace(class_path=path, init_args=Namespace())
    callback.init_args = Namespace(**{**vars(callback.get("init_args") or Namespace()), **_settings(callback, options)})
    others = [c for c in callbacks if not is_callback(c, DeltaPruneCallback) and not is_callback(c, ProgressBar)]
    trainer.callbacks = [*others, callback]
    trainer.default_root_dir, trainer.enable_progress_bar = options.output, False
    if trainer.get("logger") in (None, True):
        trainer.logger = False


def _settings(callback: Namespace, options: argparse.Namespace) -> dict[str, Any]:
    before = vars(callback.get("init_args") or Namespace())
    grid = {"method": options.methods, "pruning_rate": options.rates, "seeds": options.seeds}
    settings: dict[str, Any] = {name: value for name, value in grid.items() if value is not None}
    methods = settings.get("method", before.get("method", []))
    own = {name: s for name, s in (before.get("method_settings") or {}).items() if name in methods}
    settings |= {"method_settings": own or None, "output_dir": options.output, "plot": options.curve or False}
    settings |= {"resume": True, "apply": False, "ckpt": "last"}
    return settings | ({"save_deltas": False} if options.no_deltas else {})
