"""The audit at public examples: what an update of that norm would give away if they had been behind it.

J is taken at public examples in place of the client's own. The noise that an example needs for a leakage, over the norm
of its update, σ/‖u‖, varies less between examples than either does. So public batches like the client's, with as many
examples of each label as its update shows if it does, are scaled to the norm of the update that arrived:

    σ of the client ≈ median over public batches of σ/‖u‖, times the client's ‖u‖.

Where examples do not interact, a batch's update is the mean of its examples' gradients and an example's Jacobian in it
is its own over N. So the Jacobians of some public examples and the inner products of their gradients, found once a
round, give any number of batches of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.jacobian import DEFAULT_MEMORY_BUDGET, UpdateJacobian
from fl_privacy.influence.spectrum import Spectrum, estimate_spectrum
from fl_privacy.influence.update import UpdateMap
from fl_privacy.interval import Interval

_DRAWS, _NEAREST = 512, 64
"""Public batches drawn for a client, and how many of them, those most like its update, are kept."""
_SINGLE_SHARE = 0.5
"""Share of the public examples of one label that is kept for an update of one example."""
_RIDGES, _CURVE_POINTS = (-30.0, 10.0), 161
"""Logarithms of the least and the largest ε of public examples' curves, over the largest λ_max, and their points."""
COVERAGE = 0.9
"""Share of the public batches whose values an interval holds."""


@dataclass(frozen=True, eq=False)
class ObservedUpdate:
    """What is known of an update whose batch is not.

    Attributes:
        squared_norms: Of each parameter's part `[L]`, with the energy of the noise taken out.
        norm: Its norm, likewise, with two standard errors.
        noise_std: σ on each parameter, with two standard errors.
        size: N, of the batch behind it.
        label_counts: How often each class occurs in it `[C]`; `None`: not known.
    """

    squared_norms: Tensor
    norm: Interval[float]
    noise_std: Interval[float]
    size: int
    label_counts: Tensor | None = None

    @classmethod
    def of(
        cls,
        shared: Tensor,
        sizes: list[int],
        *,
        size: int,
        label_counts: Tensor | None = None,
        noise_std: float = 0.0,
        noise_error: float = 0.0,
    ) -> ObservedUpdate:
        """Returns what a shared update `[P]` shows.

        Args:
            shared: As it arrived.
            sizes: Entries of each parameter, which add up to P.
            size: Number of examples behind it.
            label_counts: How often each class occurs among them `[C]`.
            noise_std: Standard deviation of the noise on each parameter.
            noise_error: Standard error of that, relative to it.
        """
        squares = torch.stack([part.double().square().sum() for part in torch.split(shared, sizes)])
        entries = torch.tensor(sizes, dtype=torch.float64, device=shared.device)
        signal = (squares - noise_std**2 * entries).clamp(min=0)
        # The noise's energy is known to twice the relative error of σ, and fluctuates; so does its share along u.
        power, total = noise_std**2 * len(shared), float(squares.sum())
        left = total - power
        doubt = 2 * math.sqrt(
            (2 * noise_error * power) ** 2 + 2 * noise_std**2 * power + 4 * noise_std**2 * max(left, 0.0)
        )
        lower, value, upper = (math.sqrt(max(left + sign * doubt, 0.0)) for sign in (-1, 0, 1))
        spread = min(2 * noise_error, 1.0)
        noise = Interval(noise_std * (1 - spread), noise_std, noise_std * (1 + spread))
        return cls(signal, Interval(lower, value, upper), noise, size, label_counts)

    @property
    def drowned(self) -> bool:
        """Whether the noise is so strong that the update's own norm is not known."""
        return self.norm.lower == 0


@dataclass(frozen=True, eq=False)
class ProxyPrediction:
    """What public batches say of an update.

    Attributes:
        leakage: Of the most exposed example: median over public batches like the one behind the update, and where
            90 % of all public batches of its size lie, whatever their labels.
        required_noise_std: Noise for the target, likewise.
        batches: Number of public batches behind the median.
    """

    leakage: Interval[float]
    required_noise_std: Interval[float]
    batches: int


