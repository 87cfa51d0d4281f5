"""What training with AdamR takes on each device, and what the callback moves, computed from a model's size.

Plain arithmetic, without torch. Counted is what follows from the number of parameters: weights, gradients, Adam's two
moments, θ0, and the layers that FSDP2 has whole at a time. Activations, logits, the allocator's own losses, scratch of
the optimizer's step (one more shard for ``norm="l1"`` on a GPU, none for L2), amsgrad's third moment and numbers of
which a tensor has one (8 bytes) are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import ceil, floor, isfinite
from types import MappingProxyType
from typing import Literal, NamedTuple

from dpp_lightning.storage.safe_text import markdown_text
from dpp_lightning.tensors.blocks import block_of

Dtype = Literal["float32", "bfloat16"]

GIB = 2**30
BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2})
GATHERS = 4  # of all weights once in a run: theta_0 three times and theta once, for their fingerprints
LOOKS = 3  # at the delta, for one pruned model whose entries a selection ranks together
READS = 3  # of the kept entries of one pruned model: theta and theta_0 as it is drawn, theta_0 as it is applied


class ModelShape(NamedTuple):
    """A model's size.

    Attributes:
        parameters: of the whole model.
        blocks: numbered blocks, such as a decoder's layers.
        outside: parameters in no block: embeddings, a head that is not tied to them.
        unit: parameters of the largest block; None where all blocks are of one size.
    """

    parameters: float
    blocks: int
    outside: float = 0
    unit: float | None = None


MODELS: Mapping[str, ModelShape] = MappingProxyType(
    {  # outside: Qwen2-0.5B's tied vocabulary of 151,936; Llama-2's vocabulary of 32,000, twice
        "0.5 B": ModelShape(0.5e9, 24, 151_936 * 896),
        "7 B": ModelShape(7e9, 32, 2 * 32_000 * 4096),
        "13 B": ModelShape(13e9, 40, 2 * 32_000 * 5120),
        "70 B": ModelShape(70e9, 80, 2 * 32_000 * 8192),
    }
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, all of them, whole numbers >= 0; the first five on the fullest device.

    Attributes:
        weights, gradients, moments, theta0: this device's share.
        gathered: at most, of layers held whole beside the shares; 0 on one device.
        callback_once: that every device receives once in a run of the callback, for fingerprints; 0 on one device, as
            the two below.
        callback_look: that every device receives for one look at the delta.
        callback_kept: that every device receives for the kept entries of one pruned model.
    """

    weights: int
    gradients: int
    moments: int
    theta0: int
    gathered: int
    callback_once: int
    callback_look: int
    callback_kept: int

    @property
    def total(self) -> int:
        """Bytes on a device at the peak of the backward pass, without activations."""
        return self.weights + self.gradients + self.moments + self.theta0 + self.gathered

    @property
    def callback_ranked(self) -> int:
        """Bytes that every device receives for one pruned model of a selection that looks at the delta three times."""
        return LOOKS * self.callback_look + self.callback_kept


