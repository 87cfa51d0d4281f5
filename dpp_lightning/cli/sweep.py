"""``dpp sweep``: methods x rates x seeds on one fine-tuned checkpoint, resumable, then a table and plots.

A sweep is :class:`dpp_lightning.callbacks.DeltaPruneCallback` in ``Trainer.test`` or ``Trainer.validate``: model, data
and trainer are built as ``dpp test`` builds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.callbacks.prune_run.evaluation import EvaluationPasses, full_name
from dpp_lightning.callbacks.prune_run.rows_bar import RowsBar
from dpp_lightning.cli.command import FunctionCommand, say
from dpp_lightning.cli.config_checks import check_sources, class_config, is_callback, listed
from dpp_lightning.cli.lightning import DPPCLI
from dpp_lightning.cli.packaged_configs import UsageError
from dpp_lightning.cli.user_errors import guarded, signal_code
from dpp_lightning.experiments.report import Subject, write_report
from dpp_lightning.experiments.sweep_worker import Worker
from dpp_lightning.storage.atomic_write import atomic_file, check_writable
from dpp_lightning.storage.byte_count import number_of_bytes

_CONFIG_FILE = "config_sweep.yaml"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Prune one fine-tuned checkpoint by every method, rate and mask seed, and score every pruned model.

    Rows (results.jsonl), a table (table.md) and plots are written. Killed, a sweep goes on where it was when the
    command is repeated; further methods, rates and seeds may be added to it. What these options leave out is taken from
    the config's DeltaPruneCallback, or from its defaults.

    The same command given several times, on one machine or as a job array (sbatch --array 0-7), shares the rows of one
    output folder, which all must see. One of them writes the table.

    Args:
        output: folder of the rows, deltas, table and plots
        methods: names of methods; without them those of the config
        rates: fractions of the delta that are dropped, in [0, 1); without them those of the config
        seeds: seeds of the masks, q is found on the first one's; without them those of the config
        split: the data that every model is scored on
        curve: a method, for which score and output change are plotted over q
        deltas: save a delta folder for each row; their bytes are counted all the same
        max_bytes: of method auto: bytes that a delta may have, such as 50kB
    """

    output: str
    methods: Sequence[str] = ()
    rates: Sequence[float] = ()
    seeds: Sequence[int] = ()
    split: Literal["test", "validation"] = "test"
    curve: str | None = None
    deltas: bool = True
    max_bytes: str | None = None

    def grid(self) -> dict[str, list[Any]]:
        """The callback's settings that the options give."""
        given = {"method": self.methods, "pruning_rate": self.rates, "seeds": self.seeds}
        return {name: list(values) for name, values in given.items() if values}

    def limits(self) -> dict[str, Any]:
        """The settings of method auto that the options give."""
        return {} if self.max_bytes is None else {"max_bytes": number_of_bytes(self.max_bytes, "--max_bytes")}

    def check(self) -> None:
        """Refuse what is wrong whatever the config says.

        Raises:
            ValueError: an unknown method, a rate outside [0, 1), a value twice, a folder that cannot be written.
        """
        settings: dict[str, Any] = {**self.grid(), "plot": (self.curve or False) if self.methods else False}
        if "auto" in self.methods:  # the limit may be the config's
            settings["method_settings"] = {"auto": self.limits() or {"max_bytes": 1}}
        DeltaPruneCallback(**settings)
        check_writable(Path(self.output))


OPTIONS = FunctionCommand(
    SweepOptions,
    example="dpp sweep --config bert_sst2_adamw.yaml --ckpt_path runs/bert_sst2_adamw/last.ckpt --methods dare "
    "darex-q --rates 0.9 0.99 --output sweep",
    groups={"sweep": "output"},
)


