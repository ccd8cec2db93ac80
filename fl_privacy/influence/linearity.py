"""How far an update is linear: whether its Jacobian speaks for it over a whole shift of the input."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.lanczos import basis_bytes, function_of_gram
from fl_privacy.influence.operators import InputOperator
from fl_privacy.influence.options import check_effort, per_unit


def change_ratio(jacobian: UpdateJacobian, shift: Tensor, *, linear: UpdateJacobian | None = None) -> Tensor:
    """Returns ‖u(x + a) − u(x)‖/‖J·a‖ `[U]`: how much more an update changes over a shift than its Jacobian says.

    What J says of leakage is true of inputs that differ by as much as an attacker is predicted to err if the ratio is
    near 1 for an `a` like his error (`likely_error`). Small smooth networks keep it. The gradient of a ReLU network
    jumps wherever a unit switches, and J, which is taken between two jumps, knows nothing of them: there the ratio is
    large, and x + a easier to tell from x than J says. That of the same network with its ReLUs rounded off
    (`rounding.rounded_off`) does.

    Args:
        jacobian: Of U units at x, for u and J.
        shift: a `[U, D]`. One that J does not see at all has the ratio infinity, or NaN where nothing changes.
        linear: J of the same units, in place of the first one's.

    Raises:
        InvalidInputError: A shift of another shape, dtype or device, NaN or infinity.
    """
    moved = jacobian.shifted(shift)  # checks the shift first
    change = (moved.update() - jacobian.update()).double()
    expected = (linear or jacobian).jvp(shift).double()
    ratio: Tensor = torch.linalg.vector_norm(change, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)
    return ratio


def likely_error(operator: InputOperator, *, ridge: float | Tensor, seed: int = 0, max_steps: int = 64) -> Tensor:
    """Returns a draw of the error that the best linear-Gaussian attacker makes, scaled to an rms of 1, `[U, D]`.

    It is σ(G + ε)^(−½)z with random normal z: little where J is large, τ·z where it is zero. There an update is most
    likely to leave its Jacobian behind. Lanczos iteration from z that is cut short makes it more even than it is.

    Args:
        operator: G of U units.
        ridge: ε = σ²/τ², positive, number or `[U]`.
        seed: Of z.
        max_steps: Most products with G per unit.

    Raises:
        InvalidInputError: An option is out of range.
    """
    check_effort(rtol=1.0, max_steps=max_steps)
    epsilon = per_unit(ridge, "ridge", num_units=operator.num_units, device=operator.device)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(operator.num_units, operator.input_dim, generator=generator, dtype=torch.float64)
    z = z.to(device=operator.device, dtype=operator.dtype)
    bytes_per_lane = basis_bytes(operator.input_dim, operator.dtype, max_steps)
    errors = torch.cat(
        [
            function_of_gram(chunk, partial(_inverse_root, epsilon[units, None]), z[units], max_steps)
            for chunk, units in operator.chunks(bytes_per_lane)
        ]
    )
    return errors / errors.double().square().mean(-1, keepdim=True).sqrt().to(errors)


def _inverse_root(ridge: Tensor, nodes: Tensor) -> Tensor:
    return (nodes + ridge).rsqrt()
