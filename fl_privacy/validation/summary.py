"""How well predictions and attacks agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_privacy.errors import InvalidInputError
from fl_privacy.interval import Interval
from fl_privacy.studies.study import BEATEN, rank_correlation
from fl_privacy.validation.study import RAN, ValidationRow

Vector = NDArray[np.float64]

_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of predicted and reached errors over some runs, the best attack of each.

    Attributes:
        runs: Number of (image, noise) pairs.
        spearman: Rank correlation, with a 95 % bootstrap interval over images.
        median_ratio: Median of reached over predicted error.
        median_deviation: Median of |ratio − 1|.
        own_ratio: Median of reached error over the one predicted for the very image.
        below: Share of runs in which any attack's error was below the predicted one, by whatever little. The prediction
            is a mean of draws: about half of one attack's are below it where it is right, more of the best of several.
        beaten: Share of runs in which any attack's error was more than 20 % below the lower end of the prediction.
        own_beaten: Share of runs in which it was more than 20 % below what was predicted for the very image.
        bound: Median of the lower bound over the reached error: 1 where it is tight.
        below_bound: Share of runs in which an attack's error was below the lower bound.
        failed: Share of runs that no attack explained: there the attacks failed, and show nothing. Where noise is large
            the prior's mean explains an update, too: then only `converged` says that an attack is done.
        converged: Share of runs in which the closest attack reached a stationary point.
        error: Median error of the closest attack, rmse per input element.
        psnr: Median of the closest attack, in dB.
        ssim: Likewise, at most 1.
    """

    runs: int
    spearman: Interval[float]
    median_ratio: float
    median_deviation: float
    own_ratio: float
    below: float
    beaten: float
    own_beaten: float
    bound: float
    below_bound: float
    failed: float
    converged: float
    error: float
    psnr: float
    ssim: float


def summarize(rows: Sequence[ValidationRow]) -> tuple[Agreement, dict[float, Agreement]]:
    """Returns the agreement over all runs and within each noise level, the best attack of each.

    Attacks that could not be run say nothing and are left out.

    Raises:
        InvalidInputError: There are no rows, or no attack could be run.
    """
    if not rows:
        raise InvalidInputError("expected the rows of a study, got none")
    ran = [row for row in rows if row.status == RAN]
    if not ran:
        raise InvalidInputError(f"expected an attack that can be run on these gradients, got: {rows[0].status}")
    rows = ran
    levels = sorted({row.noise_std for row in rows})
    return _agreement(rows), {level: _agreement([row for row in rows if row.noise_std == level]) for level in levels}


def summarize_attacks(rows: Sequence[ValidationRow]) -> dict[str, Agreement]:
    """Returns the agreement over all runs of each attack alone; nothing for those that could not be run."""
    ran = [row for row in rows if row.status == RAN]
    return {
        name: _agreement([row for row in ran if row.attack == name]) for name in dict.fromkeys(r.attack for r in ran)
    }


def inapplicable(rows: Sequence[ValidationRow]) -> dict[str, str]:
    """Returns, for every attack that could not be run, why."""
    return {row.attack: row.status for row in rows if row.status != RAN}


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
    own_ratios = np.array([row.error / row.predicted_own for row in best])
    return Agreement(
        runs=len(best),
        spearman=_spearman(best),
        median_ratio=float(np.median(ratios)),
        median_deviation=float(np.median(np.abs(ratios - 1))),
        own_ratio=float(np.median(own_ratios)),
        below=float(np.mean(ratios < 1)),
        beaten=float(np.mean([row.error < BEATEN * row.predicted_lower for row in best])),
        own_beaten=float(np.mean(own_ratios < BEATEN)),
        bound=float(np.median([row.lower_bound / row.error for row in best])),
        below_bound=float(np.mean([row.error < row.lower_bound for row in best])),
        failed=float(np.mean([(row.image, row.noise_std) not in explained for row in best])),
        converged=float(np.mean([row.converged for row in best])),
        error=float(np.median([row.error for row in best])),
        psnr=float(np.median([row.psnr for row in best])),
        ssim=float(np.median([row.ssim for row in best])),
    )


def _spearman(best: Sequence[ValidationRow]) -> Interval[float]:
    """Spearman's rank correlation; its interval resamples images, whose noise levels belong together."""

    def correlation(chosen: Sequence[ValidationRow]) -> float:
        return rank_correlation([row.predicted for row in chosen], [row.error for row in chosen])

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
