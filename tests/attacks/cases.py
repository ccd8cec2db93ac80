"""Problems with a known truth, small enough to be attacked within a second or two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_privacy import GradientUpdate
from fl_privacy.attacks import AttackProblem, GaussianPrior, IsotropicNoise, Noise
from fl_privacy.influence import UpdateMap
from fl_privacy.reference.datasets import load_dataset
from fl_privacy.reference.models import build_model, init_uniform_

F64 = torch.float64
SHAPE = (1, 8, 8)


@dataclass(frozen=True, eq=False)
class Truth:
    """What the attacker does not know, next to what he does."""

    problem: AttackProblem
    inputs: Tensor
    """`[U, N, *shape]`."""


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def leaky_lenet(*, seed: int = 0) -> nn.Module:
    """The literature's sigmoid LeNet with weights from U(-0.5, 0.5), for 8×8 images."""
    model = build_model("lenet", input_shape=SHAPE, num_classes=10)
    return init_uniform_(model, generator=torch.Generator().manual_seed(seed)).double()


def digits_prior() -> GaussianPrior:
    train = load_dataset("digits").train
    return GaussianPrior.from_examples(train.select(slice(0, len(train)))[0].double())


def digits(units: int) -> tuple[Tensor, Tensor]:
    """Held-out digits `[U, 1, 1, 8, 8]` and labels `[U, 1]`."""
    images, labels = load_dataset("digits").test.select(slice(0, units))
    return images.double()[:, None], labels[:, None]


def shared_by(
    update: UpdateMap, inputs: Tensor, labels: Tensor, *, noise_std: float, prior: GaussianPrior, seed: int = 0
) -> Truth:
    """The problem of an attacker who sees u(x) with white noise on it and knows the labels."""
    params = {name: p.to(inputs.dtype) for name, p in parameters_of(update.model).items()}
    undefended = torch.stack([update.layout.flatten(update(params, x, y)) for x, y in zip(inputs, labels, strict=True)])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(undefended.shape, generator=generator, dtype=F64).to(undefended)
    problem = AttackProblem(
        update=update,
        params=params,
        shared=undefended + noise_std * noise,
        labels=labels,
        prior=prior,
        noise=IsotropicNoise(torch.full((len(inputs),), noise_std, dtype=F64)),
        num_examples=inputs.shape[1],
    )
    return Truth(problem, inputs)


def digits_problem(units: int, *, noise_std: float, seed: int = 0) -> Truth:
    """Digits behind the leaky LeNet."""
    inputs, labels = digits(units)
    update = GradientUpdate(leaky_lenet(), nn.CrossEntropyLoss())
    return shared_by(update, inputs, labels, noise_std=noise_std, prior=digits_prior(), seed=seed)


class LinearUpdate(nn.Module):
    """A model whose update is linear in its input, u(x) = A_k x, with k the label: every posterior has a closed form.

    Args:
        matrices: A `[K, P, D]`.
    """

    def __init__(self, matrices: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrices", matrices)
        self.theta = nn.Parameter(torch.zeros(matrices.shape[1], dtype=matrices.dtype))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = torch.einsum("p,kpd,nd->nk", self.theta, self.matrices, x)
        return outputs


def picked(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss that goes with `LinearUpdate`."""
    return outputs.gather(1, labels[:, None]).mean()


def linear_case(
    matrices: Tensor, shared: Tensor, *, prior: GaussianPrior, noise: Noise, known_std: Tensor
) -> tuple[AttackProblem, Tensor]:
    """The problem with u(x) = A_k x of unit k, and its posterior mean `[K, D]` in closed form.

    Args:
        matrices: A `[K, P, D]`.
        shared: `[K, P]`.
        prior: Of inputs `[D]`.
        noise: What the attacker knows of it.
        known_std: The same, as standard deviations `[K, P]`.
    """
    model = LinearUpdate(matrices)
    problem = AttackProblem(
        update=GradientUpdate(model, picked),
        params=parameters_of(model),
        shared=shared,
        labels=torch.arange(len(matrices))[:, None],
        prior=prior,
        noise=noise,
    )
    dim = matrices.shape[-1]
    root = prior.root(torch.eye(dim, dtype=F64)).mT
    weighted = matrices / known_std[..., None] ** 2
    precision = matrices.mT @ weighted + torch.linalg.inv(root @ root.mT) / prior.std**2
    misses = shared - torch.einsum("kpd,d->kp", matrices, prior.mean)
    return problem, prior.mean + torch.linalg.solve(precision, torch.einsum("kpd,kp->kd", weighted, misses))


def residual_net() -> nn.Module:
    """A small ResNet for 8×8 images, batch normalisation by running statistics, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model("resnet8", input_shape=SHAPE, num_classes=10).eval()
