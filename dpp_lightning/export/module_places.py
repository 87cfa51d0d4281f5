"""Where a model holds a module, beside its name: what replaces the module under its name is not seen there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def shared_modules(model: nn.Module) -> frozenset[str]:
    """Names of the modules that lie in several places of a model, or have a parameter that another one has too.

    Args:
        model: with its weights tied, also on the meta device.
    """
    modules = dict(model.named_modules())
    places = Counter(id(child) for module in modules.values() for child in module.children())
    holders = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    return frozenset(
        name
        for name, module in modules.items()
        if (own := list(module.parameters(recurse=False)))
        and (places[id(module)] > 1 or any(holders[id(p)] > 1 for p in own))
    )


def replaceable(model: nn.Module, path: str) -> str:
    """The module itself, or the outermost one around it that keeps it, or a part of it, in a plain list too.

    A forward pass over such a list sees nothing of what peft puts in the module's place.

    Args:
        model: has the module.
        path: name of the module.
    """
    names, parts = path.split("."), set(model.get_submodule(path).modules())
    for depth in range(len(names)):
        outer = ".".join(names[:depth])
        if any(module in parts for module in _in_lists(model.get_submodule(outer))):
            return replaceable(model, outer) if outer else outer
    return path


def _in_lists(module: nn.Module) -> Iterator[nn.Module]:
    for name, value in vars(module).items():
        if name != "_modules" and isinstance(value, list | tuple | dict):
            items = value.values() if isinstance(value, dict) else value
            yield from (item for item in items if isinstance(item, nn.Module))