def plan_memory(
    parameters: float,
    devices: int,
    *,
    weights: Dtype = "float32",
    theta0: Dtype | None = None,
    compute: Dtype | None = None,
    blocks: int = 1,
    outside: float = 0,
    unit: float | None = None,
    pruning_rate: float = 0.99,
) -> MemoryPlan:
    """Plan full fine-tuning with AdamR, every parameter trained, under FSDP2 with ``fully_shard`` on each block.

    Of weights, gradients, both moments and θ0 a device holds one share in ``devices``; where first dimensions do not
    divide, the fullest holds up to a row of each tensor more. Beside it are whole, in the backward pass: the block at
    work, the next one, the block's gradient, and the last block's gradient in the reduce-scatter; and of the root unit,
    which is not released, parameters and gradient. (``FSDPMemTracker`` of torch 2.15 finds the same peak for two blocks
    and for six, in either dtype.) On one device the model is taken as plain, and nothing is gathered.

    θ0 in bfloat16 beside float32 weights is AdamR's ``pretrained_dtype``. It is exact where the base was published in
    bfloat16; any other puts an error of up to |θ0| / 256 on what the decay pulls toward. The callback then keeps a θ0
    of its own in the weights' dtype, which is not counted; nor is, on a GPU, one parameter's shard that L2 casts.

    The callback's numbers are what every device receives in collectives. A gather brings it (N - 1) / N of the whole;
    where a tensor's first dimension does not divide, less than N - 1 of its rows more. In a run θ0 is gathered three
    times (before training, for the rows' identity, for the deltas) and θ once, in the weights' dtype; carried tensors
    are left out of θ0, and gathered for every pruned model instead. A selection by seed gathers nothing else. One by
    rank gathers the delta in float32 at each look: one for a pruned model where entries are counted in each tensor (and
    three more for a large tensor whose first entries tell too little of the rest), three with ``budget="model"`` and
    with ``importance``; a fourth with ``importance`` where some 0 < |delta| < 2**-133; at the blocks' linear maps two
    more with ``owl``, four with ``dp``.
    The kept values are summed over the devices, which in a ring brings each 2 (N - 1) / N of their bytes: for θ and θ0
    as the model is drawn (θ0 alone with ``importance``, twice with ``struct-dare``), and for θ0 whenever it is applied:
    once to be scored, as counted, once more for every number that a search tries. Positions are never sent. Not counted
    are fits by layer or partition, and the forward passes that score a model. Under DDP nothing is moved.

    Of memory the callback takes, on every device, one whole tensor at a time, at most the largest parameter in float32,
    and what the delta at hand keeps and carries; on the host the kept positions (int32).

    Args:
        parameters: of the model, > 0.
        devices: N that the model is sharded over, >= 1; no replicas.
        weights: dtype of parameters, gradients, moments and kept values.
        theta0: dtype of θ0; None that of the weights.
        compute: dtype of gathered blocks and of their gradients before the reduce-scatter: ``param_dtype`` of
            ``MixedPrecisionPolicy``; None that of the weights, as without a policy (``bf16-mixed`` sets none).
            Gradients are reduced in the weights' dtype.
        blocks: that ``fully_shard`` was called on, >= 1.
        outside: parameters in no block, which are the root unit's, in [0, parameters).
        unit: parameters of the largest block; None (parameters - outside) / blocks.
        pruning_rate: p in [0, 1), the fraction dropped.

    Raises:
        ValueError: a value outside its range or an unknown dtype.
    """
    _check(parameters, devices, blocks, outside, unit, pruning_rate)
    size, size0, size_whole = (_bytes(weights if name is None else name) for name in (weights, theta0, compute))
    entries = ceil(parameters)
    share, others = -(-entries // devices), devices - 1
    largest = ceil((parameters - outside) / blocks if unit is None else unit)
    whole = size_whole * (min(blocks, 3) * largest + 2 * ceil(outside)) + size * largest
    kept = entries - floor(Fraction(str(pruning_rate)) * entries)
    return MemoryPlan(
        weights=share * size,
        gradients=share * size,
        moments=2 * share * size,
        theta0=share * size0,
        gathered=whole if devices > 1 else 0,
        callback_once=GATHERS * others * share * size,
        callback_look=others * share * BYTES["float32"],
        callback_kept=READS * 2 * others * -(-kept // devices) * size,
    )


def shape_of(entries: Mapping[str, int]) -> ModelShape:
    """A model's size from its tensors.

    Args:
        entries: name to number of entries of every tensor, tied ones once. A model whose names have no numbered blocks
            counts as one block.
    """
    blocks: dict[str, int] = {}
    outside = 0
    for name, count in entries.items():
        block = block_of(name)
        if block is None:
            outside += count
        else:
            blocks[block] = blocks.get(block, 0) + count
    if not blocks:
        return ModelShape(outside, 1)
    return ModelShape(outside + sum(blocks.values()), len(blocks), outside, max(blocks.values()))


def fewest_devices(
    shape: ModelShape,
    device_gib: float,
    *,
    weights: Dtype = "float32",
    theta0: Dtype | None = None,
    compute: Dtype | None = None,
    most: int = 1024,
) -> int | None:
    """The least number of devices on each of which what :func:`plan_memory` counts stays within a memory.

    Args:
        shape: of the model.
        device_gib: memory of one device in GiB, > 0.
        weights, theta0, compute: as in :func:`plan_memory`.
        most: devices tried at most.

    Returns:
        None where ``most`` devices are not enough: what is gathered does not shrink with their number.

    Raises:
        ValueError: as :func:`plan_memory`, or a memory that is not above 0.
    """
    if not device_gib > 0:
        raise ValueError(f"device_gib is the memory of a device in GiB, above 0, such as 80; got {device_gib!r}")
    parameters, blocks, outside, unit = shape
    plan = partial(plan_memory, parameters, weights=weights, theta0=theta0, compute=compute, blocks=blocks)
    fitting = (n for n in range(1, most + 1) if plan(n, outside=outside, unit=unit).total <= device_gib * GIB)
    return next(fitting, None)


def table(
    models: Mapping[str, ModelShape] = MODELS,
    devices: Sequence[int] = (1, 8, 64),
    *,
    weights: Dtype = "float32",
    compute: Dtype | None = None,
    pruning_rate: float = 0.99,
) -> str:
    """The plans as a Markdown table in GiB, a row for every model on every number of devices, θ0 in both dtypes.

    Args:
        models: label to size.
        devices: numbers of devices.
        weights, compute, pruning_rate: as in :func:`plan_memory`.

    Raises:
        ValueError: as :func:`plan_memory`.
    """
    head = (
        "| model | devices | weights | gradients | Adam's moments | θ0, float32 / bfloat16 | gathered "
        "| **total**, θ0 float32 / bfloat16 | callback: received once a run | a pruned model, by seed / by rank |"
    )
    lines = [head, "|---" * 10 + "|"]
    for label, (parameters, blocks, outside, unit) in models.items():
        for count in devices:
            plan = partial(plan_memory, parameters, count, weights=weights, compute=compute, blocks=blocks)
            wide, narrow = (
                plan(theta0=theta0, outside=outside, unit=unit, pruning_rate=pruning_rate)
                for theta0 in ("float32", "bfloat16")
            )
            lines.append(f"| {markdown_text(label)} | {count} | {' | '.join(_cells(wide, narrow))} |")
    return "\n".join(lines)


def _cells(wide: MemoryPlan, narrow: MemoryPlan) -> list[str]:
    """The numbers of a row in GiB, from the plans with θ0 in float32 and in bfloat16."""
    return [
        *(_gib(size) for size in (wide.weights, wide.gradients, wide.moments)),
        f"{_gib(wide.theta0)} / {_gib(narrow.theta0)}",
        _gib(wide.gathered),
        f"**{_gib(wide.total)}** / {_gib(narrow.total)}",
        _gib(wide.callback_once),
        f"{_gib(wide.callback_kept)} / {_gib(wide.callback_ranked)}",
    ]


def _check(
    parameters: float, devices: int, blocks: int, outside: float, unit: float | None, pruning_rate: float
) -> None:
    """Raise ValueError for a number outside its range."""
    if not (parameters > 0 and isfinite(parameters)):
        raise ValueError(f"parameters must be a finite number above 0, got {parameters!r}")
    for name, count in (("devices", devices), ("blocks", blocks)):
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, got {count!r}")
    if not 0 <= outside < parameters:
        raise ValueError(f"outside must be in [0, {parameters:g}), a part of the parameters, got {outside!r}")
    if unit is not None and not 0 < unit <= parameters - outside:
        raise ValueError(f"unit must be in (0, {parameters - outside:g}], the parameters of one block, got {unit!r}")
    if not 0 <= pruning_rate < 1:
        raise ValueError(f"pruning_rate is the fraction dropped, in [0, 1); got {pruning_rate!r}")


def _bytes(dtype: str) -> int:
    """Bytes of one entry."""
    if dtype not in BYTES:
        raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got {dtype!r}")
    return BYTES[dtype]


def _gib(size: int) -> str:
    """Three digits of a number of bytes, in GiB."""
    number = size / GIB
    places = 0 if number >= 100 else 1 if number >= 10 else 2
    return f"{number:,.{places}f}" if size else "0"
