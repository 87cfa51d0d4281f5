"""A timm model with the weights of its base, from a local file or folder, the hub, or a file of this package."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from torch import Tensor, nn

import dpp_lightning.tasks.vision.two_layer  # noqa: F401  (the import registers the model with timm)
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.file_content import read_json
from dpp_lightning.storage.locate import hub_id, local_path, not_found
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.tasks.common.pretrained import PRETRAINED, loading
from dpp_lightning.tensors.names import without_wrappers

_FILES, _MODEL = (".safetensors", ".ckpt"), "model."


def load_model(
    model_name: str | None, pretrained: str | None, num_classes: int, model_kwargs: dict[str, Any], keep_head: bool
) -> tuple[nn.Module, list[str]]:
    """The model, and the names of its parameters that the base does not hold.

    Args:
        model_name: timm's name of the architecture; ``None`` where a hub id, or a folder's ``config.json``, has it.
        pretrained: ``.safetensors`` file, ``.ckpt`` of ``VisionModule``, folder, name of a packaged file, hub id, or
            ``None`` for a random model.
        num_classes: number of outputs of the head.
        model_kwargs: further arguments of ``timm.create_model``.
        keep_head: load the head too; otherwise it is new, drawn from torch's global generator.

    Raises:
        ValueError: an unknown architecture, or a base that cannot be read or whose tensors do not fit the architecture.
        FileNotFoundError: no such base.
    """
    file = _weights_file(pretrained)
    if pretrained is None or file is not None:
        model: Any = timm.create_model(_known_architecture(model_name), num_classes=num_classes, **model_kwargs)
        return model, [] if file is None else _load_file(model, file, keep_head)
    _check_architecture(model_name, pretrained)
    folder = local_path(pretrained)
    source = f"local-dir:{folder}" if folder.is_dir() else f"hf-hub:{pretrained}"
    with loading(pretrained, failed="does not fit the model", cure="; give the model_kwargs that it was made with"):
        # with the head of the base: then every tensor of its file must fit
        model = timm.create_model(source, pretrained=True, **model_kwargs)
    if not keep_head:
        model.reset_classifier(num_classes)
        return model, _head_parameters(model)
    if model.num_classes != num_classes:
        raise ValueError(
            f"keep_head: the head of {pretrained} has {model.num_classes} classes, but num_classes is {num_classes}; "
            "make them equal, or leave keep_head out for a new head"
        )
    return model, []


def _weights_file(pretrained: str | None) -> Path | None:
    """The file that ``pretrained`` names: a local one, else one of the package's assets; ``None`` if it names no file.

    Raises:
        FileNotFoundError: it names a file that does not exist.
        ValueError: the file is not what its suffix says.
    """
    if pretrained is None or not pretrained.endswith(_FILES) or local_path(pretrained).is_dir():
        return None
    if local_path(pretrained).is_file():
        check_model(pretrained, PRETRAINED)
        return local_path(pretrained)
    assets = Path(str(files("dpp_lightning").joinpath("assets")))
    if Path(pretrained).name == pretrained and (assets / pretrained).is_file():
        return assets / pretrained
    packaged = ", ".join(sorted(path.name for path in assets.glob("*.safetensors"))) or "none"
    raise FileNotFoundError(
        f"{not_found(pretrained, 'file', PRETRAINED, cure=False)}; the files shipped with this package are: {packaged}"
    )


def _known_architecture(model_name: str | None) -> str:
    """The name itself.

    Raises:
        ValueError: timm has no architecture of that name; the message has some that it has.
    """
    if model_name is None or not timm.is_model(model_name):
        near = timm.list_models(f"*{(model_name or 'vit').split('_')[0]}*")[:4] or timm.list_models("vit*")[:4]
        raise ValueError(f"timm has no model_name {model_name!r}; it has, for example, {', '.join(near)}")
    return model_name


def _check_architecture(model_name: str | None, pretrained: str) -> None:
    """Refuse a ``model_name`` that timm would ignore, as the folder or the hub id names another architecture.

    Raises:
        FileNotFoundError: a folder without weights or ``config.json``, or what is neither a folder nor a hub id.
        ValueError: two different names, or files that cannot be read.
    """
    folder, (repo_id, _, revision) = local_path(pretrained), pretrained.partition("@")
    if folder.is_dir():
        check_model(pretrained, PRETRAINED)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{PRETRAINED} {pretrained} has no config.json, which timm needs to know the architecture; name the "
                ".safetensors file in it and model_name, or save the folder with timm.models.save_for_hf"
            )
        check_model(pretrained, PRETRAINED, config=True)
        architecture = read_json(folder / "config.json").get("architecture")
        if architecture is None:
            raise ValueError(
                f"{PRETRAINED} {pretrained}: its config.json names no architecture of timm (a model of transformers "
                "has none); save the folder with timm.models.save_for_hf"
            )
    elif hub_id(repo_id) is None or "/" not in repo_id:
        raise FileNotFoundError(
            f"{not_found(pretrained, 'folder', PRETRAINED, cure=False)}; hub ids look like "
            "timm/vit_tiny_patch16_224.augreg_in21k"
        )
    else:
        name = pretrained.partition("@")[0].rpartition("/")[2].partition(".")[0]
        architecture = name if timm.is_model(name) else None
    if None not in (architecture, model_name) and architecture != model_name:
        raise ValueError(
            f"{PRETRAINED} {pretrained} is a {architecture}, but model_name is {model_name!r}; leave model_name out"
        )
    if not folder.is_dir():
        check_model(repo_id, PRETRAINED, revision or None, config=True)


def _load_file(model: nn.Module, file: Path, keep_head: bool) -> list[str]:
    """Load every tensor of a file into the model, its head excepted where that is new; the names of the new parameters.

    Raises:
        ValueError: tensors that are missing, left over or of another shape.
    """
    state = load_file(file) if file.suffix == ".safetensors" else _tensors_of_fit(file)
    model_state = model.state_dict()
    head = set() if keep_head else set(_head_parameters(model))
    state = {name: tensor for name, tensor in state.items() if name not in head}
    faults = [f"{name} is missing" for name in model_state if name not in state and name not in head]
    faults += [f"{name} is not in the model" for name in state if name not in model_state]
    faults += [
        f"{name} has shape {tuple(tensor.shape)}, the model's {tuple(model_state[name].shape)}"
        for name, tensor in state.items()
        if name in model_state and tensor.shape != model_state[name].shape
    ]
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise ValueError(
            f"{PRETRAINED} {file} does not fit the model: {shown}. Give the model_name and model_kwargs it was made "
            "with" + (", and its num_classes, or leave keep_head out" if keep_head else "")
        )
    model.load_state_dict(state, strict=False)
    return sorted(head)


def _tensors_of_fit(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of ``VisionModule.model`` in a checkpoint of Lightning.

    Raises:
        ValueError: it has none.
    """
    tensors = {without_wrappers(name): tensor for name, tensor in load_tensors(checkpoint).items()}
    model_state = {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    if not model_state:
        raise ValueError(
            f"{checkpoint} holds no tensors named {_MODEL}..., expected a checkpoint of VisionModule; "
            f"its names begin with {sorted(tensors)[:3]}"
        )
    return model_state


def _heads(model: nn.Module) -> tuple[str, ...]:
    """timm's names of the classifiers: one, or two in distilled models."""
    names = model.pretrained_cfg["classifier"]  # type: ignore[index, call-overload]
    return (names,) if isinstance(names, str) else tuple(names)


def _head_parameters(model: nn.Module) -> list[str]:
    heads = tuple(f"{name}." for name in _heads(model))
    return sorted(name for name, _ in model.named_parameters() if name.startswith(heads))


def layer_before_head(model: nn.Module) -> str:
    """Name of the submodule whose output goes into the head: ``fc_norm`` of a ViT, ``global_pool.flatten`` of a ResNet.

    It is the last one without children before the classifier, as timm defines modules in their order of use.
    """
    heads = _heads(model)
    modules = [(name, m) for name, m in model.named_modules() if name in heads or not list(m.children())]
    first = next(i for i, (name, _) in enumerate(modules) if name in heads)
    # the two heads of distilled models take the output of the last norm, not of the Identity in between
    skipped = (nn.Dropout, nn.Identity) if len(heads) > 1 else nn.Dropout
    return next(name for name, m in reversed(modules[:first]) if not isinstance(m, skipped))
