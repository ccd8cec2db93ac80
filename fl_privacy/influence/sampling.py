"""Draws of shaped input noise, a = h(G)^½ z, by Lanczos iteration from random z: without an eigenvector of G."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.lanczos import Lanczos, basis_bytes
from fl_privacy.influence.operators import InputOperator
from fl_privacy.influence.options import check_effort
from fl_privacy.influence.recommendation import NoiseRecommendation


@dataclass(frozen=True, eq=False, kw_only=True)
class InputNoise:
    """One draw of shaped input noise per unit, and how truly it follows its law.

    Where the iteration was cut short, its draw a_K misses h(G)^½ z by e, and protection is made up for rather than
    lost: for every t > 0, cov(h(G)^½ z) ⪯ (1 + t)·cov(a_K) + (1 + 1/t)·cov(e), so the draw is scaled by √(1 + t) and
    white noise of variance (1 + 1/t)·‖e‖²/D is added, t being the split that costs the update least. Where even that
    costs more than white noise for the same target, which needs no iteration, it is white noise that is drawn.

    Attributes:
        noise: a `[U, D]`, with what was added to make up for `residual`; zero where the target is met without noise.
        residual: ‖e‖/‖a‖ of the draw alone, `[U]`: how far it still moved while the Krylov space doubled, which is an
            estimate of the error of the smaller space, and so a cautious one of that of the larger; 0 where the space
            is exhausted, and 1 after a single step, which says nothing: white noise is then drawn.
        converged: Whether the residual is within the tolerance, `[U]`.
        scale: √(1 + t) `[U]`; 0 where white noise alone was drawn. Of a batch that is drawn example by example, the
            least of any.
        white_std: Standard deviation of the white noise in it, `[U]`; likewise the least of any example.
        expected_norm: Expected change of the update to first order, `[U]`, with both; `shaped_norm` without.
        products: Products with G spent on each unit, `[U]`.
    """

    noise: Tensor
    residual: Tensor
    converged: Tensor
    scale: Tensor
    white_std: Tensor
    expected_norm: Tensor
    products: Tensor

    def variance(self, recommendation: NoiseRecommendation, eigenvalue: Tensor) -> Tensor:
        """Returns the variance along eigenvectors of G with what makes up for the residual, scale²·h(λ) + white_std².

        Args:
            recommendation: The law that was drawn from, h.
            eigenvalue: λ ≥ 0, `[..., U, K]` as the nodes of a spectrum are.
        """
        return self.scale[:, None] ** 2 * recommendation.variance(eigenvalue) + self.white_std[:, None] ** 2


def sample_input_noise(
    jacobian: InputOperator,
    recommendation: NoiseRecommendation,
    seed: int | None = None,
    *,
    public: InputOperator | None = None,
) -> Tensor:
    """Returns a ~ N(0, h(G)) `[U, D]`; `jacobian.shifted(a).update()` is what to share. See `draw_input_noise`."""
    return draw_input_noise(jacobian, recommendation, seed, public=public).noise


def draw_input_noise(
    jacobian: InputOperator,
    recommendation: NoiseRecommendation,
    seed: int | None = None,
    *,
    public: InputOperator | None = None,
    rtol: float = 0.01,
    max_steps: int = 256,
) -> InputNoise:
    """Returns a draw of the recommended input noise for every unit, with how well it was computed.

    Args:
        jacobian: The U units that are to be protected.
        recommendation: For these units.
        seed: Of the draw; `None` takes one from the operating system. **Whoever knows the seed knows the noise**: in
            earnest, leave it out, or draw it where nobody else can.
        public: The operator of the public spectrum that the recommendation was made with (`MeanGram`, one unit); its
            noise is drawn example by example where a whole batch is private.
        rtol: Tolerance on `residual`.
        max_steps: Most products per draw. High targets leave most directions alone and need many: D always suffice.

    Raises:
        InvalidInputError: The recommendation is for other units, has units without a spectrum, or follows a covariance
            that was not given; an option is out of range.
        NotTwiceDifferentiableError: From the Jacobian.
    """
    check_effort(rtol=rtol, max_steps=max_steps)
    _check(jacobian, recommendation, public)
    if public is None:
        operator, per_unit = jacobian, 1
    else:
        per_unit = jacobian.input_dim // public.input_dim
        operator = public.select(torch.zeros(jacobian.num_units * per_unit, dtype=torch.long, device=public.device))
    law = recommendation.select(torch.arange(jacobian.num_units, device=jacobian.device).repeat_interleave(per_unit))
    draws = (operator.num_units, operator.input_dim)
    generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
    z, white = (torch.randn(draws, generator=generator, dtype=torch.float64).to(operator.device) for _ in range(2))
    bytes_per_lane = basis_bytes(operator.input_dim, operator.dtype, max_steps)
    parts = [
        _draw(chunk, law.select(units), z[units], white[units], rtol, max_steps)
        for chunk, units in operator.chunks(bytes_per_lane)
    ]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    if per_unit == 1:
        return InputNoise(**joined)
    by_unit = {name: value.reshape(jacobian.num_units, per_unit, -1).squeeze(-1) for name, value in joined.items()}
    return InputNoise(
        noise=joined["noise"].reshape(jacobian.num_units, -1),
        converged=by_unit["converged"].all(-1),
        products=by_unit["products"].sum(-1),
        # Units of one law whose examples differ by their draws alone: the worst residual, no noise that one lacks, and
        # the mean cost.
        residual=by_unit["residual"].amax(-1),
        **{name: by_unit[name].amin(-1) for name in ("scale", "white_std")},
        expected_norm=by_unit["expected_norm"].square().mean(-1).sqrt(),
    )


def _draw(
    operator: InputOperator, law: NoiseRecommendation, z: Tensor, white: Tensor, rtol: float, max_steps: int
) -> InputNoise:
    start = torch.where(law.already_met[:, None], 0.0, z).to(operator.dtype)  # no iteration where no noise is needed
    lanczos = Lanczos(operator, start, max_steps=max_steps)
    lanczos.run(lambda state: _coefficients(state, law)[1] <= rtol)
    y, residual = _coefficients(lanczos, law)
    if lanczos.failed.any():
        raise InvalidInputError(
            "expected finite products with G, got NaN or infinity in units "
            f"{lanczos.failed.nonzero().squeeze(-1).tolist()[:5]}: these units must not be shared"
        )
    drawn = lanczos.start_norm.double()[:, None] * torch.einsum("kud,uk->ud", lanczos.basis[: y.shape[-1]].double(), y)
    mean_square = drawn.square().mean(-1)
    # The split t that costs the update least: (1 + t)·shaped² + (1 + 1/t)·residual²·white², white² the squared change
    # by white noise of the draw's own power.
    uniform = law.white_std**2
    white_square = torch.where(uniform > 0, law.white_norm**2 * mean_square / uniform, 0.0)
    relative = torch.where(law.shaped_norm > 0, white_square.sqrt() / law.shaped_norm, 1.0).clamp(min=1.0)
    t = residual * relative
    added = torch.where(residual > 0, (1 + 1 / t.clamp(min=torch.finfo(t.dtype).tiny)) * residual**2, 0.0)
    norm = ((1 + t) * law.shaped_norm**2 + added * white_square).sqrt()
    # Where making up for it costs more, or nothing is known of what is missing, white noise for the same target, which
    # needs no iteration at all.
    unknown = (mean_square == 0) | (lanczos.size < 2)
    gives_up = ((norm > law.white_norm) | unknown) & ~law.already_met & (residual > 0)
    scale = torch.where(gives_up, 0.0, (1 + t).sqrt())
    white_std = torch.where(gives_up, law.white_std, (added * mean_square).sqrt())
    noise = scale[:, None] * drawn + white_std[:, None] * white
    return InputNoise(
        noise=torch.where(law.already_met[:, None], 0.0, noise).to(operator.dtype),
        residual=residual,
        converged=residual <= rtol,
        scale=scale,
        white_std=white_std,
        expected_norm=torch.where(gives_up, law.white_norm, norm),
        products=lanczos.size,
    )


def _coefficients(state: Lanczos, law: NoiseRecommendation) -> tuple[Tensor, Tensor]:
    """h(T)^½ e₁ `[U, K]`, and the relative distance to its value at half as many steps, `[U]`."""
    t, coupling = state.tridiagonal()
    whole = _root_column(t, law)
    half = (state.size // 2).clamp(min=1)
    taken = torch.arange(t.shape[-1], device=t.device) < half[:, None]
    part = _root_column(torch.where(taken[:, :, None] == taken[:, None, :], t, 0.0), law)
    norm = torch.linalg.vector_norm(whole, dim=-1)
    moved = torch.linalg.vector_norm(whole - part, dim=-1)
    # No noise at all so far says only that the small eigenvalues have not been reached, and a single step is its own
    # half: all of it is missing.
    known = (norm > 0) & (state.size > 1)
    relative = torch.where(known, moved / norm.clamp(min=torch.finfo(norm.dtype).tiny), 1.0)
    return whole, torch.where(coupling == 0, 0.0, relative)


def _root_column(t: Tensor, law: NoiseRecommendation) -> Tensor:
    nodes, vectors = torch.linalg.eigh(t)
    root = law.variance(nodes.clamp(min=0.0)).sqrt()
    column: Tensor = torch.einsum("ukj,uj->uk", vectors, root * vectors[:, 0, :])
    return column


def _check(jacobian: InputOperator, recommendation: NoiseRecommendation, public: InputOperator | None) -> None:
    if recommendation.num_units != jacobian.num_units:
        raise InvalidInputError(
            f"expected a recommendation for {jacobian.num_units} units, got one for {recommendation.num_units}"
        )
    if recommendation.failed.any():
        raise InvalidInputError(
            "expected a recommendation for every unit, got none for units "
            f"{recommendation.failed.nonzero().squeeze(-1).tolist()[:5]}, whose spectrum is not finite: leave them out "
            "with select(), and share nothing of theirs"
        )
    if (public is None) != (recommendation.covariance == "own"):
        raise InvalidInputError(
            f"expected the operator of a recommendation whose covariance is {recommendation.covariance!r}, got "
            f"public={'None' if public is None else type(public).__name__}: give the operator that was recommended with"
        )
    if public is not None and jacobian.input_dim % public.input_dim:
        raise InvalidInputError(
            f"expected a public operator of examples that make up inputs of {jacobian.input_dim} elements, got "
            f"{public.input_dim}"
        )
