"""``dpp configs``: the packaged recipes listed, printed, or copied to be changed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.command import FunctionCommand, say


def show_configs(name: str | None = None, *, copy: bool = False, output: str = ".") -> None:
    """List the packaged recipes, print the one named, or copy it to be changed.

    A recipe is used by its name from any folder, as in dpp fit --config quickstart.yaml; a file of that name here wins.

    Args:
        name: of a recipe, with or without .yaml
        copy: write the recipe into a folder in place of printing it
        output: the folder for --copy; it is made where there is none
    """
    if name is None:
        if copy:
            raise ValueError("--copy: name the recipe to copy, such as dpp configs quickstart --copy")
        names = packaged_configs.names()
        width = max(map(len, names), default=0)
        sys.stdout.writelines(f"{name:{width}}  {packaged_configs.title(name)}".rstrip() + "\n" for name in names)
    elif copy:
        target = _copy(name, Path(output))
        say(f"{target}: change it, then dpp fit --config {shlex.quote(str(target))}")
    else:
        sys.stdout.write(packaged_configs.read(name))


COMMAND = FunctionCommand(show_configs, example="dpp configs bert_cola_adamr --copy --output recipes")


def _copy(name: str, folder: Path) -> Path:
    """The recipe's text in a new file of the folder.

    Raises:
        FileExistsError: there is a file of that name.
    """
    target = folder / packaged_configs.path(name).name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(packaged_configs.read(name))
    except FileExistsError as error:
        raise FileExistsError(
            f"{target} exists and is not overwritten: rename it, or choose another --output"
        ) from error
    return target
