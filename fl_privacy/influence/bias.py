"""What the pull to the prior costs one input: it depends on how far that input is from the prior's mean, and where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.lanczos import Lanczos
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
    bytes_per_lane = (min(max_steps, jacobian.input_dim) + 1) * jacobian.input_dim * jacobian.dtype.itemsize
    parts = [_bias(chunk, prior, ridges, rtol, max_steps) for chunk, _ in jacobian.chunks(bytes_per_lane)]
    return torch.cat(parts, 1)


def _bias(
    jacobian: UpdateJacobian, prior: GaussianPrior, ridges: Sequence[float], rtol: float, max_steps: int
) -> Tensor:
    target = prior.coordinates(jacobian.private_inputs)
    lanczos = Lanczos(PriorGram(jacobian, prior), target, max_steps=max_steps)

    def solved(state: Lanczos) -> Tensor:
        y, t_coupling = _coefficients(state, min(ridges))
        last = y.gather(-1, (state.size - 1).clamp(min=0)[:, None]).squeeze(-1)
        return t_coupling * last.abs() <= rtol

    lanczos.run(solved, check_every=8)
    found = []
    for ridge in ridges:
        y, _ = _coefficients(lanczos, ridge)
        taken = torch.arange(y.shape[-1], device=y.device) < lanczos.size[:, None]
        weights = torch.where(taken, ridge * y * lanczos.start_norm.double()[:, None], 0.0).to(target)
        left = prior.root(torch.einsum("kud,uk->ud", lanczos.basis[: y.shape[-1]], weights))
        square = left.double().square().mean(-1)
        found.append(torch.where(lanczos.failed, torch.nan, square))
    return torch.stack(found)


def _coefficients(lanczos: Lanczos, ridge: float) -> tuple[Tensor, Tensor]:
    """Solution of (T + ε)y = e₁ `[U, K]`, and the coupling of the last step `[U]`."""
    t, coupling = lanczos.tridiagonal()
    eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
    solvable = torch.where(lanczos.failed[:, None, None], eye, t + ridge * eye)
    y, _ = torch.linalg.solve_ex(solvable, eye[:, 0].expand(len(t), -1))
    return y, coupling
