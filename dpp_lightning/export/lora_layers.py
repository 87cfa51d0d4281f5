"""Which modules take a LoRA layer of peft, so that the model computes with it as with the changed weight.

peft's layer stands in the place of the module: its call adds the low-rank part to the module's own output, while its
``weight`` is that of the base and its other attributes, as ``stride``, are missing. So a module takes one where its
output is linear in the weight, and where the model calls it and does nothing else with it. The latter is read from
the source of the model's classes, as far as it is known.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS = (nn.Linear, Conv1D, *CONVOLUTIONS)
_SAME = (  # have a forward of their own that is linear in the weight too
    "transformers.models.falcon.modeling_falcon.FalconLinear",
    "timm.layers.conv2d_same.Conv2dSame",
)
_NOT_COMPUTING = re.compile(r"_*(init|reset_|tie_|resize_|set_|(apply|remove)_weight_norm)")  # methods, by their names
_OF_LAYER = ("in_features", "out_features")  # that peft's layer has, beside the attributes of every module
_NO_VALUES = ("dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_meta")
_CALLERS = ("checkpoint", "_gradient_checkpointing_func")  # functions that call a module they are given
_CHANGING = ("training", "gradient_checkpointing")  # switches that are turned on and off after loading
_ANY = "[]"  # stands for an item of a container


@dataclass(frozen=True)
class Use:
    """One place where a class does something with an attribute other than to call it.

    Attributes:
        of_self: the attribute is the instance's own, rather than that of another variable.
        names: of the attributes, from the instance or variable on: ``("conv", "stride")`` of ``self.conv.stride``.
        argument: a function is given it.
        switches: attributes of the instance that must be set for the place to be reached.
    """

    of_self: bool
    names: tuple[str, ...]
    argument: bool
    switches: tuple[str, ...]

    def is_on(self, instance: nn.Module) -> bool:
        """Whether the place can be reached in an instance of the class."""
        return all(getattr(instance, switch, True) for switch in self.switches)


def takes_lora(model: nn.Module, path: str) -> bool:
    """Whether a model with peft's LoRA layer at a module computes as with the changed weight and bias.

    Args:
        model: has the module.
        path: name of the module in the model.
    """
    names = path.split(".")
    if not _is_linear_in_weight(model.get_submodule(path)):
        return False
    for depth in range(len(names)):
        owner = model.get_submodule(".".join(names[:depth]))
        if depth == len(names) - 1 and isinstance(owner, nn.MultiheadAttention):
            return False  # it computes with the weight of its out_proj
        uses = _uses(type(owner))  # type: ignore[arg-type]
        if any(use.is_on(owner) and _looks_inside(use, names[depth:]) for use in uses):
            return False
    return True


def _is_linear_in_weight(module: nn.Module) -> bool:
    """Whether peft has a layer for the module whose output is that of the sum of both weights."""
    kind = next((kind for kind in _KINDS if isinstance(module, kind)), None)
    if kind is None or is_parametrized(module):
        return False
    if isinstance(module, CONVOLUTIONS) and not _is_usual(module):
        return False
    cls = type(module)
    same = all(getattr(cls, name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
    return same or f"{cls.__module__}.{cls.__qualname__}" in _SAME


def _is_usual(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether it is as peft's A: with one group, no dilation, and padded by zeros."""
    usual = convolution.groups == 1 and convolution.padding_mode == "zeros"
    return usual and set(convolution.dilation) == {1}


def _looks_inside(use: Use, names: list[str]) -> bool:
    """Whether a use in a class is of values or attributes of the module with these names below the instance."""
    if use.of_self:
        return _begins(use.names, names) and _reads(use.names[len(names) :], argument=use.argument)
    return any(
        _begins(use.names, names[-count:]) and use.names[count] in ("weight", "bias") and _reads(use.names[count:])
        for count in range(1, min(len(use.names), len(names) + 1))
    )


def _begins(used: tuple[str, ...], names: list[str]) -> bool:
    return len(used) >= len(names) and all(u in (n, _ANY) for u, n in zip(used, names, strict=False))


def _reads(rest: tuple[str, ...], *, argument: bool = False) -> bool:
    """Whether what follows a module's name is something that peft's layer has not, or has of the base."""
    if not rest:
        return argument
    if rest[0] in ("weight", "bias"):
        return len(rest) == 1 or rest[1] not in _NO_VALUES
    return rest[0] not in _OF_LAYER and not hasattr(nn.Module, rest[0])


@cache
def _uses(cls: type[nn.Module]) -> tuple[Use, ...]:
    """All uses in the methods of a class and its parents that take part in computing; none where there is no source."""
    uses: dict[Use, None] = {}
    for parent in cls.__mro__:
        if issubclass(parent, nn.Module) and parent not in PreTrainedModel.__mro__:
            for method in _methods(parent):
                uses |= dict.fromkeys(_uses_in(method))
    return tuple(uses)


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return
    for node in ast.iter_child_nodes(tree.body[0]):
        if isinstance(node, ast.FunctionDef) and not _NOT_COMPUTING.match(node.name):
            yield node


def _uses_in(method: ast.FunctionDef) -> Iterator[Use]:
    """The uses of attributes that a method reads: those at the end of their chains, and neither called nor tested."""
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node, parent in parents.items():
        if not isinstance(node, ast.Attribute | ast.Subscript) or isinstance(node.ctx, ast.Store):
            continue
        if isinstance(parent, ast.Attribute | ast.Subscript) and parent.value is node:
            continue
        chain = _chain(node)
        if chain is None or _is_test(parent):
            continue
        given = parents[parent] if isinstance(parent, ast.keyword | ast.Starred) else parent
        argument = isinstance(given, ast.Call) and given.func is not node and _name(given.func) not in _CALLERS
        yield Use(chain[0] == "self", chain[1:], argument, tuple(_switches(node, parents)))


def _switches(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[str]:
    """The attributes of ``self`` that the conditions around a place ask for, such as ``if n > 1 and self.exact``."""
    while parent := parents.get(node):
        if isinstance(parent, ast.If) and node in parent.body:
            test = parent.test
            operands = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
            chains = [_chain(operand) for operand in operands if isinstance(operand, ast.Attribute)]
            yield from (c[1] for c in chains if c and c[0] == "self" and len(c) == 2 and c[1] not in _CHANGING)
        node = parent


def _chain(node: ast.expr) -> tuple[str, ...] | None:
    """``("self", "layers", "[]", "weight")`` of ``self.layers[0].weight``; None where it begins with no variable."""
    names: list[str] = []
    while not isinstance(node, ast.Name):
        if not isinstance(node, ast.Attribute | ast.Subscript):
            return None
        names.append(node.attr if isinstance(node, ast.Attribute) else _ANY)
        node = node.value
    return (node.id, *reversed(names))


def _is_test(node: ast.AST) -> bool:
    """Whether an expression asks what something is, not what its values are: ``is None``, ``isinstance``."""
    if isinstance(node, ast.Compare):
        return all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops)
    return isinstance(node, ast.Call) and _name(node.func) in ("isinstance", "hasattr")


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
