"""The measurements, by name: each compares the engine with another way to the same number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from benchmarks import paper
from benchmarks.problems import cifar_resnet18, mnist_lenet
from benchmarks.timing import Ratio, interleaved
from fl_privacy import estimate_spectrum, influence, influence_lower_bound

UNITS = 32


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
        ratio: What was measured.
        target: What the ratio has to reach.
        at_most: Whether the target is the most that the ratio may be; otherwise the least.
        note: What a reader has to know to trust the number.
    """

    ratio: Ratio
    target: float
    at_most: bool
    note: str

    @property
    def met(self) -> bool:
        return self.ratio.value <= self.target if self.at_most else self.ratio.value >= self.target


def product_cost(quick: bool) -> Measurement:
    """G·v over a plain gradient."""
    problem = cifar_resnet18()
    jacobian = problem.jacobian
    v = torch.randn(1, jacobian.input_dim)

    def gradient() -> None:
        problem.model.zero_grad()
        loss = torch.nn.functional.cross_entropy(problem.model(problem.inputs[0]), problem.labels[0])
        torch.autograd.backward(loss)

    ratio = interleaved(lambda: jacobian.gram(v), gradient, repeats=5 if quick else 25)
    return Measurement(ratio, 5.0, True, "loss.backward() with weight gradients")


def lower_bound(quick: bool) -> Measurement:
    """The lower bound, the paper's way over ours."""
    problem = cifar_resnet18()
    delta = problem.perturbation(1e-3)
    theirs, ours = [], []
    ratio = interleaved(
        lambda: theirs.append(paper.lower_bound(problem, delta)),
        lambda: ours.append(influence_lower_bound(problem.jacobian, delta).item()),
        repeats=1 if quick else 3,
        warm_up=False,
    )
    plainer = interleaved(
        lambda: paper.lower_bound(problem, delta, flatten=paper.concatenated),
        lambda: influence_lower_bound(problem.jacobian, delta),
        repeats=1,
        warm_up=False,
    )
    note = (
        f"values differ by {abs(ours[-1] / theirs[-1] - 1):.0e}; {plainer.value:.2g} if it flattened by one torch.cat"
    )
    return Measurement(ratio, 10.0, False, note)


def inversion_influence(quick: bool) -> Measurement:
    """I²F at ε = 1, the paper's gradient descent over our solver."""
    problem, ridge = cifar_resnet18(), 1.0
    delta = problem.perturbation(1e-3)
    steps = paper.descent_steps(problem, delta, ridge=ridge, krylov_steps=16 if quick else 48)
    timed = 3 if quick else 10
    sample = interleaved(
        lambda: paper.descend(problem, delta, ridge=ridge, steps=timed),
        lambda: influence(problem.jacobian, delta, ridge=ridge),
        repeats=1 if quick else 5,
    )
    whole = steps / timed
    ratio = Ratio(sample.first * whole, sample.second, sample.value * whole, sample.repeats)
    note = f"extrapolated: {timed} of its {steps} steps timed"
    return Measurement(ratio, 20.0, False, note)


def vectorised_product(quick: bool) -> Measurement:
    """G·v of many LeNet units, one at a time over one pass."""
    problem = mnist_lenet(UNITS)
    together = problem.jacobian
    alone = [problem.unit(i).jacobian for i in range(UNITS)]
    v = torch.randn(UNITS, together.input_dim)

    def one_at_a_time() -> None:
        for i, jacobian in enumerate(alone):
            jacobian.gram(v[i, None])

    ratio = interleaved(one_at_a_time, lambda: together.gram(v), repeats=5 if quick else 25)
    return Measurement(ratio, 8.0, False, f"{UNITS} units, graphs kept in both")


def vectorised_spectrum(quick: bool) -> Measurement:
    """A whole spectrum of many LeNet units, one at a time over one pass."""
    problem = mnist_lenet(UNITS)
    steps = 8 if quick else 16

    def one_at_a_time() -> None:
        for i in range(UNITS):
            estimate_spectrum(problem.unit(i).jacobian, num_probes=1, max_steps=steps)

    def one_pass() -> None:
        estimate_spectrum(problem.jacobian, num_probes=1, max_steps=steps)

    ratio = interleaved(one_at_a_time, one_pass, repeats=1 if quick else 3)
    return Measurement(ratio, 8.0, False, f"{UNITS} units, one probe of up to {steps} steps, new graphs")


MEASURES: Mapping[str, Callable[[bool], Measurement]] = MappingProxyType(
    {
        "product": product_cost,
        "lower-bound": lower_bound,
        "influence": inversion_influence,
        "lenet-product": vectorised_product,
        "lenet-spectrum": vectorised_spectrum,
    }
)
"""Measurements by name; each takes whether it is to be quick, and its docstring says what is compared."""
