"""A small run of the study of attackers who know mechanism or images' statistics."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fl_privacy.attacks import GaussianPrior
from fl_privacy.cli import app
from fl_privacy.influence.covariance import InputCovariance
from fl_privacy.studies.informed_attackers import IMAGES, MAPPED, OTHERS, SHIFTED, WHITE, InformedRow, _posterior
from fl_privacy.studies.results import read_rows

F64 = torch.float64


def test_the_posterior_is_that_of_many_draws_from_its_own_prior():
    generator = torch.Generator().manual_seed(0)
    root, other = (torch.randn(6, 6, generator=generator, dtype=F64) for _ in range(2))
    covariance = InputCovariance.of(root @ root.T + 0.1 * torch.eye(6, dtype=F64))
    prior = GaussianPrior(torch.zeros(6, dtype=F64), 0.7, covariance)
    x = 0.7 * torch.randn(20000, 6, generator=generator, dtype=F64) * covariance.variances.sqrt() @ covariance.basis.T
    seen = x + 0.3 * torch.randn(20000, 6, generator=generator, dtype=F64) @ other.T
    estimates = torch.stack([_posterior(prior, 0.09 * other @ other.T, one)[0] for one in seen[:300]])
    best = torch.linalg.lstsq(seen, x).solution  # the best linear estimate, by the draws themselves
    torch.testing.assert_close(estimates, seen[:300] @ best, rtol=0.05, atol=0.05)
    left = (seen @ best - x).square().mean().sqrt()
    assert _posterior(prior, 0.09 * other @ other.T, seen[0])[1] == pytest.approx(float(left), rel=0.02)


def test_the_joint_attack_breaks_mapped_noise_alone_and_pixels_statistics_tell_more_than_a_white_prior(tmp_path):
    arguments = ["study", "informed-attackers", "--num-images", "2", "--targets", "0.3,0.5", "--num-starts", "1"]
    outcome = CliRunner().invoke(app, [*arguments, "--fresh", "10", "-o", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    rows = read_rows(tmp_path / "results.csv", InformedRow)
    by = {(row.image, row.target, row.attack): row for row in rows}
    assert len(by) == len(rows) == 2 * 2 * 7
    for image in range(2):
        for target in (0.3, 0.5):
            mine = {attack: by[image, target, attack] for attack in (MAPPED, SHIFTED, WHITE, IMAGES, *OTHERS)}
            assert mine[MAPPED].error < 1e-6 * mine[MAPPED].predicted
            # Whoever searches for both finds their sum, and is left with its posterior mean.
            assert mine[SHIFTED].error == pytest.approx(mine[WHITE].error, rel=1e-3)
            assert mine[WHITE].predicted_leakage == pytest.approx(target, rel=1e-6)
            assert mine[IMAGES].predicted_leakage > target + 0.1
            fresh = by[image, target, "10 fresh draws"]
            # At most as much as white noise, by concavity of a direction's share of T draws in that of one.
            assert target + 0.1 < fresh.predicted_leakage < 10 * target / (1 + 9 * target)
    for attack in (WHITE, IMAGES, *OTHERS):
        ratios = [row.error / row.predicted for row in rows if row.attack == attack]
        assert 0.6 < statistics.median(ratios) < 1.5


def test_images_too_large_for_the_joint_attack_are_named(tmp_path):
    for number in range(20):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 10 * number, dtype=np.uint8)).save(path)
    arguments = ["study", "informed-attackers", "--dataset", "folder", "--data-root", str(tmp_path / "data")]
    outcome = CliRunner().invoke(app, [*arguments, "--num-images", "1", "-o", str(tmp_path / "out")])
    assert outcome.exit_code == 2
    assert "at most 256 elements for the joint attack, got 3072: pass --no-joint" in outcome.output
