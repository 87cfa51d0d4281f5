"""How the tensors of a transformers model in memory lie in the model's own files.

transformers renames, splits and joins tensors as it loads and saves: the experts of a mixture are one tensor in memory
and a matrix for each expert in the files, vision towers have other names. The form of the files is what other versions
and other engines read, and what a folder holds, so it is the canonical one. Each tensor of the files is here a tensor
in memory or a view of a part of one, so that it is read and overwritten in place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    source: str
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the source: the source itself where it is all of it, else a view without gradients."""
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
    return {**{n: place.of(tensors[place.source]) for n, place in apart.items()}, **_converted(model, rest, None)}


def _viewable(place: FilePlace, tensors: Mapping[str, Tensor]) -> bool:
    return place.size is None or tensors[place.source].is_contiguous()


def _layout(model: PreTrainedModel, tensors: Mapping[str, Tensor], conversions: Any) -> Layout:
    outlines = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    names = {id(outline): name for name, outline in outlines.items()}
    layout: Layout = {}
    for file_name, part in _converted(model, outlines, conversions).items():
        source = names.get(id(part if part._base is None else part._base))
        if source is None:
            continue
        whole = part._base is None
        layout[file_name] = (
            FilePlace(source) if whole else FilePlace(source, tuple(part.shape), part.stride(), part.storage_offset())
        )
    covered: dict[str, int] = dict.fromkeys(tensors, 0)
    for place in layout.values():
        covered[place.source] += torch.Size(place.size).numel() if place.size else tensors[place.source].numel()
    joined = {name for name, entries in covered.items() if entries != tensors[name].numel()}
    layout = {name: place for name, place in layout.items() if place.source not in joined}
    joined |= {name for name, tensor in tensors.items() if not tensor.numel() and not _placed(name, layout)}
    return {**layout, **{name: FilePlace(name) for name in joined if name not in layout}}


def _placed(source: str, layout: Layout) -> bool:
    return any(place.source == source for place in layout.values())


def _converted(model: PreTrainedModel, outlines: dict[str, Tensor], conversions: Any) -> dict[str, Tensor]:
    """transformers' own conversion to the files' form, on tensors without values; as they are where it fails."""
    from transformers.core_model_loading import revert_weight_conversion

    attributes = vars(model)
    noted, had = attributes.get(_CONVERSIONS), _CONVERSIONS in attributes
    attributes[_CONVERSIONS] = conversions
    try:
        with _KeepViews(), torch.no_grad():
            return dict(revert_weight_conversion(model, dict(outlines)))
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError):
        return outlines
    finally:
        if had:
            attributes[_CONVERSIONS] = noted
        else:
            del attributes[_CONVERSIONS]


class _KeepViews(TorchFunctionMode):
    """Inside it a part of a tensor stays a view of it where it would be copied to lie in one piece."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))


def _inside(path: str, outer: str) -> bool:
    return outer == "" or path.startswith(outer + ".")
