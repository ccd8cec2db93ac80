"""What single tests of studies hold results against."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_privacy.studies.scene import Scene


def dense_jacobian(scene: Scene, image: int, *, step: float = 1e-5) -> Tensor:
    """J `[P, D]` at one image, by finite differences of the gradient, without any of our products."""
    x = scene.images[image]

    def gradient(pixels: Tensor) -> Tensor:
        return scene.update.layout.flatten(scene.update(scene.params, pixels, scene.labels[image]))

    shifts = step * torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    return torch.stack([(gradient(x + shift) - gradient(x - shift)) / (2 * step) for shift in shifts], dim=1)


def dense_leakage(scene: Scene, image: int, noise_std: float) -> float:
    """The mean of λ/(λ + σ²/τ²) over the eigenvalues λ of the dense JᵀJ."""
    values = torch.linalg.svdvals(dense_jacobian(scene, image)) ** 2
    return float((values / (values + (noise_std / scene.prior.std) ** 2)).mean())
