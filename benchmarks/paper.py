"""The paper's way to its two numbers, written anew from its public code's method, as what the engine is compared with.

Zhang, Hong, Deng, Mahdavi, Zhou: Understanding Deep Gradient Leakage via Inversion Influence Functions, NeurIPS 2023.
Its code multiplies by J in parameter space, builds every graph anew for each product, and goes to NumPy and back for
the eigensolver, by way of a vector that it grows tensor by tensor. One deviation, in its favour: its gradient descent
takes a third product each step, to log a loss; ours of it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from benchmarks.problems import Problem
from fl_privacy.influence.lanczos import Lanczos
from fl_privacy.influence.quadrature import gauss_rule

LEARNING_RATE, MOST_STEPS, TOLERANCE = 0.01, 2000, 9e-5
"""Of its gradient descent: it stops once the norm of the descent direction is below the tolerance."""


Flatten = Callable[[Sequence[Tensor]], Tensor]


def grown(parts: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector, as the paper's code makes it: each concatenated to a copy of all before it."""
    flat = parts[0].new_empty(0)
    for part in parts:
        flat = torch.cat((flat, part.reshape(-1)))
    return flat


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """The same vector at the cost of one copy."""
    return torch.cat([part.reshape(-1) for part in parts])


class PaperProducts:
    """Products with J and Jᵀ (the paper's Jᵀ and J) of a problem with one unit, each from a graph of its own."""

    def __init__(self, problem: Problem) -> None:
        self._model = problem.model
        self._parameters = list(problem.model.parameters())
        self._image = problem.inputs[0].clone().requires_grad_()
        self._label = problem.labels[0]
        self.graphs = 0

    def pull_back(self, vector: Sequence[Tensor]) -> Tensor:
        """Jᵀ·w, of the image's shape."""
        gradient = torch.autograd.grad(self._loss(), self._parameters, create_graph=True)
        inner = torch.stack([(g * w).sum() for g, w in zip(gradient, vector, strict=True)]).sum()
        return torch.autograd.grad(inner, self._image)[0]

    def push_forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """J·v, one tensor per parameter; one that the image's gradient does not depend on is zero."""
        (gradient,) = torch.autograd.grad(self._loss(), self._image, create_graph=True)
        return torch.autograd.grad((gradient * vector).sum(), self._parameters, materialize_grads=True)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat vector `[P]` as one tensor per parameter."""
        parts = torch.split(flat, [p.numel() for p in self._parameters])
        return [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]

    def _loss(self) -> Tensor:
        self.graphs += 1
        return torch.nn.functional.cross_entropy(self._model(self._image), self._label)


def lower_bound(problem: Problem, perturbation: Tensor, *, flatten: Flatten = grown) -> float:
    """‖Jᵀδ‖/λ_max, with λ_max from SciPy's `eigsh` on JJᵀ in parameter space."""
    products = PaperProducts(problem)

    def matvec(vector: NDArray[np.floating]) -> NDArray[np.float32]:
        flat = torch.from_numpy(vector.astype(np.float32).reshape(-1))  # SciPy tries one vector of float64 first
        pulled = products.pull_back(products.split(flat))
        return flatten(products.push_forward(pulled.detach())).numpy()

    dim = perturbation.shape[1]
    (largest,) = eigsh(LinearOperator((dim, dim), matvec=matvec), k=1, return_eigenvectors=False)
    pulled = products.pull_back(products.split(perturbation[0]))
    return float(torch.linalg.vector_norm(pulled)) / float(largest)


def descent_steps(problem: Problem, perturbation: Tensor, *, ridge: float, krylov_steps: int = 48) -> int:
    """Returns how many steps the paper's gradient descent for (G + εI)·b = Jᵀδ takes.

    Its direction at step t is r_t = (I − lr·(G + εI))ᵗ r_0, so that ‖r_t‖² is a sum over eigenvalues of G.
    Lanczos finds those that r_0 meets, and the descent is followed to its end without taking its up to 2,000 products.
    """
    jacobian = problem.jacobian
    b = _start(problem).reshape(1, -1)
    first = jacobian.gram(b) + ridge * b - jacobian.vjp(perturbation)
    lanczos = Lanczos(jacobian, first, max_steps=krylov_steps)
    lanczos.run(lambda state: state.failed)
    rule = gauss_rule(lanczos, 1)
    factors = (1.0 - LEARNING_RATE * (rule.nodes + ridge)).abs()[..., None] ** torch.arange(MOST_STEPS)
    norms = lanczos.start_norm * (rule.weights[..., None] * factors**2).sum((0, 1, 2)).sqrt()
    small = (norms < TOLERANCE).nonzero()
    return int(small[0]) + 1 if len(small) else MOST_STEPS


def descend(
    problem: Problem, perturbation: Tensor, *, ridge: float, steps: int, products: PaperProducts | None = None
) -> Tensor:
    """Takes at most so many steps of that descent, with the paper's products, and returns the solution b."""
    products = products or PaperProducts(problem)
    noise = products.split(perturbation[0])
    b = _start(problem)
    for _ in range(steps):
        pushed = products.push_forward(b)
        left = [n - p for n, p in zip(noise, pushed, strict=True)]
        direction = ridge * b - products.pull_back(left)
        b = b - LEARNING_RATE * direction
        if torch.linalg.vector_norm(direction) < TOLERANCE:
            break
    return b


def _start(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(problem.inputs[0].shape, generator=generator)
