"""What can be refused of a parsed config before a model is built, data are loaded or a bar is drawn."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from dpp_lightning.callbacks import ApplyDelta, DeltaPruneCallback
from dpp_lightning.cli.packaged_configs import UsageError, did_you_mean, nearest
from dpp_lightning.cli.signatures import find_class, subclasses
from dpp_lightning.storage.locate import hub_id, local_folder, local_path
from dpp_lightning.storage.mapped_file import load_outline, refused_global
from dpp_lightning.storage.output_file import check_output_file
from dpp_lightning.storage.same_place import same_place
from dpp_lightning.storage.source_kind import check_checkpoint, check_delta, check_model
from dpp_lightning.tasks.causal_lm.source import FILES
from dpp_lightning.tasks.common.dataset_source import check_data_source

_LOADERS = {"fit": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader"}
_LONGEST_LINE = 1 << 24  # bytes of a prediction that are looked at
_RESOLVED_LATER = re.compile("last$|hpc$|registry|.*://")  # words and addresses that Lightning finds a checkpoint by


def check_config(command: str, config: Namespace) -> None:
    """Refuse what cannot work whatever the data are.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: as parsed, nothing instantiated; a strategy given by the name of its class is replaced by the class.

    Raises:
        UsageError: no data, a checkpoint that does not exist, a callback listed twice, a strategy of an unknown name.
        ValueError, FileExistsError: an output of predictions that is not to be written.
    """
    if config.trainer.get("num_nodes", 1) == 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        _check_checkpoint(config.get("ckpt_path"))  # several nodes ask one another first, see SameCheckpoint
    _check_data(command, config)
    if command == "predict" and config.get("output") is not None:
        _check_predictions(config)
    _check_callbacks(listed(config.trainer.get("callbacks")))
    _resolve_strategy(config.trainer)


def check_sources(config: Namespace) -> None:
    """Refuse what would be refused only after the model is loaded: a damaged checkpoint, data, deltas, bases.

    Settings of classes that are not this package's are left to them. The base of the model is what the model itself
    looks at first.

    Args:
        config: as :func:`check_config` leaves it; its hub ids are asked for.

    Raises:
        FileNotFoundError, ValueError, PermissionError, ConnectionError: a source that is not there or cannot be read,
            or is another thing than wanted.
    """
    checkpoint = config.get("ckpt_path")
    if checkpoint is not None and not _RESOLVED_LATER.match(str(checkpoint)) and local_path(checkpoint).exists():
        check_checkpoint(checkpoint, "--ckpt_path")
        _check_of_trainer(local_path(checkpoint), trusted=config.get("weights_only") is False)
    if config.get("delta") is not None:
        check_delta(config.delta, "--delta")
    model = config.get("model")
    of_model = settings_of(model) if isinstance(model, Namespace) and _is_ours(model) else {}
    if "deltas" in of_model:  # which are read, as their base is, when data are loaded and processes started
        check_model(of_model["pretrained"], "model.pretrained", of_model.get("revision"), config=True)
        for task, delta in of_model["deltas"].items():
            check_delta(delta, f"model.deltas.{task}")
    data, callbacks = config.get("data"), listed(config.trainer.get("callbacks"))
    of_data = settings_of(data) if isinstance(data, Namespace) and _is_ours(data) else {}
    for name, suffixes in (("path", tuple(FILES) if "test_path" in of_data else ()), ("test_path", tuple(FILES))):
        if isinstance(of_data.get(name), str):
            check_data_source(of_data[name], f"data.{name}", suffixes=suffixes)
    if isinstance(of_data.get("tokenizer"), str) and hub_id(of_data["tokenizer"]) is None:
        local_folder(of_data["tokenizer"], None, (), argument="data.tokenizer")
    for callback in callbacks:
        if isinstance(callback, Namespace) and is_callback(callback, DeltaPruneCallback):
            settings = settings_of(callback)
            if settings.get("pretrained") is not None:
                check_model(settings["pretrained"], "DeltaPruneCallback.pretrained", settings.get("revision"))
        elif isinstance(callback, Namespace) and is_callback(callback, ApplyDelta):
            check_delta(settings_of(callback)["delta"], "ApplyDelta.delta", settings_of(callback).get("revision"))


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
    file = local_path(path)
    if file.exists():
        return
    beside = sorted(neighbour.name for neighbour in file.parent.glob("*.ckpt"))
    near = nearest(file.name, beside)
    cure = f": did you mean {file.parent / near}?" if near else f"; beside it are {', '.join(beside)}" if beside else ""
    raise UsageError(f"there is no checkpoint {str(path)!r} (--ckpt_path){cure}")


def _check_of_trainer(file: Path, *, trusted: bool) -> None:
    """Refuse a file that no Trainer of Lightning wrote, or that holds more than one may read unseen.

    Args:
        file: a file of ``torch.save``; of a folder of shards nothing is checked.
        trusted: objects of any class in it may be made, ``--weights_only false``.
    """
    if not file.is_file() or trusted:
        return
    try:
        content = load_outline(file)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"--ckpt_path {file} holds more than tensors and plain values ({refused_global(error) or 'damaged'}), "
            "and reading that could run any code: if you trust the file, give --weights_only false"
        ) from error
    except Exception as error:  # a damaged file ends in almost any type
        raise ValueError(f"--ckpt_path {file} cannot be read ({error}): copy or download it again") from error
    there = content if isinstance(content, Mapping) else {}
    missing = [key for key in ("state_dict", "pytorch-lightning_version") if key not in there]
    if missing:
        raise ValueError(
            f"--ckpt_path {file} is no checkpoint of Lightning's Trainer (it lacks {' and '.join(missing)}): to prune "
            "or export weights alone use dpp prune or dpp export"
        )


def _check_data(command: str, config: Namespace) -> None:
    """Refuse a model without a data module that loads no data itself."""
    loader = _LOADERS.get(command, "predict_dataloader")
    model = locate(config.model.class_path) if config.get("data") is None and config.get("model") else None
    if isinstance(model, type) and getattr(model, loader, None) is getattr(LightningModule, loader):
        raise UsageError(
            f"--data is missing: {model.__name__} loads no data itself. Name a data module (--data CLASS), or give a "
            "config that does (dpp configs lists them)"
        )


def _check_predictions(config: Namespace) -> None:
    """Refuse a file of predictions that is read in the same run, or that is there and not to be replaced."""
    data = config.get("data")
    of_data = settings_of(data) if isinstance(data, Namespace) else {}
    read = [(f"data.{name}", value) for name, value in of_data.items() if isinstance(value, str)]
    inputs = [("--ckpt_path", config.get("ckpt_path")), *read]
    check_output_file(config.output, "predictions", _holds_predictions, overwrite=config.overwrite, inputs=inputs)


def _holds_predictions(file: Path) -> bool:
    """Whether a file's first line is one that :class:`WritePredictions` writes; nothing is one too."""
    with file.open("rb") as lines:
        first = lines.readline(_LONGEST_LINE)
    try:
        line = json.loads(first) if first else {"index": 0}
    except (ValueError, RecursionError):
        return False
    return isinstance(line, dict) and type(line.get("index")) is int and next(iter(line)) in ("index", "dataloader")


def settings_of(chosen: Namespace) -> dict[str, Any]:
    """The settings of a class in a config."""
    return vars(chosen.get("init_args") or Namespace())


def _is_ours(chosen: Namespace) -> bool:
    """Whether a class in a config is one of this package, not a user's own, derived or not."""
    return str(chosen.class_path).startswith("dpp_lightning.")


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
    if any(_same_folder(a, b) for a, b in combinations(folders, 2)):
        raise UsageError(
            f"trainer.callbacks lists {len(pruning)} DeltaPruneCallbacks that write into one folder: give each an "
            "output_dir of its own, or remove all but one"
        )


def _same_folder(a: str | None, b: str | None) -> bool:
    """Whether two settings name one folder; without one each callback takes the default, which is the same."""
    return a is b if a is None or b is None else same_place(a, b)


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
