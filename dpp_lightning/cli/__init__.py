"""The console command ``dpp``. Nothing heavy is imported before a command is known that needs it."""

from dpp_lightning.cli.commands import main

__all__ = ["main"]
