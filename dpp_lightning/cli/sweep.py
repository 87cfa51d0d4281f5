"""``dpp sweep``: methods x rates x seeds on one fine-tuned checkpoint, resumable, then a table and plots.

A sweep is :class:`dpp_lightning.callbacks.DeltaPruneCallback` in ``Trainer.test`` or ``Trainer.validate``: model, data
and trainer are built as ``dpp test`` builds them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.callbacks.prune_run.evaluation import EvaluationPasses
from dpp_lightning.cli.lightning import DPPCLI, guarded, is_callback, signal_code
from dpp_lightning.cli.sweep_progress import Bar
from dpp_lightning.experiments.report import Subject, write_report
from dpp_lightning.storage.atomic_write import check_writable

_COMMANDS = {"test": "test", "validation": "validate"}


class SweepCLI(DPPCLI):
    """``test`` or ``validate`` with the sweep's own callback, a progress bar, and a report at the end.

    Args:
        options: the sweep's own, parsed.
        arguments: LightningCLI's, after the command.
    """

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options = options
        super().__init__([_COMMANDS[options.split], *arguments])

    usage = "dpp sweep --config NAME --ckpt_path FILE --output DIR [options]"

    def before_instantiate_classes(self) -> None:
        """Put the sweep's callback into the config, and check the checkpoint before a model is built."""
        self.save_config_kwargs = {**self.save_config_kwargs, "config_filename": "config_sweep.yaml"}
        config = self.config[self.subcommand]
        _check_checkpoint(config.get("ckpt_path"))
        place_callback(config.trainer, self.options)

    def test(self, **arguments: Any) -> None:
        """The sweep on the test split."""
        self._sweep(self.trainer.test, arguments)

    def validate(self, **arguments: Any) -> None:
        """The sweep on the validation split."""
        self._sweep(self.trainer.validate, arguments)

    def _sweep(self, evaluate: Callable[..., Any], arguments: dict[str, Any]) -> None:
        (callback,) = (c for c in self.trainer.callbacks if isinstance(c, DeltaPruneCallback))  # type: ignore[attr-defined]
        first = self.trainer.is_global_zero
        try:
            with Bar(shown=first) as callback.reporter:
                evaluate(**{**arguments, "verbose": False})
        except SystemExit as stop:
            if signal_code(stop) and first:
                sys.stderr.write(
                    "\ndpp sweep: stopped. To go on where it was, repeat the command: the rows made so far are in "
                    f"{self.options.output}\n"
                )
            raise
        if not callback.results:
            raise ValueError(
                "nothing was pruned, since nothing tells which weights are the base: give the DeltaPruneCallback of "
                "the config pretrained=<folder or hub id of the base>"
            )
        if first:
            task = getattr(self.model, "task", None) or type(self.model).__name__
            monitor = EvaluationPasses(self.trainer, callback.settings.monitor).monitor
            subject = Subject(str(task), str(arguments["ckpt_path"]), monitor, callback.settings.objective)
            written = write_report(callback.results, Path(self.options.output), subject)
            sys.stderr.write("".join(f"{path}\n" for path in written))


def run(arguments: list[str]) -> int:
    """``dpp sweep``.

    Args:
        arguments: the command line from the command on, config names already resolved to paths.

    Returns:
        The exit code: 0, 2 for a wrong command line or setting, 130 or 143 where a signal stopped it.
    """

    def act() -> None:
        options, others = _parser().parse_known_args(arguments[1:])
        _check(options)
        SweepCLI(options, others)

    return guarded("sweep", act)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dpp sweep",
        usage=SweepCLI.usage,
        allow_abbrev=False,
        description="Prune one fine-tuned checkpoint by every method, rate and mask seed, score every pruned model, "
        "and write rows (results.jsonl), table (table.md) and plots. Killed, it goes on where it was when the command "
        "is repeated; further methods, rates and seeds may be added to it. Other settings are those of the config's "
        "DeltaPruneCallback.",
        epilog="All further options are those of dpp test (of dpp validate with --split validation), such as --config, "
        "--ckpt_path (the fine-tuned checkpoint), --model.pretrained, --data.path, --trainer.accelerator.",
    )
    parser.add_argument("--methods", nargs="+", metavar="M", help="method names (default: the config's)")
    parser.add_argument("--rates", nargs="+", type=float, metavar="P", help="fractions dropped, in [0, 1)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", help="mask seeds; q is found on the first one's")
    parser.add_argument("--output", required=True, metavar="DIR", help="rows, deltas, table and plots go here")
    parser.add_argument("--split", choices=_COMMANDS, default="test", help="what is scored (default: %(default)s)")
    parser.add_argument("--curve", metavar="M", help="also plot score and output change over q for this method")
    parser.add_argument(
        "--no-deltas", action="store_true", help="save no delta folders; bytes are counted all the same"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the config says."""
    given = {"method": options.methods, "pruning_rate": options.rates, "seeds": options.seeds}
    given |= {"plot": options.curve if options.methods else None}
    DeltaPruneCallback(**{name: value for name, value in given.items() if value is not None})
    check_writable(Path(options.output))


def _check_checkpoint(path: Any) -> None:
    if path is None:
        raise ValueError("a sweep needs the fine-tuned checkpoint: give --ckpt_path FILE")
    if "://" not in str(path) and not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint file {str(path)!r} (--ckpt_path)")


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
    settings |= {"resume": True, "apply": False, "ckpt": "last", "push_to_hub": None, "hub_private": None}
    return settings | ({"save_deltas": False} if options.no_deltas else {})
