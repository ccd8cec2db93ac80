"""What an attacker believes of the private inputs before he sees an update."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.covariance import InputCovariance


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """x ~ N(μ, τ²KKᵀ) for every example, the belief that leakage and predicted errors rest on.

    A *white* prior has K = I: every element varies alike, and independently. A *coloured* one has the covariance of
    public examples, tr KKᵀ = d, so that τ² is the variance of an element on average. In coordinates y of which the
    input is x = μ + K·y it is white again: N(0, τ²I).

    Attributes:
        mean: μ, one example `[*shape]`, in the dtype and on the device of the attack.
        std: τ, standard deviation per input element, in units of the input.
        covariance: KKᵀ of one example; `None` for a white prior.

    Raises:
        InvalidInputError: The mean is empty or not finite, the standard deviation is not positive, or the covariance is
            that of another example, dtype or device.
    """

    mean: Tensor
    std: float
    covariance: InputCovariance | None = None

    def __post_init__(self) -> None:
        if self.mean.ndim == 0 or not self.mean.is_floating_point() or not torch.isfinite(self.mean).all():
            raise InvalidInputError(
                f"expected a finite floating-point mean with the shape of one example, got {self.mean.dtype} "
                f"{list(self.mean.shape)}"
            )
        if not (math.isfinite(self.std) and self.std > 0):
            raise InvalidInputError(f"expected a finite prior std > 0, got {self.std}")
        if self.covariance is not None:
            found = self.covariance.variances
            if (found.numel(), found.dtype, found.device) != (self.mean.numel(), self.mean.dtype, self.mean.device):
                raise InvalidInputError(
                    f"expected a covariance of {self.mean.numel()} elements, {self.mean.dtype} on {self.mean.device}, "
                    f"like the mean, got {found.numel()}, {found.dtype} on {found.device}"
                )

    @classmethod
    def from_examples(cls, examples: Tensor) -> GaussianPrior:
        """Returns the white prior that public examples `[n, *shape]` suggest.

        μ is their mean, element by element; τ² their variance around it, averaged over the elements.

        Raises:
            InvalidInputError: Fewer than two examples, or all the same.
        """
        if len(examples) < 2:
            raise InvalidInputError(f"expected at least 2 examples, got {len(examples)}: a spread needs two")
        return cls(examples.mean(0), examples.var(0).mean().sqrt().item())

    @classmethod
    def from_images(cls, images: Tensor) -> GaussianPrior:
        """Returns the coloured prior of public images `[n, C, H, W]`: μ and τ as `from_examples`, and their covariance.

        Raises:
            InvalidInputError: Fewer than two images, or all the same, or no images.
        """
        return replace(cls.from_examples(images), covariance=InputCovariance.from_images(images))

    @property
    def white(self) -> GaussianPrior:
        """The white prior of the same mean and τ."""
        return replace(self, covariance=None)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> GaussianPrior:
        """Returns the same prior in another floating-point type, and on another device."""
        covariance = self.covariance and self.covariance.to(dtype, device)
        return GaussianPrior(self.mean.to(device=device, dtype=dtype), self.std, covariance)

    def start(self, num_units: int, num_examples: int) -> Tensor:
        """Returns μ for every unit and example, flat, `[U, num_examples·d]`."""
        return self.mean.reshape(-1).repeat(num_units, num_examples)

    def sample(self, num_units: int, num_examples: int, generator: torch.Generator) -> Tensor:
        """Returns draws of the prior, flat, `[U, num_examples·d]`; the same on every device for a CPU generator."""
        centre = self.start(num_units, num_examples)
        noise = torch.randn(centre.shape, generator=generator, dtype=torch.float64).to(centre)
        return centre + self.std * self.root(noise)

    def energy(self, x: Tensor) -> Tensor:
        """Returns (x − μ)ᵀ(τ²KKᵀ)⁻¹(x − μ) = ‖y‖²/τ² `[U]` of flat inputs `[U, D]`."""
        return (self.coordinates(x) / self.std).square().sum(-1)

    def deviation(self, x: Tensor) -> Tensor:
        """Returns x − μ `[U, D]` of flat inputs `[U, D]`."""
        return x - self.start(len(x), x.shape[-1] // self.mean.numel())

    def coordinates(self, x: Tensor) -> Tensor:
        """Returns y = K⁻¹(x − μ) `[U, D]` of flat inputs `[U, D]`."""
        deviation = self.deviation(x)
        return deviation if self.covariance is None else self.covariance.unroot(deviation)

    def variances(self, input_dim: int) -> Tensor:
        """Returns the diagonal of KᵀK `[D]`, the variance over τ² along each direction that varies independently."""
        one = self.mean.new_ones(self.mean.numel()) if self.covariance is None else self.covariance.variances
        return one.repeat(input_dim // self.mean.numel())

    def root(self, y: Tensor) -> Tensor:
        """Returns K·y `[U, D]` for y `[U, D]`."""
        return y if self.covariance is None else self.covariance.root(y)

    def root_transpose(self, v: Tensor) -> Tensor:
        """Returns Kᵀ·v `[U, D]` for v `[U, D]`."""
        return v if self.covariance is None else self.covariance.root_transpose(v)
