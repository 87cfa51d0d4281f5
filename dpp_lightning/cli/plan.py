"""``dpp plan``: what training a model with AdamR takes on each device, and what the callback moves between them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, get_args

from dpp_lightning.analysis.memory_plan import MODELS, Dtype, ModelShape, fewest_devices, shape_of, table
from dpp_lightning.cli.command import FunctionCommand, say
from dpp_lightning.storage.locate import hub_id, local_path
from dpp_lightning.tensors.blocks import is_buffer_name

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})  # of safetensors


def plan_devices(
    model: str | None = None,
    *,
    revision: str | None = None,
    parameters: float | None = None,
    blocks: int = 1,
    outside: float = 0.0,
    devices: Sequence[int] = (1, 8, 64),
    device_gib: float | None = None,
    weights: Dtype = "float32",
    compute: Dtype | None = None,
    pruning_rate: float = 0.99,
) -> None:
    """Print what full fine-tuning with AdamR takes on each device, and what DeltaPruneCallback moves between them.

    A table in GiB with a row for each number of devices, sharded by FSDP2, with the base's weights θ0 in float32 and in
    bfloat16. Counted are weights, gradients, Adam's moments, θ0 and the layers that are whole at a time; activations,
    logits and what the allocator wastes are not. Without a model, decoders of four sizes are shown.

    Args:
        model: a folder, a file or a hub id, of which only the names and shapes of the tensors are read
        revision: branch, tag or commit where the model is a hub id
        parameters: size of a model that is not at hand, such as 7e9
        blocks: numbered blocks of that model, each of which is sharded as a unit
        outside: parameters of that model in no block, such as its embeddings
        devices: numbers of devices, each a row
        device_gib: memory of one device in GiB; also say how many such devices are needed at least
        weights: dtype of weights, gradients, moments and kept values
        compute: dtype of gathered layers; null for that of the weights
        pruning_rate: fraction dropped, in [0, 1), for what the callback moves
    """
    if model is not None and parameters is not None:
        raise ValueError("give MODEL or --parameters, not both: a model's size is read from its tensors")
    if parameters is None and (blocks, outside) != (1, 0.0):
        raise ValueError("--blocks and --outside are of a model that is given by --parameters alone")
    if model is None and revision is not None:
        raise ValueError("--revision is of a MODEL that is a hub id, and there is none")
    if model is not None:
        models = {local_path(model).resolve().name: _read_shape(model, revision)}
    elif parameters is not None:
        models = {f"{parameters / 1e9:.3g} B": ModelShape(parameters, blocks, outside)}
    else:
        models = dict(MODELS)
    rows = table(models, devices, weights=weights, compute=compute, pruning_rate=pruning_rate)
    needed = [] if device_gib is None else [_needed(*model, device_gib, weights, compute) for model in models.items()]
    sys.stdout.write(rows + "\n")
    for line in needed:
        say(line)


COMMAND = FunctionCommand(
    plan_devices,
    example="dpp plan Qwen/Qwen2-0.5B --devices 1 2 4 --device_gib 24",
    groups={"the model": "revision", "the devices": "devices", "the training": "weights"},
)


def _needed(label: str, shape: ModelShape, device_gib: float, weights: Dtype, compute: Dtype | None) -> str:
    """How many devices of a memory are needed at least, θ0 in either dtype."""
    dtypes: tuple[Dtype, ...] = get_args(Dtype)
    counts = [fewest_devices(shape, device_gib, weights=weights, theta0=theta0, compute=compute) for theta0 in dtypes]
    shown = " / ".join(str(count) if count else "more than any number" for count in counts)
    return f"{label}: devices of {device_gib:g} GiB at least, θ0 {' / '.join(dtypes)}, before activations: {shown}"


def _read_shape(model: str, revision: str | None) -> ModelShape:
    """A model's size from the headers of its files, of a hub id without fetching the weights.

    Raises:
        FileNotFoundError: no such file or folder, nor such a repository of the hub.
        ConnectionError: the hub does not answer, and its cache does not hold the model.
        ValueError: files that cannot be read.
    """
    repo_id = hub_id(model)
    files = None if repo_id is None else _headers(repo_id, revision)
    if files is not None:
        infos = {name: info for file in files for name, info in file.tensors.items()}
        trained = {n: info for n, info in infos.items() if info.dtype in _FLOATS and not _is_buffer(n, info.shape)}
        return shape_of({name: info.parameter_count for name, info in trained.items()})
    from dpp_lightning.storage.checkpoints import load_tensors
    from dpp_lightning.storage.source_kind import check_model

    check_model(model, "MODEL", revision)

    tensors = {name: tensor for name, tensor in load_tensors(model, revision).items() if tensor.is_floating_point()}
    return shape_of({name: t.numel() for name, t in tensors.items() if not _is_buffer(name, t.shape)})


def _is_buffer(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of floats is no parameter: known by its name, or a mask of GPT-2's older files."""
    return is_buffer_name(name) or (name.endswith("attn.bias") and len(shape) == 4)


def _headers(repo_id: str, revision: str | None) -> list[Any] | None:
    """The headers of a repository's safetensors files; None where the files themselves are to be read: from the cache,
    as the hub does not answer, or since they are PyTorch's."""
    from huggingface_hub import get_safetensors_metadata, is_offline_mode
    from huggingface_hub.errors import NotASafetensorsRepoError

    from dpp_lightning.storage.hub import plain_errors

    if is_offline_mode():
        return None
    try:
        with plain_errors(revision):
            return list(get_safetensors_metadata(repo_id, revision=revision).files_metadata.values())
    except (ConnectionError, FileNotFoundError, PermissionError, NotASafetensorsRepoError):
        return None  # the search for the files raises the error
