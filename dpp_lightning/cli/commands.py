"""The console command ``dpp``: its table of commands. Nothing heavy is imported before a command is known."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

from dpp_lightning._version import __version__
from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.exit_codes import DONE, INTERRUPTED, MEANINGS, SHOW_TRACEBACK, USAGE_ERROR
from dpp_lightning.cli.library_warnings import show_plainly
from dpp_lightning.storage.safe_text import printable


@dataclass(frozen=True)
class Command:
    """One row of the command table.

    Attributes:
        summary: what ``dpp --help`` says of it.
        entry: object reference of what runs it, imported when it is needed: it takes the command line from the
            command's name on and returns the exit code.
        takes_recipes: ``--config`` takes the names of packaged recipes too.
        threads_sleep: OpenMP's threads sleep while they wait. Spinning ones starve each other once another process
            keeps a core busy.
    """

    summary: str
    entry: str
    takes_recipes: bool = False
    threads_sleep: bool = False

    def run(self, arguments: list[str]) -> int:
        """Run the command."""
        if self.takes_recipes:  # torch takes seconds to import: wrong names are said before
            arguments = packaged_configs.resolve_arguments(arguments)
        if self.threads_sleep:
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # libgomp reads it as it is loaded
        code: int = resolve_name(self.entry)(arguments)
        return code


def _of_lightning(summary: str, module: str = "lightning") -> Command:
    return Command(summary, f"dpp_lightning.cli.{module}:run", takes_recipes=True, threads_sleep=True)


def _of_function(module: str, summary: str, *, threads_sleep: bool = False) -> Command:
    return Command(summary, f"dpp_lightning.cli.{module}:COMMAND.run", threads_sleep=threads_sleep)


ENDS_WITH = "DPP_ENDS_WITH"  # environment variable: number of the process whose end ends this one

_NOT_IN_YAML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")

COMMANDS = {
    "fit": _of_lightning("fine-tune; DeltaPruneCallback prunes, scores and saves at the end"),
    "validate": _of_lightning("score a checkpoint on the validation data"),
    "test": _of_lightning("score a checkpoint on the test data"),
    "predict": _of_lightning("predict with a checkpoint"),
    "sweep": _of_lightning(
        "score methods x rates x seeds on one fine-tuned checkpoint; resumable; table, plots", "sweep"
    ),
    "reproduce": _of_function("reproduce", "repeat a table or figure of the papers, beside what they published"),
    "prune": _of_function("prune", "prune the delta between two checkpoints, of any size, into a delta folder"),
    "apply": _of_function("apply", "write base plus delta as a dense folder that from_pretrained loads"),
    "export": _of_function("export", "write a .ckpt or sharded checkpoint as a folder for from_pretrained, or a delta"),
    "merge": _of_function("merge", "merge deltas of one base into one: task arithmetic, TIES, AdaMerging's weights"),
    "inspect": _of_function("inspect", "show what a delta folder costs; or, of two models, the method to take and why"),
    "eval": _of_function(
        "eval", "score a causal LM, or base plus delta in memory, with lm-evaluation-harness", threads_sleep=True
    ),
    "serve": _of_function("serve", "serve one base and many deltas over HTTP", threads_sleep=True),
    "push": _of_function("push", "upload a delta folder to the hub"),
    "plan": _of_function("plan", "show what training a model takes on each of N devices"),
    "configs": _of_function("configs", "list the packaged recipes, print one, or copy one to change it"),
    "completion": _of_function(
        "completion", "print a script for bash, zsh or tcsh that completes commands and options"
    ),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    codes = "\n".join(f"  {code:<{width}}  {meaning}" for code, meaning in MEANINGS.items())
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
  dpp sweep --config bert_sst2_adamw.yaml --ckpt_path CKPT --methods dare importance --rates 0.9 0.99 --output DIR
  dpp prune BASE FINETUNED --method dare --pruning_rate 0.99 --output DELTA
  dpp apply BASE DELTA --output DENSE
  dpp export CKPT --output DENSE
  dpp merge BASE DELTA DELTA --tasks sst2 cola --method ties --output MERGED
  dpp eval BASE --delta DELTA --tasks gsm8k --output gsm8k.json
  dpp serve BASE sst2=DELTA cola=DELTA --port 8000

--config takes a file with any of a command's options; --print_config prints one with all of them. For fit, validate,
test, predict and sweep it also takes the name of a packaged recipe; several compose, and what is typed beside wins.

exit codes:
{codes}
  {SHOW_TRACEBACK}=1 in the environment shows where an error was raised.

completion:
  pip install 'dpp_lightning[completion]'
  dpp completion bash > ~/.local/share/bash-completion/completions/dpp
"""


def _dispatch(arguments: list[str]) -> int:
    for word in arguments:
        if _NOT_IN_YAML.search(word):
            raise packaged_configs.UsageError(
                f"{word!r} has characters that no setting can have (control characters, or bytes that are not UTF-8): "
                "rename the file or folder"
            )
    match arguments:
        case []:
            sys.stderr.write(_help())
            return USAGE_ERROR
        case ["-h" | "--help", *_]:
            sys.stdout.write(_help())
            return DONE
        case ["--version", *_]:
            sys.stdout.write(f"dpp {__version__}\n")
            return DONE
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
        The exit code, see :mod:`dpp_lightning.cli.exit_codes`.
    """
    if argv is None:
        if ENDS_WITH in os.environ:
            resolve_name("dpp_lightning.cli.child_command:end_with_parent")()
        show_plainly()
        if os.getcwd() not in sys.path:  # classes in the current folder, as with python -m; nothing is shadowed
            sys.path.append(os.getcwd())
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except packaged_configs.UsageError as error:
        sys.stderr.write(f"dpp: error: {printable(str(error))}\n")
        return USAGE_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("\ndpp: stopped\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has gone, as in ``dpp configs | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    if argv is None and "torch.distributed" in sys.modules:
        from dpp_lightning.trainer.interruption import leave_gloo

        leave_gloo(code)
    return code
