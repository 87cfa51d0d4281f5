"""The console command ``dpp``. Nothing heavy is imported before a command is known that needs it."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpp_lightning._version import __version__
from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.exit_codes import INTERRUPTED, USAGE_ERROR


def _train_or_evaluate(arguments: list[str]) -> int:
    """fit, validate, test, predict: the config names are checked first, since torch takes seconds to import."""
    arguments = packaged_configs.resolve_arguments(arguments)
    # Spinning OpenMP threads starve each other once another process keeps a core busy; libgomp reads this on load.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dpp_lightning.cli.lightning import run

    return run(arguments)


def _sweep(arguments: list[str]) -> int:
    """sweep: as `_train_or_evaluate`."""
    arguments = packaged_configs.resolve_arguments(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dpp_lightning.cli.sweep import run

    return run(arguments)


def _configs(arguments: list[str]) -> int:
    """``dpp configs`` lists the packaged configs, ``dpp configs NAME`` prints one."""
    match arguments[1:]:
        case []:
            packaged = packaged_configs.names()
            width = max(map(len, packaged), default=0)
            sys.stdout.writelines(
                f"{name:{width}}  {packaged_configs.title(name)}".rstrip() + "\n" for name in packaged
            )
        case ["-h" | "--help"]:
            sys.stdout.write("usage: dpp configs [NAME]\n\nList the packaged configs, or print the one named.\n")
        case [name]:
            sys.stdout.write(packaged_configs.read(name))
        case extra:
            raise packaged_configs.UsageError(f"configs takes one name at most, got {' '.join(extra)}")
    return 0


def _delta_command(arguments: list[str]) -> int:
    """prune, apply, inspect: what they need takes a second or two to import."""
    from dpp_lightning.cli import delta_commands

    run: Callable[[list[str]], int] = getattr(delta_commands, arguments[0])
    return run(arguments)


def _merge(arguments: list[str]) -> int:
    """merge: as `_delta_command`."""
    from dpp_lightning.cli.merge import merge

    return merge(arguments)


def _eval(arguments: list[str]) -> int:
    """eval: as `_train_or_evaluate`."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dpp_lightning.cli.eval import evaluate

    return evaluate(arguments)


def _export(arguments: list[str]) -> int:
    """export: as `_delta_command`."""
    from dpp_lightning.cli.export import export

    return export(arguments)


@dataclass(frozen=True)
class Command:
    """One row of the command table: the line ``dpp --help`` shows and what runs; it is given the whole command line."""

    summary: str
    run: Callable[[list[str]], int]


COMMANDS = {
    "fit": Command("fine-tune; DeltaPruneCallback prunes, scores and saves at the end", _train_or_evaluate),
    "validate": Command("score a checkpoint on the validation data", _train_or_evaluate),
    "test": Command("score a checkpoint on the test data", _train_or_evaluate),
    "predict": Command("predict with a checkpoint", _train_or_evaluate),
    "sweep": Command("score methods x rates x seeds on one fine-tuned checkpoint; resumable; table and plots", _sweep),
    "prune": Command("prune the delta between two checkpoints, of any size, into a delta folder", _delta_command),
    "apply": Command("write base plus delta as a dense folder that from_pretrained loads", _delta_command),
    "export": Command("write a .ckpt or sharded checkpoint as a folder for from_pretrained, or as a delta", _export),
    "merge": Command("merge deltas of one base into one: task arithmetic, TIES, AdaMerging's weights", _merge),
    "inspect": Command("show what a delta folder costs; or, of two models, the method to take and why", _delta_command),
    "eval": Command("score a causal LM, or base plus delta in memory, with lm-evaluation-harness", _eval),
    "configs": Command("list the packaged configs, or print one: dpp configs [NAME]", _configs),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""usage: dpp COMMAND [options]

Delta parameter pruning for fine-tuned models.

commands:
{rows}

options:
  -h, --help  this text; dpp COMMAND --help for the options of one command
  --version   the version

examples:
  dpp fit --config quickstart.yaml
  dpp fit --config bert_cola_adamr.yaml --trainer.max_epochs 2
  dpp sweep --config bert_sst2_adamw.yaml --ckpt_path last.ckpt --methods dare importance --rates 0.9 0.99 --output DIR
  dpp prune BASE FINETUNED --method dare --pruning_rate 0.99 --output DELTA
  dpp apply BASE DELTA --output DENSE
  dpp export last.ckpt --output DENSE
  dpp merge BASE DELTA DELTA --tasks sst2 cola --method ties --output MERGED
  dpp eval BASE --delta DELTA --tasks gsm8k --output gsm8k.json

--config takes a file or the name of a packaged config; several compose, and options after them override.
"""


def _dispatch(arguments: list[str]) -> int:
    match arguments:
        case []:
            sys.stderr.write(_help())
            return USAGE_ERROR
        case ["-h" | "--help", *_]:
            sys.stdout.write(_help())
            return 0
        case ["--version", *_]:
            sys.stdout.write(f"dpp {__version__}\n")
            return 0
        case [name, *_] if name in COMMANDS:
            return COMMANDS[name].run(arguments)
        case [option, *_] if option.startswith("-"):
            raise packaged_configs.UsageError(f"a command comes before {option}; dpp --help lists the commands")
    raise packaged_configs.UsageError(
        f"there is no command {arguments[0]!r}{packaged_configs.did_you_mean(arguments[0], COMMANDS)} "
        f"(commands: {', '.join(COMMANDS)})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` defaults to the process's own arguments.

    Returns:
        The exit code: 0; 1 where another rank was lost; 2 where the command line or a setting is wrong; 130 or 143
        where a signal stopped it.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except packaged_configs.UsageError as error:
        sys.stderr.write(f"dpp: error: {error}\n")
        return USAGE_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("\ndpp: stopped\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has gone, as in ``dpp configs | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if argv is None and "torch.distributed" in sys.modules:
        from dpp_lightning.trainer.interruption import leave_gloo

        leave_gloo(code)
    return code
