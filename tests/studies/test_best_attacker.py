"""The study that samples posteriors: against a posterior that is known in closed form, and beside predictions."""

import math

import pytest
import torch

from fl_privacy.studies import best_attacker
from fl_privacy.studies.best_attacker import BestAttackerSettings


def rms(rows, name):
    return math.sqrt(sum(getattr(row, name) ** 2 for row in rows) / len(rows))


def test_chains_find_the_mean_of_a_posterior_that_little_noise_leaves_nearly_gaussian(conducted):
    rows, _ = conducted("best-attacker", networks=("tanh",), noise_stds=(1e-3,), num_inputs=6, num_chains=2, steps=400)
    assert rms(rows, "error") == pytest.approx(rms(rows, "predicted"), rel=0.25)  # 96 numbers: known to 7 %
    assert all(row.predicted == row.audited for row in rows)  # nothing to round off
    assert all(0.1 < row.accepted < 0.6 for row in rows)


def test_of_relus_an_audit_predicts_less_error_than_their_own_jacobian_and_than_the_best_attacker_has(conducted):
    rows, _ = conducted("best-attacker", networks=("relu",), noise_stds=(1e-3,), num_inputs=6, num_chains=2, steps=400)
    assert len(rows) == 6
    assert all(row.audited < row.predicted for row in rows)
    assert rms(rows, "audited") < 0.9 * rms(rows, "predicted")
    assert rms(rows, "audited") < rms(rows, "error")
    assert all(0.1 < row.accepted < 0.6 for row in rows)


class GaussianPosteriors:
    """Three of them, of one covariance."""

    precision = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double()
    centers = torch.tensor([[0.5, -1.0], [2.0, 0.0], [0.0, 0.0]]).double()
    root = torch.linalg.cholesky(torch.linalg.inv(precision))

    def __init__(self, units=None):
        self.units = torch.arange(3) if units is None else units

    def select(self, units):
        return GaussianPosteriors(self.units[units])

    def objective(self, x):
        off = x - self.centers[self.units]
        return torch.einsum("ui,ij,uj->u", off, self.precision, off)

    @classmethod
    def sample(cls, starts, **settings):
        generators = [torch.Generator().manual_seed(index) for index in range(len(starts))]
        posteriors = cls(torch.arange(len(starts)) % 3)
        root = cls.root.expand(len(starts), -1, -1)
        return best_attacker._sample(posteriors, starts, root, generators, BestAttackerSettings(**settings))


def test_chains_that_forget_their_start_find_the_mean_of_a_gaussian_posterior():
    found = GaussianPosteriors.sample(GaussianPosteriors.centers + 1.0, num_chains=4, steps=4000)
    torch.testing.assert_close(found.means.mean(1), GaussianPosteriors.centers, rtol=0, atol=0.08)
    assert (found.accepted - 0.25).abs().max() < 0.1


@pytest.mark.parametrize("steps", [8, 40])
@pytest.mark.parametrize("num_chains", [1, 3])
def test_chains_that_do_not_forget_it_err_less_than_the_best_attacker_and_more_as_they_go_on(num_chains, steps):
    generator = torch.Generator().manual_seed(0)
    centers = GaussianPosteriors.centers[torch.arange(900) % 3]
    normal = torch.randn(900, 2, generator=generator, dtype=torch.float64)
    truths = centers + normal @ GaussianPosteriors.root.T
    found = GaussianPosteriors.sample(truths, num_chains=num_chains, steps=steps)
    best, half, whole = (
        (means - truths[:, None]).square().mean() for means in (centers[:, None], found.half_means, found.means)
    )
    assert half < whole < best


class Flat:
    """Every proposal is accepted, or none but the start."""

    def __init__(self, start, *, only_start):
        self.start, self.only_start = start, only_start

    def select(self, units):
        return Flat(self.start[units], only_start=self.only_start)

    def objective(self, x):
        here = (x == self.start).all(1)
        return torch.where(here, 0.0, torch.inf if self.only_start else 0.0).double()


@pytest.mark.parametrize("steps", [8, 9])
@pytest.mark.parametrize("num_chains", [1, 2])
def test_means_are_over_the_start_and_the_states_that_follow_the_pilot(num_chains, steps):
    start = torch.tensor([[1.0, 2.0, 3.0]]).double()
    root = torch.diag(torch.tensor([1.0, 2.0, 0.5])).double()[None]
    settings = BestAttackerSettings(num_chains=num_chains, steps=steps)
    found = best_attacker._sample(
        Flat(start, only_start=False), start, root, [torch.Generator().manual_seed(3)], settings
    )
    generator, size, states = torch.Generator().manual_seed(3), 0.5, [start.expand(num_chains, -1)]
    for step in range(2 + steps - 1):  # two of a pilot
        moves = torch.randn(num_chains, 3, generator=generator, dtype=torch.float64) @ root[0]
        torch.rand(num_chains, generator=generator, dtype=torch.float64)
        if step < 2:
            size *= math.exp(0.07 * (1 - 0.25))
        else:
            states.append(states[-1] + size * moves)
    torch.testing.assert_close(found.means[0], torch.stack(states).mean(0))
    torch.testing.assert_close(found.half_means[0], torch.stack(states[: steps // 2]).mean(0))
    assert found.accepted.tolist() == [1.0]


def test_chains_that_cannot_move_stay_at_the_truth():
    start = torch.tensor([[1.0, 2.0]]).double()
    root = torch.eye(2, dtype=torch.float64)[None]
    found = best_attacker._sample(
        Flat(start, only_start=True), start, root, [torch.Generator()], BestAttackerSettings(num_chains=2, steps=8)
    )
    torch.testing.assert_close(found.means, start.expand(1, 2, -1))
    assert found.accepted.tolist() == [0.0]


def test_inputs_of_a_residual_network_are_the_same_however_many_are_walked_at_once(conducted):
    options = {"networks": ("resnet8",), "noise_stds": (1e-2,), "num_inputs": 2, "num_chains": 2, "steps": 8}
    together, _ = conducted("best-attacker", **options)
    apart, _ = conducted("best-attacker", **options, inputs_at_once=1)
    for one, other in zip(together, apart, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-6)
        assert one.audited == pytest.approx(other.audited, rel=1e-6)
        assert 0 < one.half_error < one.error < one.audited < one.predicted  # so few steps do not come far
