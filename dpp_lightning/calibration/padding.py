"""Which inputs of a layer are padding, known from the masks that the modules around it are called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

_MASKS = frozenset({"attention_mask", "decoder_attention_mask", "encoder_attention_mask"})
_TORCH_MASKS = frozenset(
    {"key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask"}
)
_STATES = frozenset({"encoder_hidden_states", "key_value_states", "memory", "query", "key"})
_TOKENS = frozenset({"labels", "decoder_input_ids"})
FROM_SAMPLES = "_get_feature_vector_attention_mask"  # of transformers' speech models: from samples to frames


@dataclass
class Padding:
    """The tokens of one batch that are no padding.

    Attributes:
        keep: true where a token counts, shape (samples, tokens).
        beside: the tensors of that leading shape that were given with the mask.
        alone: no other tensor of floating point was given with it, so that all inputs should be of these tokens.
        to_frames: gives the mask of a shorter sequence made of these tokens, from its length and the mask.
        time_major: inputs have the leading shape (tokens, samples).
    """

    keep: Tensor
    beside: tuple[Tensor, ...] = ()
    alone: bool = True
    to_frames: Callable[[int, Tensor], Tensor] | None = None
    time_major: bool = False

    def of_input(self, x: Tensor, leading: tuple[int, ...]) -> Tensor | None:
        """Which of an input's places count, of shape ``leading``; None where that is not known.

        Args:
            x: the input.
            leading: its shape without the features: (samples, tokens), the two turned round, or both in one dimension.
        """
        keep = self.keep.T if self.time_major else self.keep
        places = torch.Size(leading).numel()
        if leading in (keep.shape, (keep.numel(),)):
            return keep.reshape(leading)
        if self.alone and leading == keep.T.shape:
            return keep.T
        if places == int(keep.sum()):  # taken out before
            return torch.ones(leading, dtype=torch.bool, device=x.device)
        if self.to_frames is not None and len(leading) == 2 and leading[0] == len(keep):
            frames = self.to_frames(leading[1], self.keep.long()).bool()
            return frames if frames.shape == leading else None
        return None


@dataclass
class _Frame:
    """One module that is running.

    Attributes:
        module: it.
        padding: of its tokens; None where none is known of.
        memory: the encoder's output that its cross-attention looks at.
        memory_padding: of that.
        selected: which of the rows that were last taken out of the tokens count, shape (rows,).
    """

    module: nn.Module
    padding: Padding | None = None
    memory: Tensor | None = None
    memory_padding: Padding | None = None
    selected: Tensor | None = None


@dataclass
class RunningModules:
    """The modules that are running, outermost first, each with the padding of its tokens.

    A mask belongs to the module that is called with it and to what runs inside it. A transformers model inside
    another that is called without a mask has no padding, unless it is given the very tokens that the mask is of.
    """

    frames: list[_Frame] = field(default_factory=list)
    _parameters: dict[Any, frozenset[str]] = field(default_factory=dict)

    @contextmanager
    def followed(self, module: nn.Module) -> Iterator[None]:
        """Follow every forward of the module and its parts inside the block."""
        handles = []
        for child in module.modules():
            handles.append(child.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(child.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.frames.clear()

    def counted(self, x: Tensor, leading: tuple[int, ...]) -> tuple[Tensor | None, bool]:
        """Which places of a layer's input count.

        Args:
            x: the input of a layer that runs now.
            leading: its shape without the features.

        Returns:
            A mask of shape ``leading``, None where all count; and whether that is known.
        """
        if not self.frames:
            return None, True
        frame = self.frames[-1]
        if frame.memory is not None and _same(x, frame.memory):
            padding = frame.memory_padding
            return (None, True) if padding is None else (padding.of_input(x, leading), True)
        for padding in filter(None, (frame.padding, frame.memory_padding)):
            mask = padding.of_input(x, leading)
            if mask is not None:
                return mask, True
        rows = self._selected_rows(leading)
        padding = frame.padding
        if rows is not None or padding is None or bool(padding.keep.all()):
            return rows, True
        return None, not (padding.alone and len(leading) > 1 and leading[0] == len(padding.keep))

    @contextmanager
    def time_major(self) -> Iterator[None]:
        """Inside the block inputs have tokens before samples."""
        frame = self.frames[-1] if self.frames else None
        if frame is None or frame.padding is None:
            yield
            return
        before = frame.padding
        frame.padding = replace(before, time_major=True)
        try:
            yield
        finally:
            frame.padding = before

    def counted_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Row numbers that an embedding looks up, and a mask of their shape of those that count; None where all do.

        Positions that are given once for all samples are repeated for each.
        """
        padding = self.frames[-1].padding if self.frames else None
        if padding is not None and tokens.shape in ((1, padding.keep.shape[1]), padding.keep.shape[1:]):
            return tokens.expand(padding.keep.shape), padding.keep
        return tokens, self.counted(tokens, tuple(tokens.shape))[0]

    def select(self, x: Tensor, rows: Any) -> None:
        """Note that rows are taken out of a tensor, such as the tokens of one expert."""
        if not self.frames or not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype != torch.int64:
            return
        frame = self.frames[-1]
        if frame.padding is not None and x.dim() == 2 and len(x) == frame.padding.keep.numel():
            mask = frame.padding.of_input(x, (len(x),))
            frame.selected = None if mask is None else mask.to(rows.device)[rows]

    def turn_round(self, tokens: Tensor) -> None:
        """Note from an embedding's tokens whether the model puts tokens before samples, where both are as many."""
        padding = self.frames[-1].padding if self.frames else None
        if padding is None or tokens.dim() != 2 or tokens.shape != padding.keep.shape:
            return
        given = [t for t in padding.beside if t.shape == tokens.shape and not t.is_floating_point()]
        if any(torch.equal(t, tokens) for t in given):
            return
        padding.time_major |= any(torch.equal(t.T, tokens) for t in given)

    def _selected_rows(self, leading: tuple[int, ...]) -> Tensor | None:
        for frame in reversed(self.frames):
            if frame.selected is not None and frame.selected.shape == leading:
                return frame.selected
        return None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer = self.frames[-1] if self.frames else _Frame(module)
        frame = _Frame(module, outer.padding, outer.memory, outer.memory_padding)
        given = self._given(module, args, kwargs)
        if hasattr(type(module), "main_input_name") or given:
            _set_tokens(frame, outer, given, [*args, *kwargs.values()])
            _set_memory(frame, outer, given)
        self.frames.append(frame)

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        while self.frames and self.frames.pop().module is not module:
            pass  # modules whose forward was left by an error that was caught

    def _given(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments that say something of padding, by name; an absent one is None."""
        forward = module.forward
        key = getattr(forward, "__func__", forward)
        if key not in self._parameters:
            try:
                names = frozenset(inspect.signature(forward).parameters)
            except (TypeError, ValueError):
                names = frozenset()
            telling = names & (_MASKS | _TORCH_MASKS | {"encoder_hidden_states", "key_value_states"})
            self._parameters[key] = names & (_MASKS | _TORCH_MASKS | _STATES | _TOKENS) if telling else telling
        known = self._parameters[key]
        if not known:
            return {}
        try:
            bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
        except TypeError:  # the call will fail
            return {}
        return {name: bound.get(name) for name in known}


def _set_tokens(frame: _Frame, outer: _Frame, given: Mapping[str, Any], values: list[Any]) -> None:
    """The padding of a module's own tokens."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    mask, encoder_decoder = given.get("attention_mask"), "decoder_input_ids" in given
    if encoder_decoder:
        mask, labels = given.get("decoder_attention_mask"), given.get("labels")
        if mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
            mask = labels != -100
    keep, tokens_first = _keep(mask), False
    for name in ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask"):  # of torch: true is padding
        hidden = None if name == "key_padding_mask" and not _attends_to_itself(given) else given.get(name)
        if keep is None and isinstance(hidden, Tensor) and hidden.dim() == 2:
            keep = hidden == 0
            tokens_first = any(getattr(child, "batch_first", True) is False for child in frame.module.modules())
    if keep is not None:
        frame.padding = _padding(frame.module, keep, tensors, time_major=tokens_first)
    elif encoder_decoder:
        frame.padding = None
    elif mask is None and hasattr(type(frame.module), "main_input_name") and outer.padding is not None:
        same_tokens = any(_same(t, known) for t in tensors for known in outer.padding.beside)
        if not same_tokens and given.get("encoder_hidden_states") is None:
            frame.padding = None


def _set_memory(frame: _Frame, outer: _Frame, given: Mapping[str, Any]) -> None:
    """The encoder's output that a module is given, and its padding."""
    for states, mask in (
        ("encoder_hidden_states", "encoder_attention_mask"),
        ("key_value_states", ""),
        ("memory", "memory_key_padding_mask"),
        ("key", "key_padding_mask"),
    ):
        memory = given.get(states)
        if not isinstance(memory, Tensor) or (states == "key" and _attends_to_itself(given)):
            continue
        hidden = given.get(mask)
        keep = _keep(hidden)
        if keep is not None:
            keep = ~keep if mask in _TORCH_MASKS else keep
            frame.memory_padding = _padding(frame.module, keep, [memory])
        elif mask in given and hidden is None and outer.memory is None:
            frame.memory_padding = None
        frame.memory = memory


def _attends_to_itself(given: Mapping[str, Any]) -> bool:
    query, key = given.get("query"), given.get("key")
    return key is None or (isinstance(query, Tensor) and isinstance(key, Tensor) and _same(query, key))


def _padding(module: nn.Module, keep: Tensor, tensors: list[Tensor], *, time_major: bool = False) -> Padding | None:
    if not bool(keep.any()):  # no mask of tokens, whatever it is
        return None
    beside = tuple(t for t in tensors if t.shape[:2] in (keep.shape, keep.T.shape))
    alone = not any(t.is_floating_point() and t.shape[:2] not in (keep.shape, keep.T.shape) for t in tensors)
    return Padding(keep, beside, alone, getattr(module, FROM_SAMPLES, None), time_major)


def _keep(mask: Any) -> Tensor | None:
    """A mask of two dimensions as booleans: 1 and true are tokens; of one that is added to scores, what it leaves."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    additive = mask.is_floating_point() and bool((mask < 0).any())
    return mask >= 0 if additive else mask != 0


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one in memory."""
    if a is b:
        return True
    try:
        return a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr() and a.numel() > 0
    except RuntimeError:  # a tensor without memory of its own
        return False
