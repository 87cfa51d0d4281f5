"""The Lightning half of ``dpp``: fit, validate, test and predict on LightningCLI. Importing it imports torch."""

import re
import time
from argparse import ArgumentError
from typing import Any, cast

from jsonargparse import ActionYesNo, Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import BasePredictionWriter, ModelSummary
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

# Imported so that configs may use the short names: jsonargparse finds every imported subclass by its class name.
from dpp_lightning.callbacks import ApplyDelta, DeltaPruneCallback, WritePredictions
from dpp_lightning.cli.command import HelpFormatter, say
from dpp_lightning.cli.commands import COMMANDS
from dpp_lightning.cli.config_checks import check_config, check_sources, class_config, is_callback, listed
from dpp_lightning.cli.exit_codes import MEANINGS, SHOW_TRACEBACK
from dpp_lightning.cli.fit_checkpoints import earlier_checkpoint, next_commands
from dpp_lightning.cli.given_settings import read_settings, refuse_repeated
from dpp_lightning.cli.home import expand_home
from dpp_lightning.cli.near_miss import explain
from dpp_lightning.cli.packaged_configs import UsageError
from dpp_lightning.cli.trainer_settings import check_trainer_settings
from dpp_lightning.cli.user_errors import guarded, signal_code
from dpp_lightning.optim import AdamR
from dpp_lightning.storage.quiet_loading import VERBOSE, is_verbose
from dpp_lightning.tasks import (
    AdaMergingModule,
    CausalLMModule,
    DigitsDataModule,
    GLUEDataModule,
    GLUEMixDataModule,
    GLUEModule,
    ImageDataModule,
    InstructionDataModule,
    TextMixDataModule,
    VisionModule,
)
from dpp_lightning.trainer.checkpoint_io import AtomicCheckpointIO, SameCheckpoint
from dpp_lightning.trainer.interruption import how_to_resume, lost_rank
from dpp_lightning.trainer.model_size import ModelSize
from dpp_lightning.trainer.strategies import FSDP2Strategy

SHORT_NAMES = (
    AdaMergingModule,
    AdamR,
    ApplyDelta,
    CausalLMModule,
    DeltaPruneCallback,
    DigitsDataModule,
    FSDP2Strategy,
    GLUEDataModule,
    GLUEMixDataModule,
    GLUEModule,
    ImageDataModule,
    InstructionDataModule,
    TextMixDataModule,
    VisionModule,
    WritePredictions,
)

_EXAMPLES = {
    "fit": "--config bert_cola_adamr.yaml --trainer.max_epochs 2",
    "validate": "--config bert_cola_adamr.yaml --ckpt_path runs/bert_cola_adamr/last.ckpt",
    "test": "--config bert_cola_adamr.yaml --ckpt_path runs/bert_cola_adamr/last.ckpt",
    "predict": "--config bert_cola_adamr.yaml --ckpt_path runs/bert_cola_adamr/last.ckpt --output predictions.jsonl",
    "sweep": "--config bert_cola_adamr.yaml --ckpt_path runs/bert_cola_adamr/last.ckpt --rates 0.9 0.99 --output sweep",
}
_EPILOG = f"""example:
  dpp {{name}} {{example}}

settings of a class, which an option that ends in .help lists:
  dpp {{name}} --model.help GLUEModule
  dpp {{name}} --trainer.callbacks.help DeltaPruneCallback

where in the code an error was raised:
  {SHOW_TRACEBACK}=1 dpp {{name}} --config NAME

what Lightning and transformers say of themselves, which is quiet by default:
  {VERBOSE}=1 dpp {{name}} --config NAME

exit codes:
{{codes}}
"""


