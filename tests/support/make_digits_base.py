"""Makes ``dpp_lightning/assets/vit_digits_base.safetensors``, the base of the quickstart: python tests/support/make_digits_base.py

A ViT of two blocks, 160 wide, trained from a seed on the training split of the digits 0 to 4 that ``DigitsDataModule``
makes. It names the digit and by how many quarters the image is turned, 20 classes in all: the turns make a better body
out of 541 images. It has never seen a 5 to 9, nor the held-out images of 0 to 4. Its tensors, the head's too, are stored
as float16: under 1 MB. On one thread of one machine the file is the same byte for byte.
"""

import json
import math
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from dpp_lightning.tasks.common.optimization import linear_warmup_decay
from dpp_lightning.tasks.vision.digits import DigitsDataModule

ASSET = Path(__file__).parents[2] / "dpp_lightning" / "assets" / "vit_digits_base.safetensors"
CLASSES = [0, 1, 2, 3, 4]
TURNS = 4  # label = 4 * index of the digit + quarter turns
MODEL_NAME = "vit_tiny_patch16_224"
MODEL_KWARGS = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 160,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 1.5,
    "global_pool": "avg",
}
EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 200, 1e-3, 0.05


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (n, 1, 8, 8) turned by up to 8 degrees, shifted by up to 0.64 pixels, scaled by up to 8 per cent."""

    def within(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, scale = within(math.radians(8)), 1 + within(0.08)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = torch.stack([torch.stack([cos, -sin, within(0.16)], 1), torch.stack([sin, cos, within(0.16)], 1)], 1)
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def turn(images: Tensor, quarters: Tensor) -> Tensor:
    """Each image (n, 1, 8, 8) turned by its number of quarters (n,), each in 0..3."""
    return torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(images, quarters, strict=True)])


def pretrain(seed: int = 0, epochs: int = EPOCHS) -> nn.Module:
    """The trained ViT, a function of the seed."""
    torch.manual_seed(seed)
    model = timm.create_model(MODEL_NAME, num_classes=TURNS * len(CLASSES), **MODEL_KWARGS)
    data = DigitsDataModule(classes=CLASSES, seed=seed)
    data.setup()
    loader, generator = data.train_dataloader(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = linear_warmup_decay(optimizer, epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            quarters = torch.randint(TURNS, labels.shape, generator=generator)
            logits = model(turn(augment(images, generator), quarters))
            optimizer.zero_grad()
            functional.cross_entropy(logits, TURNS * labels + quarters).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: str) -> float:
    """Fraction of a split's upright digits 0 to 4 that the model names, whatever turn it takes them for."""
    data = DigitsDataModule(classes=CLASSES)
    data.setup()
    samples = data.splits[split]
    return (model(samples.images).argmax(-1) // TURNS == samples.labels).float().mean().item()


def save(model: nn.Module, path: Path) -> None:
    """Write the tensors as float16, and what they are into the file's metadata."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    base = {"model_name": MODEL_NAME, "model_kwargs": MODEL_KWARGS, "classes": CLASSES}
    save_file(tensors, path, metadata={"base": json.dumps(base)})  # one entry, as several are written in any order


if __name__ == "__main__":
    torch.set_num_threads(1)
    base = pretrain()
    save(base, ASSET)
    print(f"{ASSET.name}: {ASSET.stat().st_size} bytes, {sum(p.numel() for p in base.parameters())} parameters")
    print(f"accuracy on the digits 0 to 4: val {accuracy(base, 'val'):.4f}, test {accuracy(base, 'test'):.4f}")
