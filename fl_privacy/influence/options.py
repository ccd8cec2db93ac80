"""Checks of the options that solvers and spectra share."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError


def per_unit(value: float | Tensor, name: str, *, num_units: int, device: torch.device) -> Tensor:
    """Returns an option that is one number, or one per unit, as float64 `[U]`.

    Raises:
        InvalidInputError: Another shape, NaN, infinity, or a negative number.
    """
    tensor = torch.as_tensor(value, dtype=torch.float64, device=device)
    if tensor.ndim > 1 or (tensor.ndim == 1 and len(tensor) != num_units):
        raise InvalidInputError(
            f"expected {name} as one number or one per unit [{num_units}], got shape {list(tensor.shape)}"
        )
    if not (torch.isfinite(tensor) & (tensor >= 0)).all():
        raise InvalidInputError(f"expected finite {name} >= 0, got {value}")
    return tensor.expand(num_units)


def check_effort(*, rtol: float, max_steps: int) -> None:
    """Checks how long and how closely an iteration is asked to solve.

    Raises:
        InvalidInputError: An option is out of range.
    """
    if not rtol > 0:
        raise InvalidInputError(f"expected rtol > 0, got {rtol}")
    if max_steps < 1:
        raise InvalidInputError(f"expected max_steps >= 1, got {max_steps}")
