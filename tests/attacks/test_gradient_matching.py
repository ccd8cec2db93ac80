"""Gradient matching rebuilds what is easy, differentiates exactly, and keeps problems apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fl_privacy import GradientUpdate, LocalTrainingUpdate
from fl_privacy.attacks import (
    LBFGS,
    Adam,
    GradientMatching,
    Reconstruction,
    StopReason,
    best_of,
    deep_leakage,
    inverting_gradients,
    rmse,
    total_variation,
)
from fl_privacy.attacks.differentiable import DifferentiableUpdate
from fl_privacy.attacks.distances import cosine_distance, relative_squared_distance
from fl_privacy.errors import InvalidInputError

from .cases import F64, Truth, digits, digits_prior, digits_problem, leaky_lenet, shared_by


def small_truth(update: GradientUpdate | LocalTrainingUpdate, examples: int) -> Truth:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(2, examples, 1, 8, 8, generator=generator, dtype=F64)
    labels = torch.tensor([[1, 2, 3][:examples], [4, 5, 6][:examples]])
    return shared_by(update, inputs, labels, noise_std=1e-6, prior=digits_prior())


@pytest.mark.parametrize("training", [False, True], ids=["gradient", "training"])
def test_the_update_differentiates_to_the_jacobian(training: bool) -> None:
    model, loss = leaky_lenet(), nn.CrossEntropyLoss()
    update = LocalTrainingUpdate(model, loss, lr=0.1, steps=2) if training else GradientUpdate(model, loss)
    truth = small_truth(update, 2)
    x = truth.problem.start().requires_grad_()
    u = DifferentiableUpdate(truth.problem)(x)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(u.shape, generator=generator, dtype=F64)
    v = torch.randn(x.shape, generator=generator, dtype=F64)
    (gradient,) = torch.autograd.grad((u * w).sum(), x)
    step = 1e-5
    ahead, behind = (truth.problem.residual(x.detach() + sign * step * v) for sign in (1, -1))
    slope = ((ahead - behind) * w).sum(-1) / (2 * step)
    torch.testing.assert_close((gradient * v).sum(-1), slope, rtol=1e-6, atol=1e-9)


def test_dgl_rebuilds_digits_from_clean_updates() -> None:
    truth = digits_problem(1, noise_std=1e-6)
    result = deep_leakage(optimizer=LBFGS(steps=100)).run(truth.problem)
    assert (rmse(result.inputs, truth.inputs) < 0.02).all()
    assert result.history[0].gt(result.history.nan_to_num(nan=torch.inf).amin(0) * 1e3).all()


def test_inverting_gradients_approaches_the_input() -> None:
    truth = digits_problem(2, noise_std=1e-4)
    attack = inverting_gradients(steps=150, bounds=(0.0, 1.0), total_variation_weight=1e-6)
    result = attack.run(truth.problem)
    assert (rmse(result.inputs, truth.inputs) < 0.5 * truth.problem.prior.std).all()
    assert result.inputs.amin() >= 0
    assert result.inputs.amax() <= 1
    assert not result.converged.any()  # the sign of a gradient never comes to rest


def test_units_and_restarts_do_not_touch_each_other() -> None:
    truth = digits_problem(2, noise_std=1e-3)
    for optimizer in (Adam(steps=20), Adam(steps=20, signed=True), LBFGS(steps=5)):
        attack = GradientMatching(optimizer=optimizer, seed=4)
        together = attack.run(truth.problem)
        first = attack.run(truth.problem.select(torch.tensor([0])))
        torch.testing.assert_close(first.inputs[0], together.inputs[0], rtol=1e-6, atol=1e-8)
        again = attack.run(truth.problem)
        assert torch.equal(again.inputs, together.inputs)


def test_more_restarts_are_never_worse() -> None:
    truth = digits_problem(2, noise_std=1e-3)

    def loss(restarts: int) -> torch.Tensor:
        found = GradientMatching(optimizer=Adam(steps=10), restarts=restarts).run(truth.problem)
        return found.history.amin(0)

    assert (loss(4) <= loss(1) * (1 + 1e-9)).all()


def test_a_budget_that_is_spent_is_reported() -> None:
    truth = digits_problem(1, noise_std=1e-3)
    for optimizer in (Adam(steps=3), LBFGS(steps=3)):
        result = deep_leakage(optimizer=optimizer).run(truth.problem)
        assert result.stop == (StopReason.MAX_STEPS,)
        assert not result.converged.any()


def test_a_quadratic_is_minimised_to_convergence() -> None:
    scale = torch.tensor([[1.0, 3.0], [10.0, 0.5]], dtype=F64)
    goal = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=F64)
    found = LBFGS(steps=50).minimise(
        lambda lanes: lambda x: (scale[lanes] * (x - goal[lanes]) ** 2).sum(-1), torch.zeros(2, 2, dtype=F64), unit=1.0
    )
    assert found.stop == (StopReason.CONVERGED,) * 2
    torch.testing.assert_close(found.x, goal, rtol=1e-5, atol=1e-5)


def test_distances() -> None:
    u, s = torch.tensor([[3.0, 4.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    torch.testing.assert_close(relative_squared_distance(u, s), torch.tensor([16 / 9, 0.25]))
    torch.testing.assert_close(cosine_distance(u, s), torch.tensor([0.4, 0.0]))
    stripes = torch.tensor([0.0, 1.0]).repeat(1, 1, 1, 4, 2)  # 4 rows of 0101: 12 steps of 1 among 16 pixels
    torch.testing.assert_close(total_variation(stripes), torch.tensor([12 / 16]))
    with pytest.raises(InvalidInputError, match="weight to 0"):
        total_variation(torch.zeros(1, 1, 5))


def test_best_of_takes_the_most_probable_unit_by_unit() -> None:
    truth = digits_problem(3, noise_std=1e-3)
    start, right = truth.problem.start(), truth.inputs.flatten(1)

    def candidate(x: torch.Tensor, steps: int) -> Reconstruction:
        return Reconstruction.at(
            truth.problem,
            x,
            history=torch.ones(steps, 3),
            stop=[StopReason.MAX_STEPS] * 3,
            products=torch.ones(3, dtype=torch.long),
        )

    mixed = torch.stack([right[0], start[1], start[2]])
    other = torch.stack([start[0], right[1], start[2]])
    best = best_of([candidate(mixed, 2), candidate(other, 4)])
    torch.testing.assert_close(best.inputs.flatten(1), torch.stack([right[0], right[1], start[2]]))
    assert best.history.isnan().sum(0).tolist() == [2, 0, 2]
    assert best.products.tolist() == [2, 2, 2]
    assert best.explained.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Adam(steps=0),
        lambda: Adam(lr=-1.0),
        lambda: LBFGS(memory=0),
        lambda: GradientMatching(restarts=0),
        lambda: GradientMatching(bounds=(1.0, 0.0)),
        lambda: GradientMatching(total_variation_weight=-1.0),
    ],
)
def test_options_out_of_range_are_refused(build: type[Adam]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        build()


def test_labels_are_recovered_where_they_are_not_given() -> None:
    inputs, labels = digits(3)
    truth = shared_by(
        GradientUpdate(leaky_lenet(), nn.CrossEntropyLoss()), inputs, labels, noise_std=1e-6, prior=digits_prior()
    )
    result = deep_leakage(optimizer=Adam(steps=2)).run(replace(truth.problem, labels=None))
    assert torch.equal(result.labels, labels)
