"""How far an update is linear: whether its Jacobian speaks for it over a whole shift of the input."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_privacy.influence.jacobian import UpdateJacobian


def change_ratio(jacobian: UpdateJacobian, shift: Tensor, *, linear: UpdateJacobian | None = None) -> Tensor:
    """Returns ‖u(x + a) − u(x)‖/‖J·a‖ `[U]`: how much more an update changes over a shift than its Jacobian says.

    What J says of leakage is true of inputs that differ by as much as an attacker is predicted to err if the ratio is
    near 1 for an `a` of that size. Smooth networks keep it. The gradient of a ReLU network jumps wherever a unit
    switches, and J, which is taken between two jumps, knows nothing of them: there the ratio is large, x + a is easier
    to tell from x than predicted, and more leaks than predicted. That of the same network with its ReLUs rounded off
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
