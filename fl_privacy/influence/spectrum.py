"""The spectral distribution of G = JᵀJ, and everything about leakage that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.lanczos import Lanczos, basis_bytes
from fl_privacy.influence.operators import InputOperator, PriorGram
from fl_privacy.influence.options import check_effort, per_unit
from fl_privacy.influence.prior import GaussianPrior
from fl_privacy.influence.quadrature import QuadratureRule, eigenvalue_rule, gauss_radau_rule, gauss_rule
from fl_privacy.interval import Interval

CONFIDENCE = 2.576
"""Half-width of the probes' part of an interval in standard errors: 99 % of a normal distribution."""
_STEPS_TO_LARGEST = 12
"""Lanczos steps that find λ_max(G) closely enough to say how far rounding reaches."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Spectral distribution of G of U audit units, known between two quadrature rules.

    With ε = σ²/τ² for noise of standard deviation σ per parameter and a prior of standard deviation τ per input
    element, the best linear-Gaussian attacker recovers the share

        leakage(σ) = (1/D) Σ λ/(λ + ε)

    of the private input's variance and misses each element by rmse(σ) = τ·√(1 − leakage(σ)).

    For a prior N(μ, τ²KKᵀ) with a covariance, the spectrum is that of M = KᵀGK, and its directions count by their share
    of the prior's variance:

        leakage(σ) = 1 − (1/D) tr K ε(M + ε)⁻¹ Kᵀ.

    Every interval holds three sources of doubt: the gap between the Gauss and the Gauss–Radau rule, the limited
    precision in which G is known (`resolution`), and, where traces were estimated from probes, 99 % of their sampling
    error. None exceeds P/D, the share that P numbers can determine of an input whose prior is white.

    Attributes:
        gauss: The rule that bounds leakage from above.
        radau: The rule that bounds leakage from below.
        input_dim: D.
        update_dim: P.
        resolution: Absolute error to which floating point knows the eigenvalues, `[U]`.
        products: Products with G spent on each unit, `[U]`.
        exact: Whether the rules hold every eigenvalue, so that nothing was sampled.
        coloured: Whether the prior has a covariance.
    """

    gauss: QuadratureRule
    radau: QuadratureRule
    input_dim: int
    update_dim: int
    resolution: Tensor
    products: Tensor
    exact: bool
    coloured: bool = False

    @property
    def num_units(self) -> int:
        """U."""
        return self.resolution.shape[0]

    @property
    def largest(self) -> Tensor:
        """λ_max(G) `[U]`, the largest node; at most the true one, and equal to it once Lanczos has converged."""
        return torch.where(self.failed, torch.nan, self.gauss.largest)

    @property
    def failed(self) -> Tensor:
        """Units `[U]` whose products were not finite; their numbers are NaN."""
        return self.gauss.weights.isnan().any(-1).any(0)

    def expand(self, num_units: int) -> Spectrum:
        """Returns the spectrum of one unit as that of many alike."""

        def repeat(rule: QuadratureRule) -> QuadratureRule:
            return QuadratureRule(rule.nodes.expand(-1, num_units, -1), rule.weights.expand(-1, num_units, -1))

        return replace(
            self,
            gauss=repeat(self.gauss),
            radau=repeat(self.radau),
            resolution=self.resolution.expand(num_units),
            products=self.products.expand(num_units),
        )

    def leakage(self, noise_std: float | Tensor, prior_std: float | Tensor) -> Interval[Tensor]:
        """Returns the share of the private input's variance that is recovered, each `[U]`, in [0, 1].

        Args:
            noise_std: σ, standard deviation per parameter of the noise on the shared update, number or `[U]`.
            prior_std: τ, standard deviation per element of the inputs' prior, number or `[U]`.
        """
        return self.leakage_at(self._ridge(noise_std, prior_std))

    def leakage_at(self, ridge: float | Tensor) -> Interval[Tensor]:
        """Returns the leakage at a given ε = σ²/τ², number or `[U]`."""
        lost = self._expectation(lambda nodes, ridge: _ratio(ridge, nodes + ridge), ridge)
        return Interval(1 - lost.upper, 1 - lost.value, 1 - lost.lower)

    def rmse(self, noise_std: float | Tensor, prior_std: float | Tensor) -> Interval[Tensor]:
        """Returns τ·√(1 − leakage), the predicted error per input element, each `[U]`, in units of the input."""
        tau = self._per_unit(prior_std, "prior_std")
        leakage = self.leakage(noise_std, prior_std)
        lower, value, upper = (tau * (1 - part).clamp(min=0).sqrt() for part in reversed(leakage))
        return Interval(lower, value, upper)

    def bias(self, noise_std: float | Tensor, prior_std: float | Tensor) -> Interval[Tensor]:
        """Returns ε²τ²·tr((G + ε)⁻²)/D, the mean squared error that the ridge's pull to the prior adds, each `[U]`."""
        tau = self._per_unit(prior_std, "prior_std")
        ridge = self._ridge(noise_std, prior_std)
        part = self._expectation(lambda nodes, ridge: _ratio(ridge, nodes + ridge) ** 2, ridge)
        return Interval(*(tau**2 * bound for bound in part))

    def effective_dimension(self, noise_std: float | Tensor, prior_std: float | Tensor) -> Interval[Tensor]:
        """Returns D·leakage, each `[U]`: for a white prior the number of directions of the input that are recovered."""
        return Interval(*(self.input_dim * part for part in self.leakage(noise_std, prior_std)))

    def required_noise_std(self, target_leakage: float | Tensor, prior_std: float | Tensor) -> Tensor:
        """Returns the σ `[U]` that brings leakage down to a target: the whole interval, not only its middle.

        0 where the target is met without noise (an update that does not determine the input).

        Args:
            target_leakage: Number or `[U]`.
            prior_std: τ, number or `[U]`.

        Raises:
            InvalidInputError: A target is not between 0 and 1.
        """
        target = self.check_target(target_leakage)
        tau = self._per_unit(prior_std, "prior_std")
        ridge = self.smallest_meeting(lambda ridge: self.leakage_at(ridge).upper <= target)
        sigma = tau * ridge.sqrt()
        return torch.where(self.failed, torch.nan, torch.where(self.meets(target), 0.0, sigma))

    def check_target(self, target_leakage: float | Tensor) -> Tensor:
        """Returns the targets as `[U]`.

        Raises:
            InvalidInputError: A target is not strictly between 0 and 1.
        """
        given = torch.as_tensor(target_leakage, dtype=torch.float64)
        if not ((given > 0) & (given < 1)).all():
            raise InvalidInputError(f"expected target_leakage strictly between 0 and 1, got {target_leakage}")
        return self._per_unit(target_leakage, "target_leakage")

    def meets(self, target: Tensor) -> Tensor:
        """Returns whether the undefended update leaks no more than a target `[U]` already, `[U]`."""
        return self.leakage_at(torch.zeros_like(target)).upper <= target

    def smallest_meeting(self, condition: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the smallest level `[U]` at which a condition holds that holds for all larger ones, by bisection.

        Levels are looked for between e^±40·λ_max.
        """
        scale = torch.where(self.failed, 1.0, self.largest.clamp(min=torch.finfo(torch.float64).tiny))
        low, high = torch.full_like(scale, -40.0), torch.full_like(scale, 40.0)
        for _ in range(80):
            middle = (low + high) / 2
            holds = condition(scale * middle.exp())
            low, high = torch.where(holds, low, middle), torch.where(holds, middle, high)
        return scale * high.exp()

    def resolved(self, ridge: float | Tensor) -> Tensor:
        """Returns whether floating point knows G well enough for this ε, `[U]`: ε is at least 10 times its error."""
        return self._per_unit(ridge, "ridge") >= 10 * self.resolution

    def gap(self, ridge: float | Tensor) -> Tensor:
        """Returns the distance `[U]` between the two rules' leakage at ε: what more Lanczos steps would close."""
        return rule_gap(self.gauss, self.radau, self._per_unit(ridge, "ridge"))

    def _expectation(self, f: Callable[[Tensor, Tensor], Tensor], ridge: float | Tensor) -> Interval[Tensor]:
        """(1/D) tr f(G) for a completely monotone f with values in [0, 1]."""
        eps = self._per_unit(ridge, "ridge")[None, :, None]
        doubt = self.resolution[None, :, None]
        low_values = f(self.gauss.nodes + doubt, eps)
        high_values = f((self.radau.nodes - doubt).clamp(min=0.0), eps)
        low = self.gauss.mean(low_values)
        high = torch.maximum(low, self.radau.mean(high_values))  # equal up to rounding, once Lanczos has converged
        spread = self._sampling_error(low_values, high_values)
        # At least D − P eigenvalues are 0, where f is 1; of how much of a coloured prior they are, nothing is known.
        floor = 0.0 if self.coloured else max(0.0, 1.0 - self.update_dim / self.input_dim)
        return Interval(*(part.clamp(floor, 1.0) for part in (low - spread, (low + high) / 2, high + spread)))

    def mean(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the estimate of (1/D) tr f(G) `[U]`, for f of eigenvalues `[S, U, K]`."""
        return (self.gauss.mean(f(self.gauss.nodes)) + self.radau.mean(f(self.radau.nodes))) / 2

    def mean_of_increasing(self, f: Callable[[Tensor], Tensor]) -> Interval[Tensor]:
        """Returns (1/D) tr f(G), each `[U]`, for an increasing f of eigenvalues `[S, U, K]` with values in [0, 1].

        f need not be smooth, so that the sides of the two rules say nothing. But the distribution function at a node of
        either lies between the weights strictly below it and those up to it (Chebyshev–Markov–Stieltjes), so moving
        every weight to the next node above or below bounds the mean.
        """
        doubt = self.resolution[None, :, None]
        # λ_max ≤ tr G, of which the probes see less than 1/16 in less than one case of a hundred.
        above_all = (
            16 * self.input_dim * self.mean(lambda nodes: nodes)[None, :, None].expand(len(self.gauss.nodes), -1, 1)
        )
        lower, upper = [], []
        for rule in (self.gauss, self.radau):
            low, high = f((rule.nodes - doubt).clamp(min=0.0)), f(rule.nodes + doubt)
            if not self.exact:
                low, high = rule.neighbours(low, high, bottom=f(torch.zeros_like(above_all)), top=f(above_all))
            lower.append(rule.mean_by_probe(low))
            upper.append(rule.mean_by_probe(high))
        value = self.mean(f).clamp(0.0, 1.0)
        spread = self._sampling_error(f(self.gauss.nodes), f(self.radau.nodes))
        least = torch.maximum(*lower).mean(0) - spread
        most = torch.minimum(*upper).mean(0) + spread
        return Interval(torch.minimum(least, value).clamp(min=0.0), value, torch.maximum(most, value).clamp(max=1.0))

    def _sampling_error(self, low_values: Tensor, high_values: Tensor) -> Tensor | float:
        """Half-width of the 99 % interval that sampling leaves of a mean over probes, `[U]`.

        Of a coloured prior only the probes themselves know: it is Student's, from their standard deviation.
        """
        if self.exact:
            return 0.0
        if not self.coloured:
            return CONFIDENCE * self._standard_error(low_values, high_values)
        count = len(self.gauss.nodes)
        spreads = [rule.mean_by_probe(v).std(0) for rule, v in ((self.gauss, low_values), (self.radau, high_values))]
        return student_quantile(count - 1) * torch.maximum(*spreads) / math.sqrt(count)

    def _standard_error(self, low_values: Tensor, high_values: Tensor) -> Tensor:
        """Standard error of the mean of qᵀf(G)q over S orthonormal random probes q, `[U]`.

        For q uniform on the sphere Var(qᵀFq) = 2·Var_λ(f)/(D + 2), with Var_λ the variance of f over the D
        eigenvalues; orthonormal probes bring a further factor (D − S)/(D − 1)/S. Var_λ is read off the rules.
        """
        variances = [
            rule.mean((values - rule.mean(values)[:, None]) ** 2)
            for rule, values in ((self.gauss, low_values), (self.radau, high_values))
        ]
        d, s = self.input_dim, self.gauss.nodes.shape[0]
        return (2 * torch.maximum(*variances) * (d - s) / ((d - 1) * s * (d + 2))).sqrt()

    def _ridge(self, noise_std: float | Tensor, prior_std: float | Tensor) -> Tensor:
        sigma = self._per_unit(noise_std, "noise_std")
        tau = self._per_unit(prior_std, "prior_std")
        if not (tau > 0).all():
            raise InvalidInputError(f"expected prior_std > 0, got {prior_std}: constant inputs have nothing to leak")
        return (sigma / tau) ** 2

    def _per_unit(self, value: float | Tensor, name: str) -> Tensor:
        return per_unit(value, name, num_units=self.num_units, device=self.resolution.device)


def rule_gap(gauss: QuadratureRule, radau: QuadratureRule, ridge: Tensor) -> Tensor:
    """Returns the distance between two rules' leakage at ε `[U]`, averaged over probes, `[U]`."""
    eps = ridge[None, :, None]
    lost_low = gauss.mean(_ratio(eps, gauss.nodes + eps))
    lost_high = radau.mean(_ratio(eps, radau.nodes + eps))
    return (lost_high - lost_low).clamp(min=0)


def estimate_spectrum(
    jacobian: InputOperator,
    *,
    num_probes: int = 4,
    rtol: float = 0.01,
    max_steps: int = 64,
    seed: int = 0,
    ridge: float | Tensor | None = None,
    prior: GaussianPrior | None = None,
) -> Spectrum:
    """Returns the spectral distribution of G of every unit, by stochastic Lanczos quadrature.

    Where the budget of `num_probes`·`max_steps` products per unit suffices for all D columns of G, its eigenvalues are
    computed instead, and nothing is sampled.

    With a coloured prior it is that of KᵀGK, which knows how the inputs' elements vary together: an attacker who has
    seen public examples recovers more than one who takes every element for independent of the others. Ask the spectrum
    with this prior's own `std`.

    Args:
        jacobian: U units, or another operator on their inputs.
        num_probes: Random orthonormal start vectors per unit.
        rtol: A unit's Lanczos iteration stops when the Gauss and Gauss–Radau values of its leakage at `ridge` are this
            close.
        max_steps: Most Lanczos steps per probe.
        seed: Of the probes.
        ridge: The smallest ε that will be asked for, number or `[U]`. Default: where leakage begins to be limited by
            floating point (1e-6·λ_max in float32, 1e-12·λ_max in float64), the most that can be known.
        prior: Whose covariance is taken into account. Default: a white one, whose mean and std do not matter here.

    Raises:
        InvalidInputError: An option is out of range, or the prior is of other examples, or fewer than 4 probes are to
            sample the traces of a coloured one.
        NotTwiceDifferentiableError: From the Jacobian.
    """
    if num_probes < 1:
        raise InvalidInputError(f"expected num_probes >= 1, got {num_probes}")
    check_effort(rtol=rtol, max_steps=max_steps)
    floor = per_unit(0.0 if ridge is None else ridge, "ridge", num_units=jacobian.num_units, device=jacobian.device)
    coloured = None if prior is None or prior.covariance is None else prior
    if jacobian.input_dim <= num_probes * max_steps:
        return _exact_spectrum(jacobian, coloured)
    if coloured is not None and num_probes < 4:
        raise InvalidInputError(
            f"expected num_probes >= 4, got {num_probes}: with a coloured prior nothing but how they differ says how "
            "far they can be trusted"
        )
    # As many units at once as fit with their probes: the graphs of a pass, and the Krylov bases.
    bytes_per_lane = basis_bytes(jacobian.input_dim, jacobian.dtype, max_steps)
    parts = [
        _sampled_spectrum(chunk, coloured, num_probes, rtol, max_steps, seed, floor[units])
        for chunk, units in jacobian.chunks(bytes_per_lane, lanes_per_unit=num_probes)
    ]
    return _joined(parts)


def _exact_spectrum(jacobian: InputOperator, prior: GaussianPrior | None) -> Spectrum:
    dim, units = jacobian.input_dim, jacobian.num_units
    rules = [_dense_rule(dense_gram(jacobian, unit), prior) for unit in range(units)]
    rule = QuadratureRule(*(torch.cat(parts, 1) for parts in zip(*((r.nodes, r.weights) for r in rules), strict=True)))
    spent = torch.full((units,), dim, device=jacobian.device)
    resolution = _resolution(rule, jacobian, prior)
    coloured = prior is not None
    return Spectrum(rule, rule, dim, jacobian.update_dim, resolution, spent, exact=True, coloured=coloured)


def _dense_rule(gram: Tensor, prior: GaussianPrior | None) -> QuadratureRule:
    if prior is None:
        return eigenvalue_rule(gram[None])
    double = prior.to(torch.float64)
    gram = double.root_transpose(double.root_transpose(gram).mT).mT  # G is symmetric: rows of GK, then of KᵀGK
    variances = double.variances(len(gram))
    return eigenvalue_rule(((gram + gram.mT) / 2)[None], variances / len(gram))


def dense_gram(operator: InputOperator, unit: int) -> Tensor:
    """Returns G of one unit, `[D, D]` in float64, for inputs small enough to hold it.

    From the columns J·e_i where all of them fit into half the memory budget: that takes half the derivatives. This is
    the one place that holds a Jacobian, for inputs so small that it is no larger than a graph.
    """
    dim = operator.input_dim
    identity = torch.eye(dim, dtype=operator.dtype, device=operator.device)
    lanes = min(dim, operator.lanes_per_pass)
    repeated = operator.select(torch.full((lanes,), unit, device=operator.device))  # one linearisation for all columns
    fits = isinstance(repeated, UpdateJacobian) and (
        2 * dim * repeated.update_dim * repeated.dtype.itemsize <= repeated.memory_budget
    )
    product = repeated.jvp if isinstance(repeated, UpdateJacobian) and fits else repeated.gram
    rows = []
    for columns in torch.split(identity, lanes):
        full = columns if len(columns) == lanes else identity[-lanes:]  # the last chunk overlaps the one before it
        rows.append(product(full)[lanes - len(columns) :])
    found = torch.cat(rows).double()
    gram = found @ found.T if fits else found
    return (gram + gram.T) / 2


def _sampled_spectrum(
    jacobian: InputOperator,
    prior: GaussianPrior | None,
    num_probes: int,
    rtol: float,
    max_steps: int,
    seed: int,
    ridge: Tensor,
) -> Spectrum:
    units = torch.arange(jacobian.num_units, device=jacobian.device)
    operator = jacobian if prior is None else PriorGram(jacobian, prior)
    probes = _orthonormal_probes if prior is None else partial(_prior_probes, prior)
    start = probes(jacobian, num_probes, seed).repeat_interleave(len(units), 0)
    lanczos = Lanczos(operator.select(units.repeat(num_probes)), start, max_steps=max_steps)
    unknowable = 1e-6 if jacobian.dtype == torch.float32 else 1e-12

    def precise_enough(state: Lanczos) -> Tensor:
        gauss, radau = gauss_rule(state, num_probes), gauss_radau_rule(state, num_probes)
        floor = torch.maximum(ridge, unknowable * gauss.largest)
        return (rule_gap(gauss, radau, floor) <= rtol).repeat(num_probes)

    lanczos.run(precise_enough)
    gauss, radau = gauss_rule(lanczos, num_probes), gauss_radau_rule(lanczos, num_probes)
    spent = lanczos.size.reshape(num_probes, -1).sum(0)
    resolution = _resolution(gauss, jacobian, prior)
    coloured = prior is not None
    dim = jacobian.input_dim
    return Spectrum(gauss, radau, dim, jacobian.update_dim, resolution, spent, exact=False, coloured=coloured)


def _resolution(rule: QuadratureRule, jacobian: InputOperator, prior: GaussianPrior | None) -> Tensor:
    # A product with G is right to a unit of rounding of its largest eigenvalue (measured 1e-7 in float32); the
    # eigenvalues of a matrix or a recurrence, found in float64, are to about √D units.
    rounding, dim = torch.finfo(jacobian.dtype).eps, jacobian.input_dim
    found = math.sqrt(dim) * torch.finfo(torch.float64).eps * rule.largest
    if prior is None:
        return rounding * rule.largest + found
    # That of KᵀGK is what rounding of G becomes between the roots: λ_max(KKᵀ)·λ_max(G), which may exceed its own.
    return rounding * prior.variances(dim).max() * _largest(jacobian) + found


def _largest(jacobian: InputOperator) -> Tensor:
    """A close lower estimate of λ_max(G) `[U]`."""
    start = _orthonormal_probes(jacobian, 1, 0).repeat(jacobian.num_units, 1)
    lanczos = Lanczos(jacobian, start, max_steps=_STEPS_TO_LARGEST)
    lanczos.run(lambda state: torch.zeros_like(state.failed))
    return gauss_rule(lanczos, 1).largest


def student_quantile(freedom: int) -> float:
    """Returns the half-width of a 99 % interval of Student's t, to 1 % from 3 degrees of freedom on.

    From that of the normal distribution by its expansion (Abramowitz and Stegun 26.7.5).
    """
    z, n = CONFIDENCE, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / n**k for k, term in enumerate(terms, start=1))


def _prior_probes(prior: GaussianPrior, jacobian: InputOperator, num_probes: int, seed: int) -> Tensor:
    """Random vectors Kᵀw `[S, D]` with E wwᵀ = I, the same for every unit: w is ±1 along every principal direction.

    All have the same length, ‖Kᵀw‖² = tr KKᵀ, so that the trace itself is not sampled.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (num_probes, jacobian.input_dim), generator=generator, dtype=torch.float64) * 2 - 1
    return signs.to(jacobian.device, jacobian.dtype) * prior.variances(jacobian.input_dim).sqrt()


def _orthonormal_probes(jacobian: InputOperator, num_probes: int, seed: int) -> Tensor:
    """Random orthonormal vectors `[S, D]`, the same for every unit, each uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(jacobian.input_dim, num_probes, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    probes: Tensor = (q * torch.sign(torch.diagonal(r))).T.to(jacobian.device, jacobian.dtype)
    return probes


def _joined(parts: list[Spectrum]) -> Spectrum:
    """One spectrum of the units of several; shorter rules are padded with nodes of weight zero."""
    if len(parts) == 1:
        return parts[0]

    def join(rules: list[QuadratureRule]) -> QuadratureRule:
        length = max(rule.nodes.shape[-1] for rule in rules)
        pad = [(0, length - rule.nodes.shape[-1]) for rule in rules]
        nodes = [torch.nn.functional.pad(rule.nodes, p) for rule, p in zip(rules, pad, strict=True)]
        weights = [torch.nn.functional.pad(rule.weights, p) for rule, p in zip(rules, pad, strict=True)]
        return QuadratureRule(torch.cat(nodes, 1), torch.cat(weights, 1))

    first = parts[0]
    return Spectrum(
        join([p.gauss for p in parts]),
        join([p.radau for p in parts]),
        first.input_dim,
        first.update_dim,
        torch.cat([p.resolution for p in parts]),
        torch.cat([p.products for p in parts]),
        exact=first.exact,
        coloured=first.coloured,
    )


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator/denominator with 0/0 = 1: at ε = 0 an eigenvalue of 0 recovers nothing."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=math.ulp(0.0)), 1.0)
