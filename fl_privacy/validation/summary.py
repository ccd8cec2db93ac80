"""How well predictions and attacks agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_privacy.errors import InvalidInputError
from fl_privacy.extras import require
from fl_privacy.interval import Interval
from fl_privacy.validation.study import ValidationRow

Vector = NDArray[np.float64]

_RESAMPLES = 1000
BEATEN = 0.8
"""An attack beats a prediction when its error is below this share of the predicted error's lower end."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of predicted and reached errors over some runs, the best attack of each.

    Attributes:
        runs: Number of (image, noise) pairs.
        spearman: Rank correlation, with a 95 % bootstrap interval over images.
        median_ratio: Median of reached over predicted error.
        median_deviation: Median of |ratio − 1|.
        beaten: Share of runs in which any attack's error was more than 20 % below the lower end of the prediction.
        failed: Share of runs that no attack explained: there the attacks failed, and show nothing. Where noise is large
            the prior's mean explains an update, too: then only `converged` says that an attack is done.
        converged: Share of runs in which the closest attack reached a stationary point.
    """

    runs: int
    spearman: Interval[float]
    median_ratio: float
    median_deviation: float
    beaten: float
    failed: float
    converged: float


def summarize(rows: Sequence[ValidationRow]) -> tuple[Agreement, dict[float, Agreement]]:
    """Returns the agreement over all runs and within each noise level.

    Raises:
        InvalidInputError: There are no rows.
    """
    if not rows:
        raise InvalidInputError("expected the rows of a study, got none")
    levels = sorted({row.noise_std for row in rows})
    return _agreement(rows), {level: _agreement([row for row in rows if row.noise_std == level]) for level in levels}


def best_attacks(rows: Sequence[ValidationRow]) -> list[ValidationRow]:
    """Returns, for every image and noise level, the row of the attack that came closest."""
    best: dict[tuple[int, float], ValidationRow] = {}
    for row in rows:
        key = (row.image, row.noise_std)
        if key not in best or row.error < best[key].error or math.isnan(best[key].error):
            best[key] = row
    return list(best.values())


def explained_runs(rows: Sequence[ValidationRow]) -> set[tuple[int, float]]:
    """Returns the (image, noise) pairs whose update at least one attack explained."""
    return {(row.image, row.noise_std) for row in rows if row.explained}


def _agreement(rows: Sequence[ValidationRow]) -> Agreement:
    best = best_attacks(rows)
    explained = explained_runs(rows)
    ratios = np.array([row.ratio for row in best])
    return Agreement(
        runs=len(best),
        spearman=_spearman(best),
        median_ratio=float(np.median(ratios)),
        median_deviation=float(np.median(np.abs(ratios - 1))),
        beaten=float(np.mean([row.error < BEATEN * row.predicted_lower for row in best])),
        failed=float(np.mean([(row.image, row.noise_std) not in explained for row in best])),
        converged=float(np.mean([row.converged for row in best])),
    )


def _spearman(best: Sequence[ValidationRow]) -> Interval[float]:
    """Spearman's rank correlation; its interval resamples images, whose noise levels belong together."""
    stats: Any = require("scipy.stats")

    def correlation(chosen: Sequence[ValidationRow]) -> float:
        predicted, reached = [row.predicted for row in chosen], [row.error for row in chosen]
        if len(set(predicted)) < 2 or len(set(reached)) < 2:
            return float("nan")
        return float(stats.spearmanr(predicted, reached).statistic)

    images: dict[int, list[ValidationRow]] = {}
    for row in best:
        images.setdefault(row.image, []).append(row)
    groups, generator = list(images.values()), np.random.default_rng(0)
    draws = []
    for _ in range(_RESAMPLES):
        picked = generator.integers(len(groups), size=len(groups))
        draws.append(correlation([row for index in picked for row in groups[index]]))
    known: Vector = np.array([draw for draw in draws if np.isfinite(draw)])
    low, high = np.quantile(known, [0.025, 0.975]) if known.size else (float("nan"), float("nan"))
    return Interval(float(low), correlation(best), float(high))
