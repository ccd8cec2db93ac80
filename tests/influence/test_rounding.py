"""Networks with their ReLUs rounded off."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fl_privacy import GradientUpdate, LocalTrainingUpdate, UpdateJacobian, estimate_spectrum
from fl_privacy.influence.evaluation import RoundedReLUs, rounded_relu
from fl_privacy.influence.rounding import has_relus, rounded_off, with_relus_replaced

LOSS = nn.CrossEntropyLoss()
Z = torch.tensor([[-3.0, -1.0, 0.0, 2.0, 5.5, 7.0]]).double()


def jacobian_of(update, inputs, labels=None, **options):
    labels = torch.zeros(inputs.shape[:2], dtype=torch.long) if labels is None else labels
    params = {name: p.detach() for name, p in update.model.named_parameters()}
    return UpdateJacobian(update, params, inputs, labels, **options)


class Written(nn.Module):
    """Two layers with a ReLU between, written in one way or another."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.activation = activation

    def forward(self, x):
        return self.second(self.activation(self.first(x)))


def test_it_is_relu_where_the_width_is_small_and_linear_at_zero():
    z = torch.tensor([-3.0, -1.0, 0.0, 2.0]).double()
    torch.testing.assert_close(rounded_relu(z, 1e-3), z.clamp(min=0))
    smooth = partial(rounded_relu, width=0.3)
    slope = torch.func.vmap(torch.func.grad(smooth))(z)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 0.5, 1.0]).double(), atol=0.02, rtol=0)
    curvature = torch.func.grad(torch.func.grad(smooth))(torch.tensor(0.0).double())
    assert curvature.item() == pytest.approx(2 / (0.3 * (2 * torch.pi) ** 0.5))  # 2φ(0)/w: the jump, spread


@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        lambda z: F.relu(z, True),
        lambda z: F.relu(input=z, inplace=True),
        torch.relu,
        lambda z: z.relu(),
        lambda z: torch.relu_(z),
        lambda z: z.relu_(),
    ],
)
def test_a_relu_is_rounded_off_however_it_is_written(relu):
    width = 0.15 * Z.square().mean().sqrt()
    with RoundedReLUs(0.15):
        found = relu(Z.clone())
    torch.testing.assert_close(found, rounded_relu(Z, width))
    x = torch.randn(3, 1, 4).double()
    update = rounded_off(GradientUpdate(Written(relu).double(), LOSS), 0.15)
    expected = rounded_off(GradientUpdate(Written(nn.ReLU()).double(), LOSS), 0.15)
    v = torch.randn(3, 4).double()
    torch.testing.assert_close(jacobian_of(update, x).gram(v), jacobian_of(expected, x).gram(v))


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (nn.ReLU6(), F.relu6),
        (nn.LeakyReLU(0.2, inplace=True), lambda z: F.leaky_relu(z, 0.2)),
        (nn.Hardtanh(-2.0, 5.0), lambda z: F.hardtanh(z, max_val=5.0, min_val=-2.0)),
    ],
)
def test_its_relatives_are_rounded_off_too_and_are_themselves_where_the_width_is_small(module, function):
    exact = module(Z.clone())
    with RoundedReLUs(1e-4):
        torch.testing.assert_close(module(Z.clone()), exact, atol=1e-3, rtol=0)
        torch.testing.assert_close(function(Z), exact, atol=1e-3, rtol=0)
    with RoundedReLUs(0.5):
        rounded = module(Z.clone())
        torch.testing.assert_close(function(Z), rounded)
    assert (rounded - exact).abs().max() > 0.05


def test_what_has_no_kinks_and_what_counts_is_left_alone():
    counts = torch.tensor([-1, 2])
    with RoundedReLUs(0.15):
        assert torch.relu(counts).tolist() == [0, 2]
        torch.testing.assert_close(torch.tanh(Z), Z.tanh(), rtol=0, atol=0)
    tanh, x = GradientUpdate(Written(torch.tanh).double(), LOSS), torch.randn(2, 1, 4).double()
    v = torch.randn(2, 4).double()
    assert torch.equal(jacobian_of(rounded_off(tanh, 0.15), x).gram(v), jacobian_of(tanh, x).gram(v))


