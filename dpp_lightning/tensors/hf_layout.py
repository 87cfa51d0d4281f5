"""How the tensors of a transformers model in memory lie in the model's own files.

transformers renames, splits and joins tensors as it loads and saves: the experts of a mixture are one tensor in memory
and a matrix for each expert in the files, vision towers have other names. The form of the files is what other versions
and other engines read, and what a folder holds, so it is the canonical one. Each tensor of the files is here a tensor
in memory or a view of a part of one, so that it is read and overwritten in place; or several of them one after the
other, where the files hold query, key and value as one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONVERSIONS = "_weight_conversions"  # transformers notes there what it did to the tensors as it loaded them
_MOST_LAYOUTS = 4  # of one model that are remembered: fresh and as loaded, before and after its vocabulary grew


@dataclass(frozen=True)
class FilePlace:
    """Where a tensor of the files lies in memory.

    Attributes:
        source: name in memory.
        size, stride, offset: of the part, in entries of the source, which is contiguous; None for all of it.
        more: further tensors in memory, whose rows follow.
    """

    source: str
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    offset: int = 0
    more: tuple[FilePlace, ...] = ()

    @property
    def pieces(self) -> tuple[FilePlace, ...]:
        """This place without the further ones, and those."""
        return (replace(self, more=()), *self.more) if self.more else (self,)

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the source, without further ones: the source itself where it is all of it, else a view of it
        without gradients."""
        if self.size is None or self.stride is None:
            return tensor
        tensor = tensor.detach()
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


Layout = dict[str, FilePlace]  # name in the files to where it lies
_layouts: WeakKeyDictionary[nn.Module, dict[Any, Layout]] = WeakKeyDictionary()


def transformers_models(module: nn.Module) -> dict[str, PreTrainedModel]:
    """Path to each outermost model of transformers inside a module, the module itself (path "") included."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # where transformers was never imported no module is a model of it
        return {}
    found: dict[str, PreTrainedModel] = {}
    for path, child in module.named_modules():
        if isinstance(child, modeling.PreTrainedModel) and not any(_inside(path, outer) for outer in found):
            found[path] = child
    return found


def file_layout(model: PreTrainedModel, tensors: Mapping[str, Tensor], *, as_loaded: bool = False) -> Layout:
    """Under which names, and as which parts, a model's tensors stand in its files.

    Args:
        model: gives the conversions.
        tensors: the model's names, without those of wrappers, to its tensors, each tied one once.
        as_loaded: as ``save_pretrained`` would write them, which keeps old spellings of the files that the model was
            loaded from. Otherwise as a model of this class is written that was never loaded, so that the names do not
            depend on where it came from.

    Returns:
        Name in the files to place, in no particular order. A tensor that the files hold joined with others, or in an
        order of its entries that is no view, stands under its name in memory, which transformers loads as well.
    """
    conversions = getattr(model, _CONVERSIONS, None) if as_loaded else None
    key = (as_loaded, id(conversions), tuple((name, tensor.shape) for name, tensor in tensors.items()))
    remembered = _layouts.setdefault(model, {})
    if key not in remembered:
        if len(remembered) >= _MOST_LAYOUTS:
            remembered.clear()
        remembered[key] = _layout(model, tensors, conversions)
    return remembered[key]


def file_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as they stand in its files, for reading.

    Args:
        model: gives the conversions; its own tensors may be without values.
        tensors: the model's names to tensors, each tied one once.

    Returns:
        Name in the files to tensor: the tensor itself, a view of a part, or a copy of what the files hold joined.
    """
    layout = file_layout(model, tensors)
    apart = {name: place for name, place in layout.items() if name != place.source and _viewable(place, tensors)}
    sources = {place.source for place in apart.values()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in sources}
    converted = _converted(model, rest, None, _KeepViews())
    return {**{n: place.of(tensors[place.source]) for n, place in apart.items()}, **converted}


def _viewable(place: FilePlace, tensors: Mapping[str, Tensor]) -> bool:
    return not place.more and (place.size is None or tensors[place.source].is_contiguous())


def _layout(model: PreTrainedModel, tensors: Mapping[str, Tensor], conversions: Any) -> Layout:
    outlines = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    names = {id(outline): name for name, outline in outlines.items()}
    mode = _KeepViews()
    layout: Layout = {}
    for file_name, part in _converted(model, outlines, conversions, mode).items():
        parts = mode.joined.get(id(part), [part])
        pieces = [place for place in (_place(piece, names) for piece in parts) if place is not None]
        if len(pieces) == len(parts):
            layout[file_name] = replace(pieces[0], more=tuple(pieces[1:]))
    covered: dict[str, int] = dict.fromkeys(tensors, 0)
    for place in (piece for whole in layout.values() for piece in whole.pieces):
        covered[place.source] += tensors[place.source].numel() if place.size is None else torch.Size(place.size).numel()
    unknown = {name for name, entries in covered.items() if entries != tensors[name].numel()}
    layout = {n: whole for n, whole in layout.items() if not unknown & {piece.source for piece in whole.pieces}}
    placed = {piece.source for whole in layout.values() for piece in whole.pieces}
    return {**layout, **{name: FilePlace(name) for name in tensors if name not in placed}}


def _place(part: Tensor, names: Mapping[int, str]) -> FilePlace | None:
    """Where a part lies, of outlines whose names are known by identity; None for what is no view of one."""
    if part._base is None:
        return FilePlace(names[id(part)]) if id(part) in names else None
    source = names.get(id(part._base))
    return FilePlace(source, tuple(part.shape), part.stride(), int(part.storage_offset())) if source else None


def _converted(
    model: PreTrainedModel, tensors: dict[str, Tensor], conversions: Any, mode: _KeepViews
) -> dict[str, Tensor]:
    """transformers' own conversion to the files' form; as they are where it fails."""
    from transformers.core_model_loading import revert_weight_conversion

    attributes = vars(model)
    noted, had = attributes.get(_CONVERSIONS), _CONVERSIONS in attributes
    attributes[_CONVERSIONS] = conversions
    try:
        with mode, torch.no_grad():
            return dict(revert_weight_conversion(model, dict(tensors)))
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError):
        return tensors
    finally:
        if had:
            attributes[_CONVERSIONS] = noted
        else:
            del attributes[_CONVERSIONS]


class _KeepViews(TorchFunctionMode):
    """Inside it a part of a tensor stays a view of it where it would be copied to lie in one piece.

    Attributes:
        joined: identity of a tensor to the tensors whose rows it was joined of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.joined: dict[int, list[Tensor]] = {}
        self._alive: list[Tensor] = []  # so that no identity is given twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.cat and (args[1:] or (kwargs or {}).get("dim", 0)) in ((0,), 0, ()):
            self.joined[id(result)] = list(args[0])
            self._alive.append(result)
        return result


def _inside(path: str, outer: str) -> bool:
    return outer == "" or path.startswith(outer + ".")
