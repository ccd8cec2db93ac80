"""Labels and inputs that need no search, metrics against known values, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fl_privacy import GradientUpdate, LocalTrainingUpdate
from fl_privacy.attacks import (
    ATTACKS,
    LBFGS,
    Adam,
    AttackProblem,
    GaussianPrior,
    GaussNewton,
    GradientMatching,
    IndependentNoise,
    InputDenoising,
    IsotropicNoise,
    LinearLayerLeak,
    PosteriorLinearization,
    StopReason,
    WithWhitePrior,
    aligned,
    inverting_gradients,
    leaked_examples,
    psnr,
    recover_label_counts,
    recover_labels,
    relative_squared_distance,
    rmse,
    ssim,
)
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence import UpdateMap

from .cases import F64, LinearUpdate, Truth, digits_prior, digits_problem, picked, shared_by

CLASSES = 6


def perceptron(*, bias: bool = True, classes: int = CLASSES) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, classes, bias=bias)).double()


def truth_of(update: UpdateMap, labels: Tensor, *, noise_std: float = 1e-9) -> Truth:
    inputs = torch.rand(*labels.shape, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=F64)
    return shared_by(update, inputs, labels, noise_std=noise_std, prior=digits_prior())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [2, CLASSES])
def test_the_label_of_one_example_is_certain(bias: bool, classes: int) -> None:
    labels = torch.arange(classes)[:, None]
    update = GradientUpdate(perceptron(bias=bias, classes=classes), nn.CrossEntropyLoss())
    truth = truth_of(update, labels)
    assert torch.equal(recover_labels(replace(truth.problem, labels=None)), labels)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [False, True], ids=["gradient", "training"])
def test_label_counts_of_a_batch(bias: bool, training: bool) -> None:
    model, loss = perceptron(bias=bias), nn.CrossEntropyLoss()
    update = LocalTrainingUpdate(model, loss, lr=0.01, steps=2) if training else GradientUpdate(model, loss)
    labels = torch.randint(CLASSES, (5, 12), generator=torch.Generator().manual_seed(0))
    counts = recover_label_counts(replace(truth_of(update, labels).problem, labels=None))
    expected = torch.nn.functional.one_hot(labels, CLASSES).sum(1)
    assert torch.equal(counts.sum(-1), torch.full((5,), 12))
    wrong = (counts - expected).abs().sum() / 2
    assert wrong <= 2  # of 60 examples
    recovered = recover_labels(replace(truth_of(update, labels).problem, labels=None))
    assert torch.equal(recovered, recovered.sort(dim=1).values)
    assert torch.equal(torch.nn.functional.one_hot(recovered, CLASSES).sum(1), counts)


def test_weight_decay_is_taken_out_of_local_training() -> None:
    update = LocalTrainingUpdate(perceptron(), nn.CrossEntropyLoss(), lr=0.01, steps=1, weight_decay=50.0)
    labels = torch.arange(CLASSES)[:, None]
    assert torch.equal(recover_labels(replace(truth_of(update, labels).problem, labels=None)), labels)


def test_a_first_linear_layer_gives_its_example_away() -> None:
    truth = truth_of(GradientUpdate(perceptron(), nn.CrossEntropyLoss()), torch.tensor([[0], [3]]))
    result = LinearLayerLeak().run(replace(truth.problem, labels=None))
    assert (rmse(result.inputs, truth.inputs) < 1e-6).all()
    assert result.converged.all()
    with pytest.raises(InvalidInputError, match="leaked_examples"):
        LinearLayerLeak().run(replace(truth.problem, num_examples=2, labels=None))


def test_a_layer_that_no_example_activates_leaks_nothing_and_says_so() -> None:
    model = perceptron()
    assert isinstance(model[1], nn.Linear)
    nn.init.constant_(model[1].bias, -100.0)
    truth = truth_of(GradientUpdate(model, nn.CrossEntropyLoss()), torch.tensor([[0]]))
    result = LinearLayerLeak().run(replace(truth.problem, shared=torch.zeros_like(truth.problem.shared)))
    assert result.stop == (StopReason.STALLED,)
    torch.testing.assert_close(result.inputs[0, 0], truth.problem.prior.mean)


def test_examples_of_a_batch_are_read_off_the_rows_that_are_theirs() -> None:
    """Rows that fire on one example each: five for the first, three for the second, and one on both."""
    model = perceptron()
    first, second = torch.eye(64, dtype=F64)[:2]
    assert isinstance(model[1], nn.Linear)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(-1.0)
        model[1].weight[:5] = 2 * first
        model[1].weight[5:8] = 2 * second
        model[1].weight[8] = 2 * (first + second)
    inputs = torch.stack([first, second]).reshape(1, 2, 1, 8, 8)
    update = GradientUpdate(model, nn.CrossEntropyLoss())
    truth = shared_by(update, inputs, torch.tensor([[0, 1]]), noise_std=1e-17, prior=digits_prior())
    (leaked,) = leaked_examples(replace(truth.problem, labels=None))
    assert leaked.rows.tolist() == [5, 3]
    torch.testing.assert_close(leaked.inputs, inputs[0], rtol=0, atol=1e-6)
    (all_rows,) = leaked_examples(truth.problem, min_rows=1)
    assert all_rows.rows.tolist() == [5, 3, 1]


def test_attacks_that_need_another_architecture_say_so() -> None:
    truth = digits_problem(1, noise_std=1e-3)
    with pytest.raises(InvalidInputError, match="linear layer"):
        LinearLayerLeak().run(truth.problem)


def test_shaped_noise_is_taken_off_by_its_covariance() -> None:
    """u linear, x ~ N(μ, τ²), a ~ N(0, S): the result is the posterior mean, and its error the predicted one."""
    generator = torch.Generator().manual_seed(0)
    units, dim, tau = 100, 8, 0.7
    spread = torch.logspace(-1, 1, dim, dtype=F64)
    model = LinearUpdate(torch.randn(1, 20, dim, generator=generator, dtype=F64))
    x = tau * torch.randn(units, 1, dim, generator=generator, dtype=F64)
    noisy = x + spread.sqrt() * torch.randn(x.shape, generator=generator, dtype=F64)
    wide = GaussianPrior(torch.zeros(dim, dtype=F64), 100.0)
    labels = torch.zeros(units, 1, dtype=torch.long)
    truth = shared_by(GradientUpdate(model, picked), noisy, labels, noise_std=1e-6, prior=wide)
    plain = GaussNewton().run(truth.problem)
    attack = InputDenoising(attack=GaussNewton(), covariance=lambda v: v * spread, prior_std=tau)
    result = attack.run(truth.problem)
    torch.testing.assert_close(result.inputs, noisy * tau**2 / (tau**2 + spread), rtol=1e-3, atol=1e-4)
    leakage = (tau**2 / (tau**2 + spread)).mean().item()
    reached = rmse(result.inputs, x).square().mean().sqrt().item()
    assert reached == pytest.approx(tau * math.sqrt(1 - leakage), rel=0.1)
    assert rmse(plain.inputs, x).mean() > 2 * reached


def test_metrics() -> None:
    truth = torch.zeros(2, 1, 1, 8, 8)
    rebuilt = truth.clone()
    rebuilt[0] = 0.1
    torch.testing.assert_close(rmse(rebuilt, truth), torch.tensor([0.1, 0.0], dtype=F64))
    assert psnr(rebuilt, truth, data_range=1.0)[0].item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(rebuilt, truth, data_range=1.0)[1].item() == math.inf
    batch = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(aligned(batch[:, [2, 0, 3, 1]], batch), batch)
    with pytest.raises(InvalidInputError, match="one shape"):
        rmse(truth, truth[:1])
    with pytest.raises(InvalidInputError, match="data_range > 0"):
        psnr(rebuilt, truth, data_range=0.0)


def test_ssim() -> None:
    pytest.importorskip("skimage.metrics")
    images = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(images, images, data_range=1.0), torch.ones(2, dtype=F64))
    # Constant images: only the luminance term is left, (2ab + c)/(a² + b² + c) with c = 0.01².
    dark, light = torch.full((1, 1, 1, 8, 8), 0.2), torch.full((1, 1, 1, 8, 8), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert ssim(dark, light, data_range=1.0).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InvalidInputError, match="3 pixels"):
        ssim(images[..., :2], images[..., :2], data_range=1.0)


def test_the_prior_that_examples_suggest() -> None:
    examples = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    prior = GaussianPrior.from_examples(examples)
    torch.testing.assert_close(prior.mean, torch.tensor([1.0, 2.0]))
    assert prior.std == pytest.approx(math.sqrt((2 + 8) / 2))
    draws = prior.sample(2000, 2, torch.Generator().manual_seed(0))
    assert draws.shape == (2000, 4)
    assert draws.std().item() == pytest.approx(math.sqrt(5 + 0.25), rel=0.05)
    torch.testing.assert_close(draws.mean(0), prior.start(1, 2)[0], rtol=0, atol=0.2)


def test_attacks_by_name() -> None:
    assert {name: build() for name, build in ATTACKS.items()} == {
        "gauss-newton": GaussNewton(),
        "gauss-newton-white": WithWhitePrior(GaussNewton()),
        "posterior-linearization": PosteriorLinearization(),
        "dgl": GradientMatching(distance=relative_squared_distance, optimizer=LBFGS()),
        "dgl-adam": GradientMatching(distance=relative_squared_distance, optimizer=Adam()),
        "inverting-gradients": inverting_gradients(),
        "linear-layer": LinearLayerLeak(),
    }


def problem_with(**changes: object) -> AttackProblem:
    problem = digits_problem(2, noise_std=1e-3).problem
    return replace(problem, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": torch.zeros(2, 3, dtype=F64)}, r"shared updates of shape \[units, 11638\]"),
        ({"shared": torch.full((2, 11638), torch.nan, dtype=F64)}, "finite shared"),
        ({"noise": IsotropicNoise(torch.ones(3))}, "noise of 2 units"),
        ({"labels": torch.zeros(3, 1, dtype=torch.long)}, "labels that begin with"),
        ({"prior": GaussianPrior(torch.zeros(1, 8, 8), 1.0)}, "prior of torch.float64"),
        ({"num_examples": 0}, "num_examples >= 1"),
    ],
)
def test_problems_that_do_not_fit_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        problem_with(**changes)


@pytest.mark.parametrize(
    "build",
    [
        lambda: IsotropicNoise(torch.zeros(2)),
        lambda: IndependentNoise(torch.ones(2)),
        lambda: GaussianPrior(torch.zeros(3), 0.0),
        lambda: GaussianPrior(torch.tensor([math.nan]), 1.0),
        lambda: GaussianPrior.from_examples(torch.zeros(1, 3)),
        lambda: InputDenoising(attack=GaussNewton(), covariance=lambda v: v, prior_std=0.0),
    ],
)
def test_beliefs_out_of_range_are_refused(build: type[GaussianPrior]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        build()
