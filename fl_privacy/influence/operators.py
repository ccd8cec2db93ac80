"""Operators on the private input's space: G = JᵀJ of one update, or of several put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fl_privacy.influence.jacobian import UpdateJacobian


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