def test_the_width_follows_what_is_seen_of_each_example():
    z = torch.randn(2, 50).double()
    with RoundedReLUs(0.15):
        torch.testing.assert_close(torch.relu(7 * z), 7 * torch.relu(z))
        torch.testing.assert_close(torch.relu(torch.stack([z[0], 100 * z[1]]))[0], torch.relu(z[:1])[0])
        zeros = torch.zeros(1, 3, requires_grad=True)
        (slope,) = torch.autograd.grad(torch.relu(zeros).sum(), zeros, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), zeros)
    assert (slope.tolist(), bool(curvature.isfinite().all())) == ([[0.5] * 3], True)


def test_the_model_is_neither_copied_nor_changed_and_its_hooks_run():
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(4, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 3)).double()
    relu.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    before = copy.deepcopy(model.state_dict())
    update = GradientUpdate(model, LOSS)
    smooth = rounded_off(update, 1e-9)
    x = torch.randn(2, 1, 4).double()
    assert smooth.model is model
    torch.testing.assert_close(jacobian_of(smooth, x).update(), jacobian_of(update, x).update())  # with the hook
    assert (update.relu_width, has_relus(update)) == (0.0, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lanes_of_one_pass_and_examples_of_one_batch_have_each_its_own_width():
    torch.manual_seed(0)
    update = rounded_off(GradientUpdate(Written(nn.ReLU()).double(), LOSS), 0.15)
    sizes = torch.tensor([0.1, 1.0, 10.0])
    inputs, labels = torch.randn(3, 1, 4).double() * sizes[:, None, None], torch.tensor([[0], [1], [2]])
    v = torch.randn(3, 4).double()
    together = jacobian_of(update, inputs, labels).gram(v)
    batch = inputs.reshape(1, 3, 4).expand(3, 3, 4), labels.reshape(1, 3).expand(3, 3)
    in_batch = jacobian_of(update, *batch, private=torch.arange(3)).gram(v)
    for unit in range(3):
        one = slice(unit, unit + 1)
        alone = jacobian_of(update, inputs[one], labels[one]).gram(v[one])
        torch.testing.assert_close(together[one], alone)
        torch.testing.assert_close(in_batch[one], alone / 9)  # J of an example in a batch of three is its own over 3


def test_examples_of_a_rounded_network_are_run_alone_as_those_of_others_are():
    """In float64, too: a width that one example shared with another would make them interact."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(1, 8, 4).double(), torch.randint(0, 3, (1, 8))
    lanes = [
        jacobian_of(update, inputs, labels, private=torch.zeros(1, dtype=torch.long)).lanes_per_pass
        for model in [Written(nn.ReLU()).double()]
        for update in (GradientUpdate(model, LOSS), rounded_off(GradientUpdate(model, LOSS), 0.15))
    ]
    assert lanes[1] > 0.5 * lanes[0]  # of a whole batch, an eighth


def test_several_local_steps_are_rounded_off():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4).double()
    found = []
    for relu in (nn.ReLU(), F.relu):
        update = rounded_off(LocalTrainingUpdate(Written(relu).double(), LOSS, lr=0.1, steps=3), 0.15)
        found.append(estimate_spectrum(jacobian_of(update, x)).gauss.nodes)
    torch.testing.assert_close(found[0], found[1])
    sharp = LocalTrainingUpdate(Written(nn.ReLU()).double(), LOSS, lr=0.1, steps=3)
    assert not torch.allclose(estimate_spectrum(jacobian_of(sharp, x)).gauss.nodes, found[0], rtol=0.01)


def test_modules_are_replaced_in_every_place_in_a_copy():
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(4, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 3))
    update = GradientUpdate(model, LOSS)
    smooth = with_relus_replaced(update, nn.GELU)
    assert [type(module) for module in smooth.model][1::2] == [nn.GELU, nn.GELU]
    assert (has_relus(update), has_relus(smooth), model[1] is relu) == (True, False, True)
