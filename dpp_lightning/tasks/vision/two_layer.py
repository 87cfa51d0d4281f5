"""The two-layer network of DAREx, Appendix B, as a model of timm: ``VisionModule(model_name="two_layer")``.

Paper: DARE the Extreme: Revisiting Delta-Parameter Pruning for Fine-Tuned Models, https://arxiv.org/abs/2410.09344.
"""

from typing import Any, Literal

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

default_cfgs = generate_default_cfgs(
    {
        "two_layer": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (0.4914, 0.4822, 0.4465),  # of CIFAR-10
            "std": (0.2470, 0.2435, 0.2616),
            "classifier": "head",
        }
    }
)


class TwoLayer(nn.Module):
    r"""f(x) = W₂ N(φ(W₁ x + b₁)) + b₂ with φ = ReLU, N = RMSNorm and x a flattened image.

    The appendix explains its formula in the order normalisation, ReLU, weights of output and hidden layer. It says that
    the norm bounds the variance of the activations that enter Theorem 3.1 as the input of a layer. So N is before the
    output layer here (``norm="hidden"``). ``input`` puts it before the hidden layer,
    f(x) = W₂ φ(W₁ N(x) + b₁) + b₂, and ``none`` leaves it out.

    Args:
        num_classes: number of outputs; 0 leaves the output layer out.
        in_chans: channels of an image.
        img_size: height and width of an image.
        hidden_size: number of hidden units.
        norm: position of the norm.

    Raises:
        ValueError: another position of the norm.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
        hidden_size: int = 512,
        norm: Literal["hidden", "input", "none"] = "hidden",
    ) -> None:
        super().__init__()
        if norm not in ("hidden", "input", "none"):
            raise ValueError(f"norm is {norm!r}, expected 'hidden', 'input' or 'none'")
        self.num_classes, self.num_features = num_classes, hidden_size
        inputs = in_chans * img_size**2
        layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
        if norm == "input":
            layers["norm"] = nn.RMSNorm(inputs)
        layers |= {"hidden": nn.Linear(inputs, hidden_size), "act": nn.ReLU()}
        if norm == "hidden":
            layers["norm"] = nn.RMSNorm(hidden_size)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._order = tuple(layers)
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The output layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the output layer by a new one; ``global_pool`` is an argument of timm's that is not used here."""
        self.num_classes = num_classes
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """The input of the output layer, (samples, hidden_size), for images (samples, channels, height, width)."""
        x = images
        for name in self._order:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Logits (samples, classes) of images (samples, channels, height, width)."""
        return self.head(self.forward_features(images))


@register_model
def two_layer(pretrained: bool = False, in_chans: int = 3, img_size: int = 32, **kwargs: Any) -> TwoLayer:
    """Entry point of timm; there are no published weights."""
    overlay = {"input_size": (in_chans, img_size, img_size), **(kwargs.pop("pretrained_cfg_overlay", None) or {})}
    kwargs |= {"in_chans": in_chans, "img_size": img_size}
    return build_model_with_cfg(TwoLayer, "two_layer", pretrained, pretrained_cfg_overlay=overlay, **kwargs)
