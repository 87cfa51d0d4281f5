"""Quantised weights, told by what they consist of: codes in integers or eight-bit floats, with scales beside them.

Codes are not weights: their differences mean nothing, and a float that is made of them is off by the scale. Floating
point weights never look so, whatever their names: a scale without codes is a plain tensor here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dpp_lightning.tensors.shards import is_dtensor, local_tensor

SHOWN = 3  # names in a message
_PACKED = frozenset({torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32})
_ORDINARY = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint64, torch.bool}
)
_SCALES = torch.float8_e8m0fnu  # powers of two, of blocks of codes

# Of a tensor that is beside the codes the end of its name, then the end of the name of its codes, then the scheme.
# Of several rows that fit the first counts.
_COMPANIONS = (
    (".SCB", ".weight", "bitsandbytes int8"),
    (".weight_format", ".weight", "bitsandbytes int8"),
    (".quant_state.bitsandbytes__nf4", "", "bitsandbytes nf4"),
    (".quant_state.bitsandbytes__fp4", "", "bitsandbytes fp4"),
    (".absmax", "", "bitsandbytes 4-bit"),
    (".quant_map", "", "bitsandbytes 4-bit"),
    (".g_idx", ".qweight", "GPTQ"),
    (".qzeros", ".qweight", "AWQ"),
    (".dqweight", ".qweight", "FP-Quant"),
    (".codebooks", ".codes", "AQLM"),
    (".centroids.weight", ".indices", "VPTQ"),
    (".centroids", ".indices", "VPTQ"),
    (".weight_scales", ".weight", "EETQ int8"),
    (".meta", ".W_q", "HQQ or SINQ"),
    (".scale", ".W_q", "HQQ"),
    (".q_scale", ".q_weight", "EXL2"),
    (".suh", ".trellis", "EXL3"),
    (".SU", ".Qidxs", "QuIP#"),
    (".s", ".B", "Marlin"),
    (".row_offsets", ".dense_weights", "SpQR"),
    (".tables2", ".weight", "HIGGS"),
    (".qbiases", ".weight", "Metal"),
    (".biases", ".weight", "MLX"),
    (".weight_global_scale", ".weight_packed", "compressed-tensors nvfp4"),
    (".weight_shape", ".weight_packed", "compressed-tensors"),
    (".weight_scale", ".weight_packed", "compressed-tensors"),
    (".weight_scale_2", ".weight", "NVFP4"),
    (".weight_scale_inv", ".weight", "{dtype} with scales of blocks"),
    (".embedding_scale", ".embedding_quantized", "Gemma's own"),
    ("._scale", "._data", "quanto"),
    ("_scale", "_qdata", "torchao"),
    ("_scale_and_zero", "_qdata", "torchao"),
    ("_scales", "_blocks", "MXFP4"),
    ("_scale_inv", "", "{dtype} with scales of blocks"),
    ("_scale", "", "{dtype} with scales"),
    ("_scales", "", "{dtype} with scales"),
    (".scales", ".weight", "{dtype} with scales"),
    (".scale", ".weight", "{dtype} with scales"),
    (".scale_weight", ".weight", "{dtype} with scales"),
)
_CODES = (".qweight", ".q_weight", ".W_q", ".weight_packed", ".Qidxs", "_qdata", "._data")  # of codes and nothing else
_CURES = {
    "bitsandbytes": "load it with transformers, model.dequantize(), model.save_pretrained(FOLDER)",
    "HIGGS": "load it with transformers, model.dequantize(), model.save_pretrained(FOLDER)",
    "compressed-tensors": "from_pretrained(…, quantization_config=CompressedTensorsConfig(dequantize=True))",
    "MXFP4": "from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True))",
    "float8": "from_pretrained(…, quantization_config=FineGrainedFP8Config(dequantize=True)) where it has scales, "
    "a cast to bfloat16 where it has none",
}


class StoredForm(Protocol):
    """What is known of a tensor before its values are read: a tensor itself, or one on disk."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> Sequence[int]: ...


class QuantisedWeights(NamedTuple):
    """Weights of one scheme.

    Attributes:
        scheme: what it is called, such as ``bitsandbytes nf4``.
        names: of the tensors that hold codes, in the source's order.
    """

    scheme: str
    names: list[str]


