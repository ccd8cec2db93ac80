"""What an attacker holds: the update that was shared, how it was made, and what he believes of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_privacy.attacks.noise import Noise
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.prior import GaussianPrior
from fl_privacy.influence.update import UpdateMap


@dataclass(frozen=True, eq=False)
class KnownBatch:
    """The rest of a batch of which one example is private.

    Attributes:
        inputs: `[U, N, *shape]`; what stands in the private slot is never read.
        private: `[U]`, index of the private example.
    """

    inputs: Tensor
    private: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackProblem:
    """Inputs to be rebuilt from the updates of U units that share one θ, solved side by side.

    The posterior that every attack looks for the mode of, under the prior N(μ, τ²KKᵀ) and noise N(0, C), is

        −2 log p(x | shared) = (u(x) − shared)ᵀC⁻¹(u(x) − shared) + ‖K⁻¹(x − μ)‖²/τ² + const.

    Nothing in here is known only to the client.

    Attributes:
        update: How the update was made, u.
        params: Global parameters θ by name.
        shared: `[U, P]`, in the order of `model.named_parameters()`; a common factor (clipping) taken out.
            `update.layout.flatten` turns one update by name into one such row.
        prior: Belief about each private example; its mean has the shape of one.
        noise: Belief about shared − u(x).
        labels: `[U, N, ...]` of the whole batch, or `None` where the attacker does not have them.
        num_examples: N, of the whole batch.
        known: The rest of the batch, where only one example is private (unit `example`).
        before_pass: Called before each pass of a product with J; what it raises ends the attack: a time limit's place.

    Raises:
        InvalidInputError: Shapes, dtypes or numbers of units disagree, or what was shared is not finite.
    """

    update: UpdateMap
    params: Mapping[str, Tensor]
    shared: Tensor
    prior: GaussianPrior
    noise: Noise
    labels: Tensor | None = None
    num_examples: int = 1
    known: KnownBatch | None = None
    before_pass: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        units, dim = len(self.shared), self.update.layout.dim
        if self.shared.shape != (units, dim) or units == 0:
            raise InvalidInputError(
                f"expected shared updates of shape [units, {dim}], got {list(self.shared.shape)}: one client's update "
                "becomes one unit with update.layout.flatten(named)[None]"
            )
        if not torch.isfinite(self.shared).all():
            raise InvalidInputError("expected finite shared updates, got NaN or infinity")
        if self.num_examples < 1:
            raise InvalidInputError(f"expected num_examples >= 1, got {self.num_examples}")
        mean = self.prior.mean
        if mean.dtype != self.shared.dtype or mean.device != self.shared.device:
            raise InvalidInputError(
                f"expected a prior of {self.shared.dtype} on {self.shared.device} like the shared updates, "
                f"got {mean.dtype} on {mean.device}"
            )
        if self.noise.num_units != units:
            raise InvalidInputError(f"expected the noise of {units} units, got that of {self.noise.num_units}")
        batch = (units, self.num_examples)
        if self.labels is not None and self.labels.shape[:2] != batch:
            raise InvalidInputError(f"expected labels that begin with {list(batch)}, got {list(self.labels.shape)}")
        if self.known is not None:
            expected = (*batch, *mean.shape)
            if self.known.inputs.shape != expected or self.known.private.shape != (units,):
                raise InvalidInputError(
                    f"expected known inputs of shape {list(expected)} and private indices [{units}], got "
                    f"{list(self.known.inputs.shape)} and {list(self.known.private.shape)}"
                )

    @property
    def num_units(self) -> int:
        """U."""
        return len(self.shared)

    @property
    def num_private(self) -> int:
        """Number of private examples of one unit: 1 where the rest is known, else N."""
        return self.num_examples if self.known is None else 1

    @property
    def input_dim(self) -> int:
        """D, the number of private input elements of one unit."""
        return self.num_private * self.prior.mean.numel()

    @property
    def update_dim(self) -> int:
        """P, the number of trained parameters."""
        return self.shared.shape[-1]

    def select(self, units: Tensor) -> AttackProblem:
        """Returns the problems of the given units `[V]` (indices, repeats allowed)."""
        known = self.known and KnownBatch(self.known.inputs[units], self.known.private[units])
        return replace(
            self,
            shared=self.shared[units],
            noise=self.noise.select(units),
            labels=None if self.labels is None else self.labels[units],
            known=known,
        )

    def start(self) -> Tensor:
        """Returns the prior mean, flat, `[U, D]`: where an attack begins that knows nothing."""
        return self.prior.start(self.num_units, self.num_private)

    def images(self, x: Tensor) -> Tensor:
        """Returns flat private inputs `[U, D]` as examples `[U, num_private, *shape]`."""
        return x.reshape(len(x), self.num_private, *self.prior.mean.shape)

    def batches(self, x: Tensor) -> Tensor:
        """Returns whole batches `[U, N, *shape]` with the private inputs `[U, D]` in their places, differentiably."""
        private = self.images(x)
        if self.known is None:
            return private
        slots = torch.arange(self.num_examples, device=x.device) == self.known.private[:, None]
        return torch.where(slots.reshape(*slots.shape, *[1] * self.prior.mean.ndim), private, self.known.inputs)

    def jacobian(self, x: Tensor) -> UpdateJacobian:
        """Returns J at private inputs `[U, D]`.

        Raises:
            InvalidInputError: The labels are not known: `labelled` guesses them.
        """
        private = None if self.known is None else self.known.private
        return UpdateJacobian(
            self.update,
            self.params,
            self.batches(x.detach()),
            self.known_labels,
            private=private,
            before_pass=self.before_pass,
        )

    @property
    def known_labels(self) -> Tensor:
        """Labels `[U, N, ...]`.

        Raises:
            InvalidInputError: They are not known: `labelled` guesses them.
        """
        if self.labels is None:
            raise InvalidInputError("expected labels, got None: fill them in with labelled(problem)")
        return self.labels

    def residual(self, x: Tensor) -> Tensor:
        """Returns u(x) − shared `[U, P]` at private inputs `[U, D]`."""
        return self.jacobian(x).update() - self.shared

    def objective(self, x: Tensor) -> Tensor:
        """Returns −2 log p(x | shared) `[U]` up to a constant, by which reconstructions of one update compare."""
        return self.noise.energy(self.residual(x)) + self.prior.energy(x)
