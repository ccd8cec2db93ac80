"""How close a reconstruction is to the truth, which only whoever holds the truth can say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.extras import require


def rmse(rebuilt: Tensor, truth: Tensor) -> Tensor:
    """Returns the root mean square error per input element `[U]`, in units of the input.

    Args:
        rebuilt: `[U, ...]`.
        truth: Of the same shape.

    Raises:
        InvalidInputError: The shapes differ.
    """
    _check(rebuilt, truth)
    return (rebuilt - truth).double().flatten(1).square().mean(-1).sqrt()


def psnr(rebuilt: Tensor, truth: Tensor, *, data_range: float) -> Tensor:
    """Returns the peak signal to noise ratio 20·log10(data_range/rmse) `[U]` in dB; infinite where they are equal.

    Raises:
        InvalidInputError: The shapes differ, or the range is not positive.
    """
    _check_range(data_range)
    return 20 * torch.log10(data_range / rmse(rebuilt, truth))


def ssim(rebuilt: Tensor, truth: Tensor, *, data_range: float) -> Tensor:
    """Returns the structural similarity of images `[U, M, C, H, W]`, averaged over each unit's M, `[U]`, at most 1.

    scikit-image's: a uniform window of 7 pixels, or the largest odd one that fits into the image.

    Raises:
        InvalidInputError: The shapes differ or are not those of images of 3 pixels a side or more, or the range is not
            positive.
        ImportError: scikit-image is not installed.
    """
    _check(rebuilt, truth)
    _check_range(data_range)
    side = min(truth.shape[-2:])
    if truth.ndim != 5 or side < 3:
        raise InvalidInputError(
            "expected images [units, examples, channels, height, width] of 3 pixels a side or more, got "
            f"{list(truth.shape)}"
        )
    similarity = require("skimage.metrics").structural_similarity
    window = min(7, side - 1 + side % 2)
    scores = [
        similarity(a, b, data_range=data_range, channel_axis=0, win_size=window)
        for a, b in zip(_arrays(rebuilt), _arrays(truth), strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64, device=truth.device).reshape(truth.shape[:2]).mean(1)


def aligned(rebuilt: Tensor, truth: Tensor) -> Tensor:
    """Returns the rebuilt examples `[U, M, ...]` in the order that fits the truth best: an update does not tell it.

    Raises:
        InvalidInputError: The shapes differ.
    """
    _check(rebuilt, truth)
    assign = require("scipy.optimize").linear_sum_assignment
    cost = torch.cdist(truth.double().flatten(2), rebuilt.double().flatten(2)).square().cpu()
    orders = [torch.from_numpy(assign(unit.numpy())[1]).to(rebuilt.device) for unit in cost]
    return torch.stack([examples[order] for examples, order in zip(rebuilt, orders, strict=True)])


def _arrays(images: Tensor) -> list[object]:
    return [image.numpy() for image in images.detach().double().cpu().flatten(0, 1)]


def _check(rebuilt: Tensor, truth: Tensor) -> None:
    if rebuilt.shape != truth.shape or truth.ndim < 2:
        raise InvalidInputError(
            f"expected two tensors of one shape [units, ...], got {list(rebuilt.shape)} and {list(truth.shape)}"
        )


def _check_range(data_range: float) -> None:
    if not (math.isfinite(data_range) and data_range > 0):
        raise InvalidInputError(f"expected data_range > 0, highest minus lowest possible value, got {data_range}")
