"""How much an update changes over a shift, beside what its Jacobian says."""

import math

import pytest
import torch
from torch import nn

from fl_privacy import GradientUpdate, LocalTrainingUpdate, UpdateJacobian
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence import change_ratio, likely_error


def jacobian_of(model, inputs, update=GradientUpdate, loss=None, **options):
    model = model.double()
    loss = loss or (lambda outputs, targets: 0.5 * (outputs - targets).square().sum(-1).mean())
    targets = torch.zeros(*inputs.shape[:2], 1, dtype=torch.float64)
    return UpdateJacobian(update(model, loss, **options), dict(model.named_parameters()), inputs, targets)


def inputs_of(*rows):
    return torch.tensor(rows, dtype=torch.float64)[:, None]


def test_a_quadratic_update_by_hand():
    # u(x) = wx·x for the model w·x without bias: u(x + a) − u(x) = w(2xa + a²), J·a = 2wxa.
    model = nn.Linear(1, 1, bias=False)
    ratio = change_ratio(jacobian_of(model, inputs_of([2.0], [1.0])), torch.tensor([[0.5], [-0.5]]).double())
    assert ratio.tolist() == pytest.approx([1 + 0.5 / 4, 1 - 0.5 / 2])


def test_the_jump_of_a_relu_by_hand():
    # ‖∂L/∂w‖ jumps from 0 to where the unit is on, and J on the side where it is off is 0.
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    for parameter, value in zip(model.parameters(), (1.0, 0.0, 1.0, 1.0), strict=True):
        nn.init.constant_(parameter, value)
    off = jacobian_of(model, inputs_of([-0.1]))
    assert change_ratio(off, torch.tensor([[0.05]]).double()).isnan().all()  # nothing changes, as J says
    assert change_ratio(off, torch.tensor([[0.2]]).double()).item() == math.inf
    # On, z = x: u = (e·x, e, e·x, e) with e = x + 1, so at x = 0.1 ∂u = (1.2, 1, 1.2, 1); off, u = (0, 0, 0, 1).
    on = jacobian_of(model, inputs_of([0.1]))
    jump = torch.tensor([0.11, 1.1, 0.11, 0.1]).norm() / (0.2 * torch.tensor([1.2, 1.0, 1.2, 1.0]).norm())
    assert change_ratio(on, torch.tensor([[-0.2]]).double()).item() == pytest.approx(jump.item())


def test_it_tends_to_one_for_several_steps_of_a_smooth_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    jacobian = jacobian_of(model, torch.randn(3, 2, 4).double(), LocalTrainingUpdate, lr=0.5, steps=3)
    shift = torch.randn(3, 8).double()
    off = [(change_ratio(jacobian, size * shift) - 1).abs().max().item() for size in (1e-1, 1e-3, 1e-5)]
    assert off[0] > 10 * off[1] > 100 * off[2]
    assert off[2] < 1e-4


def test_a_shift_of_another_shape_is_refused():
    with pytest.raises(InvalidInputError, match="expected a shift of shape"):
        change_ratio(jacobian_of(nn.Linear(1, 1), inputs_of([1.0])), torch.zeros(1, 2).double())


def test_the_likely_error_follows_the_posterior():
    torch.manual_seed(0)
    jacobian = jacobian_of(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(1, 1, 4).double())
    columns = torch.cat([jacobian.jvp(row[None]) for row in torch.eye(4).double()]).T
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    ridge = 0.1 * float(values[-1])
    errors = torch.cat([likely_error(jacobian, ridge=ridge, seed=seed) for seed in range(400)])
    torch.testing.assert_close(errors.square().mean(1), torch.ones(400).double())
    spread = (errors @ vectors).square().mean(0)
    expected = 1 / (values + ridge)
    # Scaled draw by draw, which evens the spread out a little.
    assert (spread / spread.sum()).tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=0.06)
    assert spread[0] > 3 * spread[-1]


def test_units_of_a_likely_error_are_solved_side_by_side_as_alone():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(3, 1, 4).double()
    ridges = torch.tensor([1e-3, 1e-2, 1e-1]).double()
    together = likely_error(jacobian_of(model, inputs), ridge=ridges, seed=3)
    first = likely_error(jacobian_of(model, inputs[:1]), ridge=ridges[:1], seed=3)
    torch.testing.assert_close(together[:1], first)
    assert not torch.allclose(together[1], together[0], rtol=0.1)
