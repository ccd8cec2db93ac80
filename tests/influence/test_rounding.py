"""Networks with their ReLUs rounded off."""

import pytest
import torch
from torch import nn

from fl_privacy import GradientUpdate, UpdateJacobian
from fl_privacy.influence.rounding import RoundedReLU, has_kinks, rounded_off

LOSS = nn.CrossEntropyLoss()


def test_it_is_relu_where_the_width_is_small_and_linear_at_zero():
    z = torch.tensor([-3.0, -1.0, 0.0, 2.0]).double()
    torch.testing.assert_close(RoundedReLU(1e-3)(z), z.clamp(min=0))
    slope = torch.func.vmap(torch.func.grad(RoundedReLU(0.3)))(z)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 0.5, 1.0]).double(), atol=0.02, rtol=0)
    curvature = torch.func.grad(torch.func.grad(RoundedReLU(0.3)))(torch.tensor(0.0).double())
    assert curvature.item() == pytest.approx(2 / (0.3 * (2 * torch.pi) ** 0.5))  # 2φ(0)/w: the jump, spread


def test_a_relative_width_follows_what_is_seen():
    z = torch.randn(50).double()
    rms = z.square().mean().sqrt()
    torch.testing.assert_close(RoundedReLU(0.15, relative=True)(7 * z), 7 * RoundedReLU(0.15 * float(rms))(z))
    zeros = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(RoundedReLU(0.15, relative=True)(zeros).sum(), zeros, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), zeros)
    assert (slope.tolist(), bool(curvature.isfinite().all())) == ([0.5] * 3, True)


def test_every_place_of_a_shared_module_is_rounded_off_and_the_original_is_not():
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(4, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 3))
    update = GradientUpdate(model, LOSS)
    smooth = rounded_off(update, 0.15)
    assert [type(module) for module in smooth.model][1::2] == [RoundedReLU, RoundedReLU]
    assert (has_kinks(update), has_kinks(smooth), model[1] is relu) == (True, False, True)
    assert rounded_off(update, 0) is update
    assert rounded_off(smooth, 0.15) is smooth


def test_lanes_of_one_pass_have_each_its_own_width():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    inputs, labels = (
        torch.randn(3, 1, 4).double() * torch.tensor([0.1, 1.0, 10.0])[:, None, None],
        torch.tensor([[0], [1], [2]]),
    )
    smooth = rounded_off(GradientUpdate(model, LOSS), 0.15)
    v = torch.randn(3, 4).double()
    together = UpdateJacobian(smooth, params, inputs, labels).gram(v)
    for unit in range(3):
        one = slice(unit, unit + 1)
        alone = UpdateJacobian(smooth, params, inputs[one], labels[one]).gram(v[one])
        torch.testing.assert_close(together[one], alone)