class DPPCLI(LightningCLI):
    """LightningCLI in subclass mode: model, data and callbacks are named by class, in YAML or on the command line.

    The command line and the configs are the whole truth: hyper-parameters stored in a checkpoint do not override them.

    Args:
        args: the command line from the command on.

    Raises:
        UsageError: a command line or config that the parser refuses, a setting given twice, or one that cannot work;
            raised before anything is built.
    """

    usage = "dpp {name} --config NAME [options]"
    name: str | None = None  # what the user types; default the name of Lightning's command

    def __init__(self, args: list[str]) -> None:
        self._command = args[0]
        super().__init__(
            args=args,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "dpp",
                "allow_abbrev": False,
                "exit_on_error": False,
                "formatter_class": HelpFormatter,
                self._command: self.help_texts(),
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command given alone: a parser for each of Lightning's four would take four times as long to make."""
        return {self._command: super().subcommands()[self._command]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """With a help of ``--config`` that names the recipes."""
        parser = super().init_parser(**kwargs)
        config = next(action for action in parser._actions if action.dest == "config")
        config.help = "A YAML file, or the name of a packaged recipe (dpp configs lists them); later ones win."
        return parser

    def help_texts(self) -> dict[str, str]:
        """Usage, description and epilog of the command's help."""
        name = self.name or self._command
        codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in MEANINGS.items())
        summary = COMMANDS[name].summary
        return {
            "usage": self.usage.format(name=name),
            "description": f"{summary[0].upper()}{summary[1:]}.",
            "epilog": _EPILOG.format(name=name, example=_EXAMPLES[name], codes=codes),
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As LightningCLI's, with every refusal in one line."""
        command, *words = cast(list[str], args)
        command_parser = self._subcommand_parsers[command]
        command_parser.prog = f"dpp {self.name or command}"
        settings = read_settings(command_parser, words)
        refuse_repeated(settings)
        try:
            self.config = parser.parse_args([command, *words])
        except ArgumentError as error:
            if re.search(rf"required: .*\b{command}\.model\b", str(error)):
                raise UsageError(
                    "no model is named: give a config, --config NAME (dpp configs lists them), or --model CLASS"
                ) from error
            raise UsageError(explain(error, command_parser, words)) from error
        self.check(command, self.config[command])

    def check(self, command: str, config: Namespace) -> None:
        """Refuse what cannot work, before anything is built."""
        expand_home(config)
        check_trainer_settings(command, config)
        check_config(command, config)

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would let the checkpoint's hyper-parameters silently replace what the user wrote."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """With the options that this package adds to a command."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.add_options(parser, subcommand)
        return parser

    def add_options(self, parser: LightningArgumentParser, command: str) -> None:
        """``--delta`` and ``--task`` where weights are used and not trained, ``--output`` and
        ``--overwrite`` of predictions."""
        if command != "fit":
            parser.add_argument("--delta", type=str | None, help="delta folder or hub id that is put onto the base")
            parser.add_argument("--task", type=str | None, help="of a merged delta, the one whose head is taken")
        if command == "predict":
            parser.add_argument("--output", type=str | None, help="file of the predictions, JSON lines; a new one")
            parser.add_argument(
                "--overwrite",
                action=ActionYesNo,
                default=False,
                help="replace earlier predictions in that file; any other file is refused all the same",
            )

    def before_instantiate_classes(self) -> None:
        """Add the callbacks of options, check sources of data and weights, and keep the config of an earlier fit."""
        add_delta_callback(self.config[self.subcommand])
        if self.subcommand == "fit":
            _say_size_in_one_line(self.config.fit)
        check_sources(self.config[self.subcommand])
        if self.subcommand == "predict":
            add_prediction_writer(self.config[self.subcommand])
        if self.subcommand != "fit":
            self.save_config_kwargs = {**self.save_config_kwargs, "config_filename": f"config_{self.subcommand}.yaml"}

    def instantiate_classes(self) -> None:
        """With checkpoints that are whole, and a check that the ranks go on from the same one."""
        super().instantiate_classes()
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.trainer.callbacks.insert(0, SameCheckpoint(self.config[self.subcommand].get("ckpt_path")))  # type: ignore[attr-defined]

    def before_test(self) -> None:
        """Say that a test without a checkpoint or a delta scores the model as it was made."""
        config = self.config[self.subcommand]
        if config.get("ckpt_path") is None and config.get("delta") is None and self.trainer.is_global_zero:
            made = "predictions" if self.subcommand == "predict" else "scores"
            say(
                f"dpp {self.subcommand}: no checkpoint was given, so the {made} are those of the base, with a fresh "
                "head if it has none: --ckpt_path FILE takes a fine-tuned model, --delta DIR the base with a delta"
            )

    before_validate = before_predict = before_test

    def fit(self, **arguments: Any) -> None:
        """``Trainer.fit``, which says where its checkpoint is; stopped by a signal or a lost rank, how to go on."""
        started = time.time()
        if arguments.get("ckpt_path") is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            warning = earlier_checkpoint(self.trainer)
            if warning is not None:
                say(f"dpp fit: {warning}")
        try:
            self.trainer.fit(**arguments)
        except SystemExit as stop:
            if signal_code(stop) and self.trainer.is_global_zero:
                say(how_to_resume(self.trainer, started).rstrip())
            raise
        except RuntimeError as error:
            if lost_rank(error):
                error.add_note(how_to_resume(self.trainer, started).strip())
            raise
        message = next_commands(self.trainer, self.model)
        if message is not None and self.trainer.is_global_zero:
            say(message)


def add_delta_callback(config: Namespace) -> None:
    """Give the config of ``dpp test --delta`` the callback that applies the delta, in place of one that prunes.

    Raises:
        ValueError: if ``--delta`` stands beside ``--ckpt_path``, or ``--task`` without ``--delta``.
    """
    delta, task = config.get("delta"), config.get("task")
    if delta is None:
        if task is not None:
            raise ValueError("--task chooses among the heads of a merged delta: give --delta, or --model.task")
        return
    if config.get("ckpt_path") is not None:
        raise ValueError("--delta goes onto the base, --ckpt_path loads fine-tuned weights: give one of them")
    _replace_callbacks(config, DeltaPruneCallback, ApplyDelta, delta=delta, task=task)


def _say_size_in_one_line(config: Namespace) -> None:
    """Have the model's size in one line in place of Lightning's table, unless the user said which."""
    callbacks = listed(config.trainer.get("callbacks"))
    chosen = config.trainer.get("enable_model_summary") is not None or config.trainer.get("barebones")
    if chosen or is_verbose() or any(is_callback(callback, ModelSummary) for callback in callbacks):
        return
    config.trainer.enable_model_summary = False
    config.trainer.callbacks = [*callbacks, class_config(ModelSize)]


def add_prediction_writer(config: Namespace) -> None:
    """Give the config of ``dpp predict`` the callback that writes predictions, where it has none."""
    callbacks = listed(config.trainer.get("callbacks"))
    if config.get("output") is None and any(is_callback(callback, BasePredictionWriter) for callback in callbacks):
        return
    _replace_callbacks(config, WritePredictions, WritePredictions, path=config.get("output"))


def _replace_callbacks(config: Namespace, removed: type, added: type, **init_args: Any) -> None:
    callbacks = [c for c in listed(config.trainer.get("callbacks")) if not is_callback(c, removed)]
    config.trainer.callbacks = [*callbacks, class_config(added, **init_args)]


def run(arguments: list[str]) -> int:
    """Parse and run one of LightningCLI's commands; what the user can cure is one message on stderr, not a traceback.

    Args:
        arguments: the command line from the command on, config names already resolved to paths.

    Returns:
        The exit code, see :mod:`dpp_lightning.cli.exit_codes`.
    """
    return guarded(arguments[0], lambda: DPPCLI(arguments))
