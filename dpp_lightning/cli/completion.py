"""``dpp completion``: a shell's script that completes commands, options and choices."""

from __future__ import annotations

import sys
from pkgutil import resolve_name
from typing import Literal

from jsonargparse import ArgumentParser

from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.command import FunctionCommand


def print_completion(shell: Literal["bash", "zsh", "tcsh"] = "bash") -> None:
    """Print a script that completes the commands of dpp, their options and the choices of these.

    Of the commands that train and score (fit, validate, test, predict, sweep) the names of the packaged recipes are
    completed; their other options are those of the classes that a recipe names. Needs pip install
    'dpp_lightning[completion]'.

    Args:
        shell: bash, zsh or tcsh
    """
    from dpp_lightning.cli.commands import COMMANDS

    parser = ArgumentParser("dpp", description="Delta parameter pruning for fine-tuned models.")
    subcommands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        if command.takes_recipes:
            subparser = ArgumentParser(f"dpp {name}")
            subparser.add_argument("--config", choices=packaged_configs.names(), help="a recipe or a YAML file")
            subparser.add_argument("--ckpt_path", type=str, help="a checkpoint")
        else:
            function_command: FunctionCommand = resolve_name(command.entry.removesuffix(".run"))
            subparser = function_command.parser(name)
        subcommands.add_subcommand(name, subparser, help=command.summary)
    try:
        sys.stdout.write(parser.get_completion_script(f"shtab-{shell}"))
    except ValueError as error:
        raise ValueError(f"{error} pip install 'dpp_lightning[completion]'") from error


COMMAND = FunctionCommand(
    print_completion,
    example="dpp completion bash > ~/.local/share/bash-completion/completions/dpp",
)
