"""Convolutions whose weights differ from lane to lane, as patch extraction and one batched matrix product."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

Pair = tuple[int, int]
_MANY_POSITIONS = 256
"""From so many places of a kernel on, a CPU adds up patches faster by kernel elements than by pixels."""


class LaneConvolution(TorchFunctionMode):
    """Runs 2-D convolutions as patch extraction and a matrix product.

    A convolution whose weights differ from lane to lane becomes a grouped convolution under `vmap`, which is several
    times slower than the batched matrix product that this form becomes. Grouped convolutions and padding given by name
    are left as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Intercepts `conv2d`; every other function runs unchanged."""
        kwargs = kwargs or {}
        if func is torch.conv2d or func is F.conv2d:
            return _convolve(func, *args, **kwargs)
        return func(*args, **kwargs)


def _convolve(
    conv2d: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    if groups != 1 or isinstance(padding, str) or input.ndim != 4:
        return conv2d(input, weight, bias, stride, padding, dilation, groups)
    out_channels, _, *kernel = weight.shape
    window = _Window(_pair(input.shape[2:]), _pair(kernel), _pair(stride), _pair(padding), _pair(dilation))
    columns: Tensor = _Unfold.apply(input, window)
    output = (weight.reshape(out_channels, -1) @ columns).reshape(input.shape[0], out_channels, *window.positions)
    return output if bias is None else output + bias[:, None, None]


def _pair(value: int | Sequence[int]) -> Pair:
    if isinstance(value, int):
        return value, value
    items = tuple(value)
    return (items[0], items[0]) if len(items) == 1 else (items[0], items[1])


@dataclass(frozen=True)
class _Window:
    """How a kernel is moved over images; every pair is of height and width."""

    image: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def padded(self) -> Pair:
        (height, width), (above, left) = self.image, self.padding
        return height + 2 * above, width + 2 * left

    @property
    def positions(self) -> Pair:
        """How many rows and columns of places the kernel takes."""
        axes = zip(self.padded, self.kernel, self.stride, self.dilation, strict=True)
        rows, columns = ((size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in axes)
        return rows, columns

    def patches(self, padded: Tensor) -> Tensor:
        """A view `[N, C, *kernel, *positions]` of contiguous padded images `[N, C, H, W]`."""
        (dh, dw), (sh, sw) = self.dilation, self.stride
        n, c, h, w = padded.stride()
        strides = (n, c, dh * h, dw * w, sh * h, sw * w)
        return padded.as_strided((*padded.shape[:2], *self.kernel, *self.positions), strides)

    def summed(self, patches: Tensor) -> Tensor:
        """The adjoint of `patches`: padded images, each pixel the sum of its places `[N, C, *kernel, *positions]`."""
        padded = patches.new_zeros(*patches.shape[:2], *self.padded)
        if patches.is_cpu and math.prod(self.positions) < _MANY_POSITIONS:
            return padded.flatten(2).index_add_(2, self._pixels(), patches.flatten(2)).view_as(padded)
        places = self.patches(padded)
        for i, j in itertools.product(*map(range, self.kernel)):  # of one kernel element no two places are the same
            places[:, :, i, j] += patches[:, :, i, j]
        return padded

    @functools.cache  # noqa: B019 - windows are as few as a model's convolutions, and small
    def _pixels(self) -> Tensor:
        """Which pixel of a padded image each element of its patches is, flattened."""
        pixels = torch.arange(math.prod(self.padded)).view(1, 1, *self.padded)
        return self.patches(pixels).flatten()


class _Unfold(Function):
    """Columns `[N, C·k, positions]` of images `[N, C, H, W]`, as `F.unfold`, which takes one image after the other."""

    @staticmethod
    def forward(images: Tensor, window: _Window) -> Tensor:
        above, left = window.padding
        padded = F.pad(images, (left, left, above, above)).contiguous()
        return window.patches(padded).flatten(4).flatten(1, 3)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Window], output: Tensor) -> None:
        ctx.window = inputs[1]

    @staticmethod
    def backward(ctx: Any, columns_bar: Tensor) -> tuple[Tensor, None]:
        return _linear(_Fold, columns_bar, ctx.window), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], images: Tensor, window: _Window) -> tuple[Tensor, int]:
        return _over_lanes(_Unfold.apply, in_dims[0], images, window)


class _Fold(Function):
    """The adjoint of `_Unfold`: each pixel `[N, C, H, W]` is the sum of its places in the columns."""

    @staticmethod
    def forward(columns: Tensor, window: _Window) -> Tensor:
        padded = window.summed(columns.reshape(len(columns), -1, *window.kernel, *window.positions))
        (height, width), (above, left) = window.image, window.padding
        return padded[:, :, above : above + height, left : left + width]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Window], output: Tensor) -> None:
        ctx.window = inputs[1]

    @staticmethod
    def backward(ctx: Any, images_bar: Tensor) -> tuple[Tensor, None]:
        return _linear(_Unfold, images_bar, ctx.window), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], columns: Tensor, window: _Window) -> tuple[Tensor, int]:
        return _over_lanes(_Fold.apply, in_dims[0], columns, window)


def _linear(function: type[Function], argument: Tensor, window: _Window) -> Tensor:
    """A function's value; `apply`, which takes longer than the work for small tensors, only where a graph is kept."""
    return (function.apply if torch.is_grad_enabled() else function.forward)(argument, window)  # type: ignore[no-any-return]


def _over_lanes(
    apply: Callable[[Tensor, _Window], Tensor], lane_dim: int | None, batches: Tensor, window: _Window
) -> tuple[Tensor, int]:
    """Runs the batches of all lanes as one: no example sees another."""
    assert lane_dim is not None
    lanes = batches.movedim(lane_dim, 0)
    results = apply(lanes.flatten(0, 1), window)
    return results.reshape(*lanes.shape[:2], *results.shape[1:]), 0
