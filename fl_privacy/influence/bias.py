"""What the pull to the prior costs one input: it depends on how far that input is from the prior's mean, and where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.lanczos import Lanczos, basis_bytes
from fl_privacy.influence.operators import PriorGram
from fl_privacy.influence.options import check_effort
from fl_privacy.influence.prior import GaussianPrior


def own_bias(
    jacobian: UpdateJacobian,
    prior: GaussianPrior,
    noise_stds: Sequence[float],
    *,
    rtol: float = 1e-3,
    max_steps: int = 256,
) -> Tensor:
    """Returns ‖K ε(M + ε)⁻¹ y‖²/D `[len(noise_stds), U]`, the squared error that the pull to the prior adds.

    With M = KᵀGK, ε = σ²/τ² and y = K⁻¹(x − μ) of the private inputs x themselves. Its mean over inputs of the prior is
    `Spectrum.bias`; of one input it is less where that input is like the mean in what the update does not tell. All σ
    come from one Lanczos iteration from y, which falls short of the true value where it is not followed to its end.

    Args:
        jacobian: U units.
        prior: N(μ, τ²KKᵀ) of one example.
        noise_stds: σ, positive.
        rtol: Tolerance on the relative residual of the solve, at the least σ.
        max_steps: Most products with G per unit.

    Raises:
        InvalidInputError: Wrong options, or a prior of other examples.
        NotTwiceDifferentiableError: From the Jacobian.
    """
    check_effort(rtol=rtol, max_steps=max_steps)
    if not noise_stds or not all(std > 0 for std in noise_stds):
        raise InvalidInputError(f"expected noise stds > 0, got {list(noise_stds)}")
    ridges = [(std / prior.std) ** 2 for std in noise_stds]
    bytes_per_lane = basis_bytes(jacobian.input_dim, jacobian.dtype, max_steps)
    parts = [_bias(chunk, prior, ridges, rtol, max_steps) for chunk, _ in jacobian.chunks(bytes_per_lane)]
    return torch.cat(parts, 1)


def _bias(
    jacobian: UpdateJacobian, prior: GaussianPrior, ridges: Sequence[float], rtol: float, max_steps: int
) -> Tensor:
    target = prior.coordinates(jacobian.private_inputs)
    lanczos = Lanczos(PriorGram(jacobian, prior), target, max_steps=max_steps)

    def each(ridge: float) -> Tensor:
        return torch.full_like(lanczos.start_norm, ridge, dtype=torch.float64)

    lanczos.run(lambda state: state.solve(each(min(ridges)))[1] <= rtol, check_every=8)
    found = []
    for ridge in ridges:
        y, _ = lanczos.solve(each(ridge))
        found.append(prior.root(lanczos.combined(ridge * y)).double().square().mean(-1))
    return torch.stack(found)