def find_quantised(tensors: Mapping[str, StoredForm], *, declared: str | None = None) -> list[QuantisedWeights]:
    """The quantised weights among tensors, by scheme; none where all are what their dtype says.

    Args:
        tensors: name to tensor; of those on disk nothing is read.
        declared: the scheme that the model's configuration names; then packed integers are codes under any name, if
            nothing else is.
    """
    schemes, beside = _by_companions(tensors)
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        scheme = _scheme_of_class(tensor) or schemes.get(name)
        if scheme is None and name not in beside:
            scheme = _scheme_of_dtype(name, tensor)
        if scheme is not None:
            found.setdefault(scheme, []).append(name)
    if declared is not None and not found:
        for name, tensor in tensors.items():
            if tensor.dtype in _PACKED and len(tensor.shape) > 1:
                found.setdefault(f"{declared} ({_plain(tensor.dtype)})", []).append(name)
    return [QuantisedWeights(scheme, names) for scheme, names in found.items()]


def check_not_quantised(
    tensors: Mapping[str, StoredForm], where: str = "the model", *, declared: str | None = None
) -> None:
    """Refuse quantised weights.

    Args:
        tensors: name to tensor; of those on disk nothing is read.
        where: what a message calls their source.
        declared: as for :func:`find_quantised`.

    Raises:
        ValueError: one line with the source, the schemes, the number of tensors, the first names and the cure.
    """
    found = find_quantised(tensors, declared=declared)
    if not found:
        return
    listed = "; ".join(f"{len(names)} tensors in {scheme}: {first_names(names)}" for scheme, names in found)
    cures = [cure for start, cure in _CURES.items() if any(start in q.scheme for q in found)]
    dequantise = f", or dequantise it first ({'; '.join(cures)})" if cures else ""
    raise ValueError(
        f"{where} is quantised ({listed}), and codes are no weights: take the model that it was quantised from"
        f"{dequantise}"
    )


def first_names(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def _by_companions(tensors: Mapping[str, StoredForm]) -> tuple[dict[str, str], set[str]]:
    """Name of each tensor with codes to the scheme that the tensors beside it tell; and the names of those."""
    ranks: dict[str, int] = {}
    beside: set[str] = set()
    for name in tensors:
        for rank, (end, codes_end, _) in enumerate(_COMPANIONS):
            codes = name[: -len(end)] + codes_end
            if name.endswith(end) and codes in tensors and _holds_codes(tensors[codes]):
                ranks[codes] = min(ranks.get(codes, rank), rank)
                beside.add(name)
    schemes = {name: _COMPANIONS[rank][2].format(dtype=_plain(tensors[name].dtype)) for name, rank in ranks.items()}
    return schemes, beside


def _holds_codes(tensor: StoredForm) -> bool:
    return tensor.dtype in _PACKED or (_is_narrow(tensor.dtype) and tensor.dtype != _SCALES)


def _scheme_of_dtype(name: str, tensor: StoredForm) -> str | None:
    """Told by the dtype alone: narrow floats are always codes, integers where only weights or codes are named so."""
    if _is_narrow(tensor.dtype):
        return None if tensor.dtype == _SCALES else _plain(tensor.dtype)
    named_so = name.rpartition(".")[2] == "weight" or name.endswith((*_CODES, "_weight"))
    return _plain(tensor.dtype) if named_so and tensor.dtype in _PACKED and len(tensor.shape) else None


def _is_narrow(dtype: torch.dtype) -> bool:
    """Whether a dtype is there for codes alone: floats of 8 and 4 bits, integers of 1 to 7, torch's own quantised."""
    return not (dtype in _PACKED or dtype in _ORDINARY or dtype.is_complex)


def _scheme_of_class(tensor: StoredForm) -> str | None:
    """Told by a tensor's class: one of a library's own that holds codes, whatever dtype it shows."""
    if not isinstance(tensor, Tensor):
        return None
    local = local_tensor(tensor) if is_dtensor(tensor) else tensor
    kind = type(local)
    library = kind.__module__.partition(".")[0]
    # a weight of bitsandbytes is yet to be quantised until it is moved to its device
    codes = _holds_codes(local) if library == "bitsandbytes" else any(map(_holds_codes, _inner_tensors(local)))
    return f"{library} {kind.__name__}" if codes and library != "torch" else None


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor consists of whose class wraps others, at any depth."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    for name in flatten()[0] if flatten is not None else ():
        inner = getattr(tensor, name)
        if isinstance(inner, Tensor):
            yield inner
            yield from _inner_tensors(inner)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
