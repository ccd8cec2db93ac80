"""What an attacker wins back who knows that what he rebuilt is an image: denoising after the attack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fl_privacy.attacks.attack import Attack
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction
from fl_privacy.errors import InvalidInputError
from fl_privacy.extras import require

Denoiser = Literal["total-variation", "non-local-means"]


@dataclass(frozen=True, kw_only=True)
class ImageDenoising:
    """An attack whose images are denoised by scikit-image.

    Attributes:
        attack: Rebuilds the images.
        denoiser: Total variation (Chambolle) or non-local means.
        strength: How much is smoothed away: the weight of total variation, or the filter's h, in units of the input.

    Raises:
        InvalidInputError: The strength is not positive.
    """

    attack: Attack
    denoiser: Denoiser
    strength: float

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise InvalidInputError(f"expected strength > 0, got {self.strength}")

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns the denoised images; objective, misfit and stop reasons are those of the attack."""
        found = self.attack.run(problem)
        return replace(found, inputs=denoised(found.inputs, self.denoiser, self.strength))


def denoised(images: Tensor, denoiser: Denoiser, strength: float) -> Tensor:
    """Returns images `[U, M, C, H, W]` denoised one by one.

    Raises:
        InvalidInputError: Another shape, or an unknown denoiser.
        ImportError: scikit-image is not installed.
    """
    if images.ndim != 5:
        raise InvalidInputError(f"expected images [units, examples, channels, height, width], got {list(images.shape)}")
    restoration = require("skimage.restoration")
    found = [
        _one(restoration, image.numpy(), denoiser, strength) for image in images.detach().double().cpu().flatten(0, 1)
    ]
    return torch.stack([image.reshape(images.shape[2:]) for image in found]).reshape(images.shape).to(images)


def _one(restoration: Any, image: Any, denoiser: Denoiser, strength: float) -> Tensor:
    if denoiser == "total-variation":
        return torch.from_numpy(restoration.denoise_tv_chambolle(image, weight=strength, channel_axis=0).copy())
    if denoiser == "non-local-means":
        # Of one channel scikit-image 0.26 makes a wrong image where it is told that there is a channel axis.
        axis = {"channel_axis": 0} if len(image) > 1 else {}
        options = {"h": strength, "patch_size": 5, "patch_distance": 6, **axis}
        return torch.from_numpy(restoration.denoise_nl_means(image.squeeze(0) if not axis else image, **options).copy())
    raise InvalidInputError(f"expected denoiser to be 'total-variation' or 'non-local-means', got {denoiser!r}")
