"""The images that a timm model takes, made of decoded ones: torchvision's v2 transforms by the model's data config."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal

import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

Augmentation = Literal["crop", "shift", "flip"]

_CROP_AREA = (0.25, 1.0)  # fractions of the image's area
_SHIFT = 8  # a shift is at most the side divided by this: 4 pixels of 32


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data config of a model, with the size and channels that were given when the model was made.

    What timm itself returns is the config of the published weights, whatever the model's ``img_size`` and ``in_chans``.

    Returns:
        ``input_size`` (channels, height, width) in pixels; ``mean`` and ``std`` of each channel, of pixels in [0, 1];
        ``interpolation``, ``crop_pct`` and ``crop_mode``.
    """
    config = dict(resolve_model_data_config(model))
    channels, height, width = config["input_size"]
    first = model.pretrained_cfg.get("first_conv") or ()  # type: ignore[operator, union-attr]
    modules = dict(model.named_modules())
    for name in (first,) if isinstance(first, str) else first:
        channels = getattr(modules.get(name), "in_channels", channels)
    height, width = getattr(modules.get("patch_embed"), "img_size", None) or (height, width)
    for name in ("mean", "std"):
        values = config[name]
        config[name] = tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
    return {**config, "input_size": (channels, height, width)}


def make_transform(config: Mapping[str, Any], augment: Collection[Augmentation] = ()) -> Callable[[Tensor], Tensor]:
    """A function from a uint8 image (channels, any height, any width) to a normalised float image of the model's size.

    An image no larger than the model's is kept whole. A larger one loses the border that ``crop_pct`` leaves out,
    unless ``crop_mode`` is ``squash``.

    Args:
        config: as :func:`data_config` gives it.
        augment: augmentation for training. ``crop`` takes a random region of 25 to 100 % of the area, ``shift`` moves
            the image by up to an eighth of its side over a black border, ``flip`` swaps left and right half of the
            time. Random numbers come from torch's global generator.
    """
    size = list(config["input_size"][1:])
    name = str(config["interpolation"])
    mode = InterpolationMode(name) if name in ("nearest", "bilinear", "bicubic") else InterpolationMode.BICUBIC
    steps: list[nn.Module] = []
    if "crop" in augment:
        steps.append(v2.RandomResizedCrop(size, scale=_CROP_AREA, interpolation=mode, antialias=True))
    else:
        crop = {"crop_fraction": float(config["crop_pct"]), "squash": config["crop_mode"] == "squash"}
        steps.append(v2.Lambda(partial(_fit, size=size, interpolation=mode, **crop)))
    if "shift" in augment:
        steps.append(v2.RandomCrop(size, padding=[size[1] // _SHIFT, size[0] // _SHIFT]))
    if "flip" in augment:
        steps.append(v2.RandomHorizontalFlip())
    normalize = v2.Normalize(list(config["mean"]), list(config["std"]))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), normalize])


def _fit(
    image: Tensor, size: list[int], interpolation: InterpolationMode, crop_fraction: float, squash: bool
) -> Tensor:
    """The image at ``size`` (height, width): resized, then cropped in the middle, or only resized (``squash``)."""
    if list(image.shape[-2:]) == size:
        return image
    if squash:
        return functional.resize(image, size, interpolation, antialias=True)
    short, side = min(image.shape[-2:]), max(size)
    scaled = side if short <= side else int(side / crop_fraction)
    return functional.center_crop(functional.resize(image, [scaled], interpolation, antialias=True), size)
