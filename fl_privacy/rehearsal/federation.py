"""A federation that shares gradients, in one process: what it learns under noise, and what its shares tell together.

Every client shares the gradient of all its examples in every round. Leakage is of one example, whose rest of the batch
the attacker knows, over all rounds together: the information of several shares adds up, G_1/σ_1² + ... + G_T/σ_T².
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fl_privacy.attacks import GaussianPrior
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.operators import GramSum, MeanGram
from fl_privacy.influence.quadrature import eigenvalue_rule
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.spectrum import Spectrum, dense_gram, estimate_spectrum
from fl_privacy.influence.update import GradientUpdate

Parameters = dict[str, Tensor]

_FORMED = 1024
"""Elements of the largest input whose G is formed; of larger ones it is known by products, and leakage is sampled."""
_AT_ONCE = 1024
"""Examples whose gradient is taken at once."""


@dataclass(frozen=True, eq=False)
class Federation:
    """Clients' examples together, the model that they train, and how.

    Attributes:
        model: A classifier, trained by cross-entropy.
        private: Inputs `[M, *shape]` and labels `[M]` of all clients.
        public: Inputs and labels that shape noise on inputs.
        test: Inputs and labels on which accuracy is told.
        prior: What an attacker believes of inputs.
        num_rounds: T.
        lr: The server's learning rate.
        momentum: The server's momentum.
        num_audited: How many examples, the first ones, are followed over the run.
        checkpoints: Rounds at which they are; those between are interpolated.
        relu_width: Of rounded ReLUs in J, as audits have it; 0: the network's own J.
    """

    model: nn.Module
    private: tuple[Tensor, Tensor]
    public: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    prior: GaussianPrior
    num_rounds: int
    lr: float
    momentum: float
    num_audited: int
    checkpoints: int
    relu_width: float

    @cached_property
    def start(self) -> Parameters:
        """The parameters before the first round."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @cached_property
    def start_spectrum(self) -> Spectrum:
        """Of G of the audited examples, before the first round."""
        return together([self.audited(self.start)], [1.0])

    @cached_property
    def public_law(self) -> tuple[Spectrum, Tensor, Tensor]:
        """Spectrum, eigenvalues and eigenvectors of the public examples' covariance, at the start."""
        jacobian = self.jacobian(self.start, *self.public)
        gram = formed(jacobian).mean(0)
        return exact_spectrum(gram[None], MeanGram(jacobian).update_dim), *torch.linalg.eigh(gram)

    @cached_property
    def checked_rounds(self) -> list[int]:
        """The rounds, counted from 0, at which audited examples are followed."""
        places = torch.linspace(0, self.num_rounds - 1, min(self.checkpoints, self.num_rounds))
        return places.round().long().tolist()

    def loss(self, params: Parameters, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean cross-entropy."""
        outputs: Tensor = functional_call(self.model, params, (x,))
        return nn.functional.cross_entropy(outputs, y)

    def gradient(self, params: Parameters, x: Tensor, y: Tensor) -> Parameters:
        """Returns the gradient of the mean loss of all examples: the average over clients of one size."""
        if len(x) <= _AT_ONCE:
            whole: Parameters = grad(self.loss)(params, x, y)
            return whole
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for inputs, labels in zip(torch.split(x, _AT_ONCE), torch.split(y, _AT_ONCE), strict=True):
            for name, g in grad(self.loss)(params, inputs, labels).items():
                total[name] += g * (len(inputs) / len(x))
        return total

    def accuracy(self, params: Parameters) -> float:
        """Returns the share of the test examples that are classified rightly."""
        right, (x, y) = 0, self.test
        with torch.no_grad():
            for inputs, labels in zip(torch.split(x, 2 * _AT_ONCE), torch.split(y, 2 * _AT_ONCE), strict=True):
                outputs: Tensor = functional_call(self.model, params, (inputs,))
                right += int((outputs.argmax(1) == labels).sum())
        return right / len(x)

    def audited(self, params: Parameters) -> Share:
        """Returns what one share at some parameters tells of the audited examples."""
        x, y = self.private
        chosen = slice(0, self.num_audited)
        jacobian = self.jacobian(params, x[chosen], y[chosen])
        return Share(jacobian, formed(jacobian) if jacobian.input_dim <= _FORMED else None)

    def jacobian(self, params: Parameters, x: Tensor, y: Tensor) -> UpdateJacobian:
        """Returns J of the gradients of single examples."""
        update = rounded_off(GradientUpdate(self.model, nn.CrossEntropyLoss()), self.relu_width)
        return UpdateJacobian(update, params, x[:, None], y[:, None])

    def train(
        self,
        *,
        noise_std: Callable[[int, Parameters], float] | None = None,
        inputs: Callable[[Tensor], Tensor] | None = None,
        gradient: Callable[[Parameters, Tensor, Tensor], Parameters] | None = None,
        generator: torch.Generator | None = None,
    ) -> Parameters:
        """Returns the parameters after the last round.

        Args:
            noise_std: Given the round, from 0, and its parameters: σ per parameter on the average of all clients.
            inputs: Given the inputs: what takes their place in a round.
            gradient: In place of the plain average over clients.
            generator: Of the noise on the average.
        """
        x, y = self.private
        share = self.gradient if gradient is None else gradient
        params, velocity = self.start, {name: torch.zeros_like(p) for name, p in self.start.items()}
        for t in range(self.num_rounds):
            std = 0.0 if noise_std is None else noise_std(t, params)
            for name, g in share(params, x if inputs is None else inputs(x), y).items():
                noisy = g + std * torch.randn(g.shape, generator=generator) if std else g
                velocity[name] = self.momentum * velocity[name] + noisy
            params = {name: p - self.lr * velocity[name] for name, p in params.items()}
        return params


@dataclass(frozen=True, eq=False)
class Share:
    """G_t of the audited examples at one θ: by products, and formed `[n, D, D]` where inputs are small."""

    jacobian: UpdateJacobian
    gram: Tensor | None


def formed(jacobian: UpdateJacobian) -> Tensor:
    """Returns G of each unit, `[units, D, D]`."""
    return torch.stack([dense_gram(jacobian, unit) for unit in range(jacobian.num_units)])


def exact_spectrum(gram: Tensor, update_dim: int) -> Spectrum:
    """Returns the spectrum of formed G `[units, D, D]`."""
    rule, (units, dim, _) = eigenvalue_rule(gram), gram.shape
    resolution = torch.finfo(torch.float32).eps * rule.largest
    return Spectrum(rule, rule, dim, update_dim, resolution, torch.full((units,), dim), exact=True)


def together(shares: Sequence[Share], noise_stds: Sequence[float]) -> Spectrum:
    """Returns the spectrum of Σ_t G_t/σ_t²."""
    grams = [share.gram for share in shares if share.gram is not None]
    if grams:
        total = sum((gram / std**2 for gram, std in zip(grams, noise_stds, strict=True)), torch.zeros_like(grams[0]))
        return exact_spectrum(total, sum(share.jacobian.update_dim for share in shares))
    return estimate_spectrum(GramSum([share.jacobian for share in shares], noise_stds=noise_stds))


def interpolated_weights(stds: Sequence[float], at: Sequence[int]) -> list[float]:
    """Returns the weights of the G_t at some rounds in Σ_t G_t/σ_t² over all.

    Between them G_t is interpolated, and σ_t kept.
    """
    weights = [0.0] * len(at)
    for index, (first, last) in enumerate(pairwise(at)):
        for t in range(first, last):
            beyond = (t - first) / (last - first)
            weights[index] += (1 - beyond) / stds[index] ** 2
            weights[index + 1] += beyond / stds[index] ** 2
    weights[-1] += 1 / stds[-1] ** 2
    return weights


def mean_leakage(spectrum: Spectrum, noise_std: float, tau: float) -> float:
    """Returns the leakage of the audited examples, their mean."""
    return float(spectrum.leakage(noise_std, tau).value.mean())


def noise_for(spectrum: Spectrum, target: float, tau: float) -> float:
    """Returns the σ of a client of one example at which the audited ones leak the target on average."""
    low, high = -40.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        leaks = mean_leakage(spectrum, math.exp(middle), tau) > target
        low, high = (middle, high) if leaks else (low, middle)
    return math.exp(high)
