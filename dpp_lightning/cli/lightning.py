"""The Lightning half of ``dpp``: fit, validate, test and predict on LightningCLI. Importing it imports torch."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pydoc import locate
from typing import Any, cast

from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

# Imported so that configs may use the short names: jsonargparse finds every imported subclass by its class name.
from dpp_lightning.callbacks import ApplyDelta, DeltaPruneCallback, WritePredictions
from dpp_lightning.cli.exit_codes import FAILED, INTERRUPTED, SHOW_TRACEBACK, TERMINATED, USAGE_ERROR
from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.adamerging.glue_mix import GLUEMixDataModule
from dpp_lightning.tasks.adamerging.module import AdaMergingModule
from dpp_lightning.tasks.adamerging.text_mix import TextMixDataModule
from dpp_lightning.tasks.causal_lm.data import InstructionDataModule
from dpp_lightning.tasks.causal_lm.module import CausalLMModule
from dpp_lightning.tasks.glue.module import GLUEDataModule, GLUEModule
from dpp_lightning.tasks.vision.digits import DigitsDataModule
from dpp_lightning.tasks.vision.images import ImageDataModule
from dpp_lightning.tasks.vision.module import VisionModule
from dpp_lightning.trainer.checkpoint_io import AtomicCheckpointIO, SameCheckpoint
from dpp_lightning.trainer.interruption import how_to_resume, lost_rank

SHORT_NAMES = (
    AdaMergingModule,
    AdamR,
    ApplyDelta,
    CausalLMModule,
    DeltaPruneCallback,
    DigitsDataModule,
    GLUEDataModule,
    GLUEMixDataModule,
    GLUEModule,
    ImageDataModule,
    InstructionDataModule,
    TextMixDataModule,
    VisionModule,
    WritePredictions,
)


class DPPCLI(LightningCLI):
    """LightningCLI in subclass mode: model, data and callbacks are named by class, in YAML or on the command line.

    The command line and the configs are the whole truth: hyper-parameters stored in a checkpoint do not override them.
    """

    usage = "dpp {name} --config NAME [options]"

    def __init__(self, args: list[str]) -> None:
        shared = {"allow_abbrev": False}
        per_command = {name: {"usage": self.usage.format(name=name), **shared} for name in self.subcommands()}
        super().__init__(
            args=args,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "dpp", **shared, **per_command},
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As LightningCLI's, without its warning about a command line beside ``args``."""
        self.config = parser.parse_args(cast(list[str], args))

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would let the checkpoint's hyper-parameters silently replace what the user wrote."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """With ``--delta`` and ``--task`` where weights are used and not trained."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            parser.add_argument("--delta", type=str | None, help="delta folder or hub id that is put onto the base")
            parser.add_argument("--task", type=str | None, help="of a merged delta, the one whose head is taken")
        if subcommand == "predict":
            parser.add_argument("--output", type=str | None, help="file of the predictions, JSON lines")
        return parser

    def before_instantiate_classes(self) -> None:
        """Keep the config of a fit when its folder is validated or tested later; place the callbacks of options."""
        place_delta(self.config[self.subcommand])
        if self.subcommand == "predict":
            place_writer(self.config[self.subcommand])
        if self.subcommand != "fit":
            self.save_config_kwargs = {**self.save_config_kwargs, "config_filename": f"config_{self.subcommand}.yaml"}

    def instantiate_classes(self) -> None:
        """With checkpoints that are whole, and a check that the ranks go on from the same one."""
        super().instantiate_classes()
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.trainer.callbacks.insert(0, SameCheckpoint(self.config[self.subcommand].get("ckpt_path")))  # type: ignore[attr-defined]

    def fit(self, **arguments: Any) -> None:
        """``Trainer.fit``; one stopped by a signal or the loss of another rank says how to go on."""
        started = time.time()
        try:
            self.trainer.fit(**arguments)
        except SystemExit as stop:
            if signal_code(stop) and self.trainer.is_global_zero:
                sys.stderr.write(how_to_resume(self.trainer, started))
            raise
        except RuntimeError as error:
            if lost_rank(error):
                error.add_note(how_to_resume(self.trainer, started).strip())
            raise


