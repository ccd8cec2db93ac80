"""The study that samples posteriors: against a posterior that is known in closed form, and beside predictions."""

import math

import pytest
import torch

from fl_privacy.studies import best_attacker
from fl_privacy.studies.best_attacker import BestAttackerSettings


def rms(rows, name):
    return math.sqrt(sum(getattr(row, name) ** 2 for row in rows) / len(rows))


def test_chains_find_the_mean_of_a_posterior_that_little_noise_leaves_nearly_gaussian(conducted):
    rows, _ = conducted(
        "best-attacker", activations=("tanh",), noise_stds=(1e-3,), num_inputs=6, num_chains=2, steps=400
    )
    assert rms(rows, "error") == pytest.approx(rms(rows, "predicted"), rel=0.25)  # 96 numbers: known to 7 %
    assert all(row.predicted == row.audited for row in rows)  # nothing to round off
    assert all(0.1 < row.accepted < 0.6 for row in rows)


def test_of_relus_an_audit_predicts_less_error_than_their_own_jacobian_and_than_the_best_attacker_has(conducted):
    rows, _ = conducted(
        "best-attacker", activations=("relu",), noise_stds=(1e-3,), num_inputs=6, num_chains=2, steps=400
    )
    assert len(rows) == 6
    assert all(row.audited < row.predicted for row in rows)
    assert rms(rows, "audited") < 0.9 * rms(rows, "predicted")
    assert rms(rows, "audited") < rms(rows, "error")
    assert all(0.1 < row.accepted < 0.6 for row in rows)


def test_the_mean_of_a_gaussian_posterior():
    settings = BestAttackerSettings(num_chains=4, steps=4000, prior_std=1.0)
    precision = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).double()
    center = torch.tensor([[0.5, -1.0], [2.0, 0.0], [0.0, 0.0]]).double()

    class Gaussian:
        num_units = 3

        def __init__(self, units=None):
            self.units = torch.arange(3) if units is None else units

        def select(self, units):
            return Gaussian(self.units[units])

        def objective(self, x):
            off = x - center[self.units]
            return torch.einsum("ui,ij,uj->u", off, precision, off)

    root = torch.linalg.cholesky(torch.linalg.inv(precision)).expand(3, -1, -1)
    mean, accepted = best_attacker._posterior_mean(Gaussian(), center + 1.0, root, settings)
    torch.testing.assert_close(mean, center, rtol=0, atol=0.08)
    assert (accepted - 0.25).abs().max() < 0.1
