"""Small image classifiers by name, for simulations, studies and tests.

Every model maps images `[N, C, H, W]` to logits `[N, num_classes]`. All are smooth in their input except `resnet8` and
`resnet18`, whose ReLUs have kinks: their derivatives exist almost everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_privacy.extras import require

InputShape = tuple[int, int, int]
"""Channels, height and width of one image."""


def build_model(name: str, *, input_shape: InputShape, num_classes: int) -> nn.Module:
    """Returns a freshly initialised model; seed torch beforehand for a reproducible one.

    Args:
        name: A key of `MODELS`.
        input_shape: Channels, height and width of one image.
        num_classes: Number of logits.

    Raises:
        ValueError: The name is unknown, or a size is too small.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(sorted(MODELS))}")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"input_shape must be three positive integers (C, H, W), got {input_shape!r}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    return MODELS[name](input_shape, num_classes)


@torch.no_grad()
def init_uniform_(model: nn.Module, *, bound: float = 0.5, generator: torch.Generator | None = None) -> nn.Module:
    """Draws every parameter from U(-bound, bound) in place and returns the model.

    With `bound=0.5` this is how the gradient leakage literature initialises its sigmoid LeNet: its gradients then carry
    enough of the input for attacks to succeed. A model initialised so is there to be attacked, not to be trained.
    """
    for parameter in model.parameters():
        parameter.uniform_(-bound, bound, generator=generator)
    return model


def lenet(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Returns the LeNet of the gradient leakage literature: four sigmoid 5×5 convolutions and one linear layer."""
    strides = (2, 2, 1, 1)
    channels = (input_shape[0], 12, 12, 12, 12)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip(channels[:-1], channels[1:], strides, strict=True):
        layers += [nn.Conv2d(inputs, outputs, 5, stride=stride, padding=2), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * _area_after(input_shape, strides), num_classes))


def digitsnet(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Returns a small tanh convolutional net that learns 8×8 digits within a few rounds of federated averaging."""
    strides = (1, 2)
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 16, 3, stride=1, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32 * _area_after(input_shape, strides), num_classes),
    )


def linear(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Returns softmax regression: one linear layer, which writes its input into its own gradient."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))


def mlp(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Returns a perceptron with two hidden GELU layers of 128 units."""
    width = 128
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, num_classes),
    )


def resnet8(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Returns a small residual network: three blocks of two 3×3 convolutions and BatchNorms, 16, 32 and 64 channels.

    The block and the initialisation are torchvision's, the layout that of He et al. for CIFAR-10 (arXiv 1512.03385) at
    its smallest depth.
    """
    block = require("torchvision.models.resnet").BasicBlock
    layers: list[nn.Module] = [nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        projection = None
        if stride != 1:
            projection = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        layers.append(block(inputs, outputs, stride=stride, downsample=projection))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet18(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Returns torchvision's ResNet18 with the stem for small images: a 3×3 stride 1 convolution and no pooling."""
    model: nn.Module = require("torchvision.models").resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(input_shape[0], 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class VisionTransformer(nn.Module):
    """A small pre-norm vision transformer over square patches, with mean pooling.

    The patch side is the largest one that divides height and width and gives about seven patches a side or more; images
    of 8×8 are cut into 2×2.

    Args:
        input_shape: Channels, height and width of one image.
        num_classes: Number of logits.
        width: Features per token.
        depth: Number of blocks.
        num_heads: Attention heads per block; divides `width`.
    """

    def __init__(
        self, input_shape: InputShape, num_classes: int, *, width: int = 64, depth: int = 3, num_heads: int = 4
    ) -> None:
        super().__init__()
        channels, height, image_width = input_shape
        side = _patch_side(height, image_width)
        num_tokens = (height // side) * (image_width // side)
        self.patches = nn.Conv2d(channels, width, side, stride=side)
        self.positions = nn.Parameter(0.02 * torch.randn(1, num_tokens, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits `[N, num_classes]` of images `[N, C, H, W]`."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        pooled = self.norm(self.blocks(tokens)).mean(dim=1)
        logits: Tensor = self.head(pooled)
        return logits


class TransformerBlock(nn.Module):
    """Self-attention and a GELU perceptron, each on normalised tokens and added to its input.

    Args:
        width: Features per token.
        num_heads: Attention heads; divides `width`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns tokens `[N, T, width]` of tokens of the same shape."""
        # [N, T, 3·width] -> three of [N, heads, T, width / heads]
        parts = self.query_key_value(self.attention_norm(tokens)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.projection(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = tokens + self.perceptron(tokens)
        return mixed


def _area_after(input_shape: InputShape, strides: tuple[int, ...]) -> int:
    """Returns the pixels left by convolutions of odd kernel k and padding k // 2: each side becomes ⌈side / stride⌉."""
    height, width = input_shape[1:]
    for stride in strides:
        height, width = math.ceil(height / stride), math.ceil(width / stride)
    return height * width


def _patch_side(height: int, width: int) -> int:
    limit = max(2, min(height, width) // 7)
    return max(side for side in range(1, limit + 1) if height % side == 0 and width % side == 0)


MODELS: Mapping[str, Callable[[InputShape, int], nn.Module]] = MappingProxyType(
    {
        "digitsnet": digitsnet,
        "lenet": lenet,
        "linear": linear,
        "mlp": mlp,
        "resnet8": resnet8,
        "resnet18": resnet18,
        "vit": VisionTransformer,
    }
)
"""The models that `build_model` knows, each built from an input shape and a number of classes."""
