"""What an attacker believes of the private inputs before he sees an update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """x ~ N(μ, τ²I) for every example, the belief that leakage and predicted errors rest on.

    Attributes:
        mean: μ, one example `[*shape]`, in the dtype and on the device of the attack.
        std: τ, standard deviation per input element, in units of the input.

    Raises:
        InvalidInputError: The mean is empty or not finite, or the standard deviation is not positive.
    """

    mean: Tensor
    std: float

    def __post_init__(self) -> None:
        if self.mean.ndim == 0 or not self.mean.is_floating_point() or not torch.isfinite(self.mean).all():
            raise InvalidInputError(
                f"expected a finite floating-point mean with the shape of one example, got {self.mean.dtype} "
                f"{list(self.mean.shape)}"
            )
        if not (math.isfinite(self.std) and self.std > 0):
            raise InvalidInputError(f"expected a finite prior std > 0, got {self.std}")

    @classmethod
    def from_examples(cls, examples: Tensor) -> GaussianPrior:
        """Returns the prior that public examples `[n, *shape]` suggest.

        μ is their mean, element by element; τ² their variance around it, averaged over the elements.

        Raises:
            InvalidInputError: Fewer than two examples, or all the same.
        """
        if len(examples) < 2:
            raise InvalidInputError(f"expected at least 2 examples, got {len(examples)}: a spread needs two")
        return cls(examples.mean(0), examples.var(0).mean().sqrt().item())

    def to(self, dtype: torch.dtype) -> GaussianPrior:
        """Returns the same prior in another floating-point type."""
        return GaussianPrior(self.mean.to(dtype), self.std)

    def start(self, num_units: int, num_examples: int) -> Tensor:
        """Returns μ for every unit and example, flat, `[U, num_examples·d]`."""
        return self.mean.reshape(-1).repeat(num_units, num_examples)

    def sample(self, num_units: int, num_examples: int, generator: torch.Generator) -> Tensor:
        """Returns draws of the prior, flat, `[U, num_examples·d]`; the same on every device for a CPU generator."""
        centre = self.start(num_units, num_examples)
        noise = torch.randn(centre.shape, generator=generator, dtype=torch.float64).to(centre)
        return centre + self.std * noise

    def energy(self, x: Tensor) -> Tensor:
        """Returns ‖x − μ‖²/τ² `[U]` of flat inputs `[U, D]`."""
        return (self.deviation(x) / self.std).square().sum(-1)

    def deviation(self, x: Tensor) -> Tensor:
        """Returns x − μ `[U, D]` of flat inputs `[U, D]`."""
        return x - self.start(len(x), x.shape[-1] // self.mean.numel())