def place_delta(config: Namespace) -> None:
    """Give the config of ``dpp test --delta`` the callback that applies it, in place of one that prunes.

    Raises:
        ValueError: ``--delta`` beside ``--ckpt_path``, or ``--task`` without ``--delta``.
    """
    delta, task = config.get("delta"), config.get("task")
    if delta is None:
        if task is not None:
            raise ValueError("--task chooses among the heads of a merged delta: give --delta, or --model.task")
        return
    if config.get("ckpt_path") is not None:
        raise ValueError("--delta goes onto the base, --ckpt_path loads fine-tuned weights: give one of them")
    given = config.trainer.get("callbacks") or []
    kept = [c for c in (given if isinstance(given, list) else [given]) if not is_callback(c, DeltaPruneCallback)]
    path = f"{ApplyDelta.__module__}.{ApplyDelta.__name__}"
    config.trainer.callbacks = [*kept, Namespace(class_path=path, init_args=Namespace(delta=delta, task=task))]


def place_writer(config: Namespace) -> None:
    """Give the config of ``dpp predict`` the callback that writes predictions, where it has none."""
    given = config.trainer.get("callbacks") or []
    callbacks = given if isinstance(given, list) else [given]
    if config.get("output") is None and any(is_callback(c, BasePredictionWriter) for c in callbacks):
        return
    others = [c for c in callbacks if not is_callback(c, WritePredictions)]
    path = f"{WritePredictions.__module__}.{WritePredictions.__name__}"
    config.trainer.callbacks = [*others, Namespace(class_path=path, init_args=Namespace(path=config.get("output")))]


def is_callback(callback: Any, cls: type) -> bool:
    """Whether a callback, as a config or an object, is of a class."""
    found = locate(callback.class_path) if isinstance(callback, Namespace) else type(callback)
    return isinstance(found, type) and issubclass(found, cls)


def run(arguments: list[str]) -> int:
    """Parse and run one of LightningCLI's commands; what the user can cure is one message on stderr, not a traceback.

    Args:
        arguments: the command line from the command on, config names already resolved to paths.

    Returns:
        The exit code: 0, 1 where another rank was lost, 2 for a wrong command line or setting, 130 or 143 where a
        signal stopped it.
    """
    return guarded(arguments[0], lambda: DPPCLI(arguments))


def guarded(command: str, act: Callable[[], object]) -> int:
    """Do what a command does, and turn what the user can cure and signals into messages and exit codes, as `run`."""
    _silence_what_no_user_can_cure()
    try:
        act()
    except SystemExit as stop:
        return signal_code(stop) or (stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except Exception as error:
        message, code = _for_the_user(error), USAGE_ERROR
        if message is None and (message := lost_rank(error)):
            code = FAILED
        if message is None or os.environ.get(SHOW_TRACEBACK):
            raise
        sys.stderr.write(f"dpp {command}: error: {message}\n({SHOW_TRACEBACK}=1 shows where it was raised)\n")
        sys.stderr.writelines(f"{note}\n" for note in getattr(error, "__notes__", ()))
        return code
    return 0


def _silence_what_no_user_can_cure() -> None:
    """Drop Lightning's advertisements, and two warnings about its own innards and its own former dependency."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in (r"`isinstance\(treespec, LeafSpec\)` is deprecated", r".*`tensorboardX` has been removed"):
        warnings.filterwarnings("ignore", message=message)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _for_the_user(error: BaseException | None) -> str | None:
    """The message of the outermost error in the chain that speaks to the user, ``None`` where it may be a bug.

    Such are: files, folders and networks (OSError), Lightning's refusals, and a ValueError raised in this package.
    jsonargparse wraps whatever a constructor raises in a ValueError of its own, hence the chain.
    """
    while error is not None:
        if isinstance(error, (OSError, MisconfigurationException)) or (isinstance(error, ValueError) and _ours(error)):
            return str(error)
        error = error.__cause__
    return None


def _ours(error: BaseException) -> bool:
    """Whether the innermost frame of the traceback is this package's."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == __name__.partition(".")[0]


def signal_code(stop: SystemExit) -> int:
    """130 after Ctrl-C, 143 after SIGTERM, else 0. Lightning turns both into SystemExit, the latter with code 0."""
    if isinstance(stop.__context__, KeyboardInterrupt):
        return INTERRUPTED
    return TERMINATED if isinstance(stop, SIGTERMException) else 0