class SweepCLI(DPPCLI):
    """``dpp test`` with the sweep's own callback, a progress bar, and a report at the end.

    Args:
        args: the command line behind the command's name.
        stack: holds what this process has claimed of the output folder for as long as it is open.
    """

    usage = "dpp sweep --config NAME --ckpt_path FILE --output DIR [options]"
    name = "sweep"

    def __init__(self, args: Sequence[str], stack: ExitStack) -> None:
        self._stack = stack
        super().__init__(["test", *OPTIONS.join_lists(args)])

    def help_texts(self) -> dict[str, str]:
        """With the description of the sweep's own options."""
        return {**super().help_texts(), "description": OPTIONS.description()}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """With the sweep's own options, before those of the trainer."""
        OPTIONS.add_parameters(parser)
        super().add_default_arguments_to_parser(parser)

    def add_options(self, parser: LightningArgumentParser, command: str) -> None:
        """None: a sweep makes its deltas and predicts nothing."""

    def check(self, command: str, config: Namespace) -> None:
        """Refuse a sweep without a checkpoint, and options that are wrong whatever the config says."""
        if config.get("ckpt_path") is None:
            raise UsageError("a sweep needs the fine-tuned checkpoint: give --ckpt_path FILE")
        super().check("validate" if config.split == "validation" else "test", config)
        self.options = SweepOptions(**{field.name: config[field.name] for field in fields(SweepOptions)})
        self.options.check()

    def before_instantiate_classes(self) -> None:
        """Put the sweep's callback into the config, which is saved when it is known that the rows are of this run."""
        self.save_config_callback = None
        place_callback(self.config[self.subcommand].trainer, self.options)
        check_sources(self.config[self.subcommand])

    def test(self, **arguments: Any) -> None:
        """Score every pruned model on the split, and write the report."""
        (callback,) = (c for c in self.trainer.callbacks if isinstance(c, DeltaPruneCallback))  # type: ignore[attr-defined]
        evaluate = self.trainer.validate if self.options.split == "validation" else self.trainer.test
        if self.options.split == "test" and type(self.model).test_step is LightningModule.test_step:
            raise ValueError(
                f"{type(self.model).__name__} has no test_step, and a sweep scores the test split by default: give it "
                "one, or score the validation split with --split validation"
            )
        is_first = self.trainer.is_global_zero
        worker = callback.worker = self._stack.enter_context(Worker(Path(self.options.output), self._save_config))
        try:
            with RowsBar(visible=is_first) as callback.reporter:
                evaluate(**{**arguments, "verbose": False})
        except SystemExit as stop:
            if signal_code(stop) and is_first:
                say(
                    "\ndpp sweep: stopped. To go on where it was, repeat the command: the rows made so far are in "
                    f"{self.options.output}"
                )
            raise
        if not callback.results:
            raise ValueError(
                "nothing was pruned, since nothing tells which weights are the base: give the DeltaPruneCallback of "
                "the config pretrained=<folder or hub id of the base>"
            )
        if is_first and worker.entered and not worker.reports:
            made = ", ".join(worker.made) or "no rows"
            say(f"dpp sweep: made {made}; the table is written by another worker")
        elif is_first:
            self._report(callback, str(arguments["ckpt_path"]))
            worker.reported()

    def _save_config(self) -> None:
        """Write the config into the output folder, whole."""
        with atomic_file(Path(self.options.output) / _CONFIG_FILE) as temporary:
            config = self.config[self.subcommand]
            self._parser(self.subcommand).save(config, str(temporary), skip_none=False, overwrite=True, multifile=False)

    def _report(self, callback: DeltaPruneCallback, checkpoint: str) -> None:
        task = getattr(self.model, "task", None) or type(self.model).__name__
        asked = EvaluationPasses(self.trainer, callback.settings.monitor).monitor
        monitor = full_name(self.trainer.callback_metrics, asked)
        subject = Subject(str(task), checkpoint, monitor, callback.settings.objective)
        written = write_report(callback.results, Path(self.options.output), subject)
        for path in written:
            say(str(path))


def run(arguments: list[str]) -> int:
    """``dpp sweep``.

    Args:
        arguments: the command line from the command on, config names already resolved to paths.

    Returns:
        The exit code, see :mod:`dpp_lightning.cli.exit_codes`.
    """
    with ExitStack() as stack:
        return guarded("sweep", lambda: SweepCLI(arguments[1:], stack))


def place_callback(trainer: Namespace, options: SweepOptions) -> None:
    """Give the trainer's config the sweep's callback; what else the config says of it stays.

    Args:
        trainer: the config's ``trainer``, changed in place.
        options: of ``dpp sweep``.

    Raises:
        ValueError: the config has several DeltaPruneCallbacks.
    """
    callbacks = listed(trainer.get("callbacks"))
    pruning = [callback for callback in callbacks if is_callback(callback, DeltaPruneCallback)]
    if len(pruning) > 1:
        raise ValueError(f"a sweep takes one DeltaPruneCallback, the config has {len(pruning)}: remove all but one")
    callback = pruning[0] if pruning else class_config(DeltaPruneCallback)
    configured = vars(callback.get("init_args") or Namespace())
    callback.init_args = Namespace(**{**configured, **_settings(configured, options)})
    kept = [c for c in callbacks if not is_callback(c, DeltaPruneCallback) and not is_callback(c, ProgressBar)]
    trainer.callbacks = [*kept, callback]
    trainer.default_root_dir, trainer.enable_progress_bar = options.output, False
    if trainer.get("logger") in (None, True):
        trainer.logger = False


def _settings(configured: dict[str, Any], options: SweepOptions) -> dict[str, Any]:
    """What a sweep sets of the callback, whatever the config says of it.

    Args:
        configured: the callback's settings in the config.
        options: of ``dpp sweep``.
    """
    settings: dict[str, Any] = options.grid()
    methods = settings.get("method", configured.get("method", []))
    of_methods = {name: s for name, s in (configured.get("method_settings") or {}).items() if name in methods}
    if "auto" in methods and options.limits():
        others = {n: v for n, v in of_methods.get("auto", {}).items() if n not in ("max_bytes", "max_loss")}
        of_methods["auto"] = others | options.limits()
    settings |= {"method_settings": of_methods or None, "output_dir": options.output, "plot": options.curve or False}
    settings |= {"resume": True, "apply": False, "ckpt": "last", "push_to_hub": None, "hub_private": None}
    return settings | ({} if options.deltas else {"save_deltas": False})
