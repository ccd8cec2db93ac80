"""What the engine is compared with is the paper's method, and solves the same problems."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import paper
from benchmarks.problems import Problem
from benchmarks.timing import interleaved
from fl_privacy import influence, influence_lower_bound


@pytest.fixture
def problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    return Problem(model, torch.rand(1, 1, 3, 2, 2), torch.tensor([[1]]))


def test_the_papers_products_are_the_engines(problem: Problem) -> None:
    products, jacobian = paper.PaperProducts(problem), problem.jacobian
    v, w = torch.randn(1, jacobian.input_dim), torch.randn(1, jacobian.update_dim)
    pushed = torch.cat([part.flatten() for part in products.push_forward(v.view(problem.inputs[0].shape))])
    torch.testing.assert_close(pushed, jacobian.jvp(v)[0])
    torch.testing.assert_close(products.pull_back(products.split(w[0])).flatten(), jacobian.vjp(w)[0])


def test_both_ways_to_the_lower_bound_agree(problem: Problem) -> None:
    delta = problem.perturbation(0.1)
    expected = paper.lower_bound(problem, delta)
    assert influence_lower_bound(problem.jacobian, delta).item() == pytest.approx(expected, rel=1e-3)


def test_the_steps_of_the_descent_are_counted_without_taking_them(problem: Problem) -> None:
    delta, ridge = problem.perturbation(0.1), 1.0
    steps = paper.descent_steps(problem, delta, ridge=ridge)
    assert 500 < steps < paper.MOST_STEPS
    products = paper.PaperProducts(problem)
    b = paper.descend(problem, delta, ridge=ridge, steps=paper.MOST_STEPS, products=products)
    assert products.graphs == pytest.approx(2 * steps, abs=4)
    solved = influence(problem.jacobian, delta, ridge=ridge, rtol=1e-5)
    torch.testing.assert_close(b.flatten(), solved.shift[0], rtol=0.0, atol=2 * paper.TOLERANCE)


def test_a_ratio_is_of_the_first_over_the_second() -> None:
    turns: list[str] = []
    ratio = interleaved(lambda: turns.append("first"), lambda: turns.append("second"), repeats=3)
    assert turns == ["first", "second"] * 4
    assert ratio.repeats == 3
    slow = interleaved(lambda: sum(range(300_000)), lambda: None, repeats=3)
    assert slow.value > 10
    assert slow.first > slow.second
