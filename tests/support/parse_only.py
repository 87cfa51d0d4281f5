"""A command line of ``dpp fit`` and its like, parsed by the real parser and not run."""

from functools import cache

import pytest

from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.lightning import DPPCLI


class Parsed(Exception):
    """Carries the parsed config out of the command before anything is built."""


class ParseOnly(DPPCLI):
    """The command, stopped behind its parser."""

    def before_instantiate_classes(self):
        config = self.config[self.subcommand].as_dict()
        raise Parsed({key: value for key, value in config.items() if key != "config"})  # less the name of the file


@cache
def parse(*arguments):
    """The config of a command line, which no test may change: it is parsed once."""
    with pytest.raises(Parsed) as parsed:
        ParseOnly(packaged_configs.resolve_arguments(arguments))
    return parsed.value.args[0]