@dataclass(frozen=True, eq=False)
class PublicJacobians:
    """Public examples at one θ: the spectrum of each, and how their gradients add up.

    Attributes:
        spectrum: Of B examples, of the gradient of each alone.
        labels: `[B]`.
        grams: Inner products of their gradients, parameter by parameter, `[L, B, B]`.
        log_ridge: Evenly spaced log ε `[K]`.
        curves: Leakage of each alone at these, `[K, B]`.
    """

    spectrum: Spectrum
    labels: Tensor
    grams: Tensor
    log_ridge: Tensor
    curves: Interval[Tensor]

    @classmethod
    def of(
        cls,
        update: UpdateMap,
        params: Mapping[str, Tensor],
        inputs: Tensor,
        labels: Tensor,
        *,
        num_probes: int = 4,
        rtol: float = 0.01,
        max_steps: int = 64,
        seed: int = 0,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        before_pass: Callable[[], None] | None = None,
    ) -> PublicJacobians:
        """Returns them for public examples.

        Args:
            update: The gradient as an update map.
            params: θ by name.
            inputs: `[B, *shape]`.
            labels: `[B]`.
            num_probes: As for `estimate_spectrum`.
            rtol: As there.
            max_steps: As there.
            seed: As there.
            memory_budget: As for `UpdateJacobian`.
            before_pass: As there.
        """
        jacobian = UpdateJacobian(
            update, params, inputs[:, None], labels[:, None], memory_budget=memory_budget, before_pass=before_pass
        )
        parts = torch.split(jacobian.update(), update.layout.sizes, dim=1)
        grams = torch.stack([(part @ part.T).double() for part in parts])
        spectrum = estimate_spectrum(jacobian, num_probes=num_probes, rtol=rtol, max_steps=max_steps, seed=seed)
        largest = float(spectrum.largest.nan_to_num(0.0).amax().clamp(min=torch.finfo(torch.float64).tiny))
        log_ridge = math.log(largest) + torch.linspace(*_RIDGES, _CURVE_POINTS, dtype=torch.float64)
        found = [spectrum.leakage_at(ridge) for ridge in log_ridge.exp().tolist()]
        curves = Interval(*(torch.stack(part) for part in zip(*found, strict=True)))
        return cls(spectrum, labels, grams, log_ridge.to(labels.device), curves)

    def predict(
        self, observed: ObservedUpdate, *, target_leakage: float, prior_std: float, seed: int = 0, match: bool = True
    ) -> ProxyPrediction:
        """Returns what public batches like the one behind an update say of it.

        Args:
            observed: The update.
            target_leakage: For which noise is asked.
            prior_std: τ.
            seed: Of the draws of batches.
            match: Whether to keep those batches only whose update is spread over the parameters as the observed one is.

        Raises:
            InvalidInputError: The update is zero, or the public examples' gradients are.
        """
        if not observed.norm.upper > 0:
            raise InvalidInputError("expected an update that is not zero: there is nothing to scale to")
        generator = torch.Generator().manual_seed(seed)
        every = self._with_gradients(self._draw(replace(observed, label_counts=None), generator))
        alike = self._with_gradients(self._draw(observed, generator))
        if match:
            alike = self._nearest(alike, observed)
        single = self.spectrum.required_noise_std(target_leakage, prior_std)
        norm, noise = observed.norm, observed.noise_std
        at_most, at_best = self._ratios(every, observed.size, single), self._ratios(alike, observed.size, single)
        needed = _interval(at_most * norm.lower, at_best * norm.value, at_most * norm.upper)
        least = self._leakage(every, observed.size, noise.upper, norm.lower, prior_std)
        middle = self._leakage(alike, observed.size, noise.value, norm.value, prior_std)
        most = self._leakage(every, observed.size, noise.lower, norm.upper, prior_std)
        return ProxyPrediction(_interval(least.lower, middle.value, most.upper), needed, len(alike))

    def _ratios(self, batches: Tensor, size: int, single: Tensor) -> Tensor:
        """Returns σ/‖u‖ of batches `[R]`; an example's Jacobian in a batch is its own over N."""
        norms = self._squared_norms(batches).sum(0).sqrt()
        return torch.where(batches > 0, single, 0.0).amax(1) / (size * norms)

    def _with_gradients(self, batches: Tensor) -> Tensor:
        found = batches[self._squared_norms(batches).sum(0) > 0]
        if not len(found):
            raise InvalidInputError("expected public examples with gradients, got none that is not zero")
        return found

    def _leakage(self, batches: Tensor, size: int, noise_std: float, norm: float, prior_std: float) -> Interval[Tensor]:
        """Returns the leakage `[R]` of each batch's most exposed example, scaled to a norm, under noise."""
        inside, norms = batches > 0, self._squared_norms(batches).sum(0).sqrt()
        if noise_std > 0:  # σ in the scale of a single example's own gradient
            sigma = noise_std * size * norms / max(norm, torch.finfo(norms.dtype).tiny)
            parts = self._leakage_at((sigma / prior_std) ** 2)
        else:
            parts = Interval(*(part.expand(inside.shape) for part in self.spectrum.leakage_at(0.0)))
        return Interval(*(torch.where(inside, part, 0.0).amax(1) for part in parts))

    def _leakage_at(self, ridge: Tensor) -> Interval[Tensor]:
        """Returns the leakage of every public example at each of many ε `[R]`, `[R, B]`, read off the curves."""
        position = (ridge.log() - self.log_ridge[0]) / (self.log_ridge[1] - self.log_ridge[0])
        position = position.nan_to_num(posinf=math.inf).clamp(0, len(self.log_ridge) - 1)
        below = position.floor().long().clamp(max=len(self.log_ridge) - 2)
        share = (position - below)[:, None]
        return Interval(*((1 - share) * part[below] + share * part[below + 1] for part in self.curves))

    def _draw(self, observed: ObservedUpdate, generator: torch.Generator) -> Tensor:
        """Returns how often each public example occurs in random batches, `[R, B]`, each once where one is behind."""
        labels, size = self.labels.cpu(), observed.size
        everything = torch.arange(len(labels))
        wanted: list[tuple[Tensor, int]] = []  # of which public examples how many
        for label, count in enumerate([] if observed.label_counts is None else observed.label_counts.tolist()):
            members = (labels == label).nonzero().squeeze(1)
            if count > 0:
                wanted.append((members if len(members) else everything, int(count)))
        wanted = wanted or [(everything, size)]
        if size == 1:
            return torch.eye(len(labels), dtype=torch.float64)[wanted[0][0]].to(self.grams)
        drawn = torch.zeros(_DRAWS, len(labels), dtype=torch.float64)
        for pool, count in wanted:
            # Whole rounds through the pool, and the rest of them without repetition.
            drawn[:, pool] += count // len(pool)
            order = torch.rand(_DRAWS, len(pool), generator=generator).argsort(1)[:, : count % len(pool)]
            drawn.scatter_add_(1, pool[order], torch.ones(order.shape, dtype=torch.float64))
        return drawn.to(self.grams)

    def _nearest(self, batches: Tensor, observed: ObservedUpdate) -> Tensor:
        """Keeps the batches whose update is spread over the parameters most like the observed one."""
        keep = _NEAREST if observed.size > 1 else max(5, math.ceil(_SINGLE_SHARE * len(batches)))
        total = observed.squared_norms.sum()
        if len(batches) <= keep or not total > 0 or observed.drowned:
            return batches
        squares = self._squared_norms(batches)
        shares = squares / squares.sum(0).clamp(min=torch.finfo(squares.dtype).tiny)
        seen = (observed.squared_norms.to(squares) / total)[:, None]
        distance = (shares.sqrt() - seen.sqrt()).square().sum(0)  # Hellinger's
        return batches[distance.argsort()[:keep]]

    def _squared_norms(self, batches: Tensor) -> Tensor:
        """Returns the squared norm of each parameter's part of batches' mean gradients, `[L, R]`."""
        weights = batches / batches.sum(1, keepdim=True)
        return ((weights @ self.grams) * weights).sum(-1).clamp(min=0)


def _interval(least: Tensor, middle: Tensor, most: Tensor) -> Interval[float]:
    """Returns the median of what is most likely, and between which quantiles `COVERAGE` of what is possible lies."""
    tail = (1 - COVERAGE) / 2
    value = float(middle.double().median())
    lower, upper = float(least.double().quantile(tail)), float(most.double().quantile(1 - tail))
    return Interval(min(lower, value), value, max(upper, value))
