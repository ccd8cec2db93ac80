"""The rule that picks a family of noise: against its formula, and against every cell of the maps that it rests on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fl_privacy.audit.family import cheaper_family, is_sure, relative_noise
from fl_privacy.studies.noise_accuracy import AccuracyRow, AccuracySettings, _verdicts
from fl_privacy.studies.results import read_rows

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("target", [0.75, 0.5, 0.3, 0.1])
def test_isotropic_noise_may_be_nine_tenths_of_the_relative_power_of_noise_on_inputs(target):
    most = 0.9 * (1 / target - 1)
    assert cheaper_family(0.999 * most, target_leakage=target) == "isotropic"
    assert cheaper_family(1.001 * most, target_leakage=target) == "shaped"


@pytest.mark.parametrize(("quotient", "sure"), [(0.89, True), (0.91, False), (3.99, False), (4.01, True)])
def test_between_quotients_of_nine_tenths_and_four_the_rule_is_not_sure_of_itself(quotient, sure):
    for target in (0.75, 0.1):
        assert is_sure(quotient * (1 / target - 1), target_leakage=target) is sure


def test_relative_noise_is_that_of_all_shares_on_the_average_of_all_clients():
    told = relative_noise(0.1, update_dim=400, average_norm=2.0, num_clients=25, shares=9)
    assert told == pytest.approx(0.1 * math.sqrt(9 * 400 / 25) / 2.0)
    assert relative_noise(0.1, update_dim=400, average_norm=0.0, num_clients=25, shares=9) == math.inf


# On MNIST over 100 rounds, with steps a tenth as large, isotropic noise is ahead in three cells, on one set of images;
# of these rehearsals find two, and that by three seeds had none. In the mean of it and two others it is not.
AHEAD = {
    "-mnist-100-ends": {(4, 100, 0.1)},
    "-mnist-100-seeds": {(32, 100, 0.3)},
}


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("", 12),
        ("-100", 12),
        ("-100-seeds", 1),
        ("-mnist", 12),
        ("-mnist-seeds", 3),
        ("-mnist-100", 6),
        ("-mnist-100-ends", 6),
        ("-mnist-100-seeds", 1),
        ("-mnist-100-redrawn", 2),
        ("-mnist-100-redrawn-fours", 1),
        ("-cifar10", 12),
        ("-cifar10-100", 6),
        ("-cifar10-100-ends", 6),
    ],
)
def test_what_is_recommended_is_within_a_point_of_the_best_protected_arm_but_where_it_is_known_not_to_be(name, cells):
    folder = STUDIES / f"noise-accuracy{name}"
    if not folder.is_dir():
        pytest.skip("the studies are not here")
    written = json.loads((folder / "settings.json").read_text())["settings"]
    settings = AccuracySettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in written.items()})
    verdicts = _verdicts(settings, read_rows(folder / "results.csv", AccuracyRow))
    assert len(verdicts) == cells
    assert {cell for cell, verdict in verdicts.items() if not verdict.behind <= 1} == AHEAD.get(name, set())
