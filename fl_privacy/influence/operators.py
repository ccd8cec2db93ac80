"""Operators on the private input's space: G = JᵀJ of one update, or of several put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.options import per_unit
from fl_privacy.influence.prior import GaussianPrior


class InputOperator(Protocol):
    """A symmetric positive semi-definite D×D matrix per unit, as products: what a spectrum can be estimated of."""

    @property
    def num_units(self) -> int:
        """U."""

    @property
    def input_dim(self) -> int:
        """D."""

    @property
    def update_dim(self) -> int:
        """Number of numbers that the matrix is made from, which bounds its rank."""

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of every product."""

    @property
    def device(self) -> torch.device:
        """Device of every product."""

    @property
    def lanes_per_pass(self) -> int:
        """Number of vectors that one pass takes within the memory budget."""

    def gram(self, vectors: Tensor) -> Tensor:
        """Returns G·v `[U, D]` for v `[U, D]`."""

    def select(self, units: Tensor) -> InputOperator:
        """Returns the operator of the given units (indices, repeats allowed)."""

    def chunks(self, bytes_per_lane: int, *, lanes_per_unit: int = 1) -> Iterator[tuple[InputOperator, Tensor]]:
        """Yields units that fit into one pass together with their vectors, and the indices of these units."""


class MeanGram:
    """The mean of G over the units of a Jacobian, as the one matrix of any number of units.

    Made from public examples it is a covariance that tells nothing of a client's own input.

    Args:
        jacobian: The V units that are averaged, for example one public example each.
        num_units: U, how many units share the mean.
    """

    def __init__(self, jacobian: UpdateJacobian, *, num_units: int = 1) -> None:
        self._jacobian = jacobian
        self._units = num_units

    @property
    def num_units(self) -> int:
        """U."""
        return self._units

    @property
    def input_dim(self) -> int:
        """D."""
        return self._jacobian.input_dim

    @property
    def update_dim(self) -> int:
        """V·P, of all averaged updates together."""
        return self._jacobian.num_units * self._jacobian.update_dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of every product."""
        return self._jacobian.dtype

    @property
    def device(self) -> torch.device:
        """Device of every product."""
        return self._jacobian.device

    @property
    def lanes_per_pass(self) -> int:
        """Number of vectors in one pass: each is multiplied with all V units."""
        return max(1, self._jacobian.lanes_per_pass // self._jacobian.num_units)

    def gram(self, vectors: Tensor) -> Tensor:
        """Returns the mean of G_v·w over v, `[U, D]`, for w `[U, D]`."""
        averaged = self._jacobian.num_units
        return torch.stack(
            [self._jacobian.gram(vector.expand(averaged, -1).contiguous()).mean(0) for vector in vectors]
        )

    def select(self, units: Tensor) -> MeanGram:
        """Returns the same mean for as many units as are given."""
        return MeanGram(self._jacobian, num_units=len(units))

    def chunks(self, bytes_per_lane: int, *, lanes_per_unit: int = 1) -> Iterator[tuple[MeanGram, Tensor]]:
        """Yields units whose vectors of the given size fit into the Jacobian's memory budget."""
        fitting = max(1, self._jacobian.memory_budget // (bytes_per_lane * lanes_per_unit))
        for chunk in torch.split(torch.arange(self._units, device=self.device), fitting):
            yield self.select(chunk), chunk


class PriorGram:
    """KᵀGK: what an update tells of the coordinates y in which a prior N(μ, τ²KKᵀ) is white, x = μ + K·y.

    Args:
        operator: G of U units.
        prior: Of one example; inputs of several take it example by example.

    Raises:
        InvalidInputError: The prior is of another example, dtype or device.
    """

    def __init__(self, operator: InputOperator, prior: GaussianPrior) -> None:
        found, expected = (prior.mean.dtype, prior.mean.device), (operator.dtype, operator.device)
        if found != expected or operator.input_dim % prior.mean.numel():
            raise InvalidInputError(
                f"expected a prior of {expected[0]} on {expected[1]} for examples that make up {operator.input_dim} "
                f"elements, got {found[0]} on {found[1]} and {prior.mean.numel()} elements"
            )
        self._operator = operator
        self._prior = prior

    @property
    def num_units(self) -> int:
        """U."""
        return self._operator.num_units

    @property
    def input_dim(self) -> int:
        """D."""
        return self._operator.input_dim

    @property
    def update_dim(self) -> int:
        """Of G."""
        return self._operator.update_dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of every product."""
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        """Device of every product."""
        return self._operator.device

    @property
    def lanes_per_pass(self) -> int:
        """Of G."""
        return self._operator.lanes_per_pass

    def gram(self, vectors: Tensor) -> Tensor:
        """Returns KᵀGK·v `[U, D]` for v `[U, D]`."""
        return self._prior.root_transpose(self._operator.gram(self._prior.root(vectors)))

    def select(self, units: Tensor) -> PriorGram:
        """Returns the operator of the given units."""
        return PriorGram(self._operator.select(units), self._prior)

    def chunks(self, bytes_per_lane: int, *, lanes_per_unit: int = 1) -> Iterator[tuple[PriorGram, Tensor]]:
        """Yields units that fit into one pass of G."""
        for chunk, units in self._operator.chunks(bytes_per_lane, lanes_per_unit=lanes_per_unit):
            yield PriorGram(chunk, self._prior), units


class GramSum:
    """Σ_t w_t G_t: what several updates of the same private inputs tell of them together.

    Independent noise of standard deviation σ_t on the update of round t adds the Fisher information G_t/σ_t²; so with
    weights 1/σ_t² the leakage of all rounds is that of this sum at σ = 1, or at ε = 1/τ²:

        rounds = GramSum([jacobian_at_theta_1, jacobian_at_theta_2], noise_stds=[0.01, 0.02])
        estimate_spectrum(rounds).leakage(1.0, prior_std)

    Noise on the input that is drawn once and kept needs no sum: every round depends on x through x + a alone.

    Args:
        terms: G_t of the same U units, in the same order and with the same private inputs. Usually one Jacobian for
            each round's θ.
        noise_stds: σ_t, positive, one for each term.

    Raises:
        InvalidInputError: No terms, terms that do not belong together, or stds that are not finite and positive.
    """

    def __init__(self, terms: Sequence[InputOperator], *, noise_stds: Sequence[float | Tensor]) -> None:
        if not terms or len(noise_stds) != len(terms):
            raise InvalidInputError(f"expected one noise std for each of at least one term, got {len(noise_stds)} stds")
        first = terms[0]
        for term in terms:
            shape = (term.num_units, term.input_dim, term.dtype, term.device)
            expected = (first.num_units, first.input_dim, first.dtype, first.device)
            if shape != expected:
                raise InvalidInputError(
                    f"expected terms of the same units, inputs, dtype and device, got {expected} and {shape}"
                )
        self._terms = tuple(terms)
        stds = [per_unit(std, "noise_stds", num_units=first.num_units, device=first.device) for std in noise_stds]
        if not all((std > 0).all() for std in stds):
            raise InvalidInputError("expected noise stds > 0: without noise one round tells all that there is")
        self._weights = tuple(1 / std**2 for std in stds)

    @property
    def num_units(self) -> int:
        """U."""
        return self._terms[0].num_units

    @property
    def input_dim(self) -> int:
        """D."""
        return self._terms[0].input_dim

    @property
    def update_dim(self) -> int:
        """Length of all updates together."""
        return sum(term.update_dim for term in self._terms)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of every product."""
        return self._terms[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of every product."""
        return self._terms[0].device

    @property
    def lanes_per_pass(self) -> int:
        """Number of vectors that one pass of every term takes."""
        return min(term.lanes_per_pass for term in self._terms)

    def gram(self, vectors: Tensor) -> Tensor:
        """Returns Σ_t w_t G_t·v `[U, D]` for v `[U, D]`."""
        products = torch.zeros_like(vectors)
        for term, weight in zip(self._terms, self._weights, strict=True):
            products = products + weight[:, None].to(vectors.dtype) * term.gram(vectors)
        return products

    def select(self, units: Tensor) -> GramSum:
        """Returns the sums of the given units (indices, repeats allowed)."""
        return self._with([term.select(units) for term in self._terms], units)

    def chunks(self, bytes_per_lane: int, *, lanes_per_unit: int = 1) -> Iterator[tuple[GramSum, Tensor]]:
        """Yields units that fit into one pass of the first term, whose graphs are the size of the others'."""
        for first, units in self._terms[0].chunks(bytes_per_lane * len(self._terms), lanes_per_unit=lanes_per_unit):
            yield self._with([first, *(term.select(units) for term in self._terms[1:])], units), units

    def _with(self, terms: Sequence[InputOperator], units: Tensor) -> GramSum:
        chosen = object.__new__(GramSum)
        chosen._terms = tuple(terms)
        chosen._weights = tuple(weight[units] for weight in self._weights)
        return chosen
