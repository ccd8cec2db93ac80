"""What the benchmarks run on: a CIFAR-10 ResNet18 and the gradient leakage literature's LeNet, at random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_privacy import GradientUpdate, UpdateJacobian
from fl_privacy.reference.models import InputShape, build_model, init_uniform_


@dataclass(frozen=True)
class Problem:
    """One model in evaluation mode, and inputs `[U, 1, C, H, W]` with labels `[U, 1]` to audit it at."""

    model: nn.Module
    inputs: Tensor
    labels: Tensor

    @property
    def update(self) -> GradientUpdate:
        return GradientUpdate(self.model, nn.CrossEntropyLoss())

    @property
    def jacobian(self) -> UpdateJacobian:
        """A new one each time: what it keeps between products is part of what is timed."""
        return UpdateJacobian(self.update, dict(self.model.named_parameters()), self.inputs, self.labels)

    def unit(self, index: int) -> Problem:
        return Problem(self.model, self.inputs[index, None], self.labels[index, None])

    def perturbation(self, noise_std: float) -> Tensor:
        """Gaussian noise on the update, `[U, P]`."""
        size = sum(p.numel() for p in self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        return noise_std * torch.randn(len(self.inputs), size, generator=generator)


def cifar_resnet18() -> Problem:
    """ResNet18 with a 3x3 stride 1 stem and no pooling, one 3x32x32 input."""
    torch.manual_seed(0)
    model = build_model("resnet18", input_shape=(3, 32, 32), num_classes=10).eval()
    return _problem(model, (3, 32, 32), units=1)


def mnist_lenet(units: int) -> Problem:
    """The sigmoid LeNet, uniformly initialised as there, with 1x28x28 inputs."""
    torch.manual_seed(0)
    model = init_uniform_(build_model("lenet", input_shape=(1, 28, 28), num_classes=10)).eval()
    return _problem(model, (1, 28, 28), units=units)


def _problem(model: nn.Module, shape: InputShape, *, units: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(units, 1, *shape, generator=generator)
    return Problem(model, inputs, torch.randint(10, (units, 1), generator=generator))
