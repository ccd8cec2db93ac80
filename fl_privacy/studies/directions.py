"""Noise along single eigenvectors: the smaller the eigenvalue, the further off what is rebuilt.

For the perturbation δ = ‖δ‖·J·v_k/‖J·v_k‖, along a left singular vector of J, I²F's shift is

    (G + ε)⁻¹Jᵀδ = ‖δ‖·√λ_k/(λ_k + ε)·v_k,

which is the law ‖δ‖/√λ_k while ε ≪ λ_k. The attacker takes δ for noise of its power, σ² = ‖δ‖²/P and ε = σ²/τ².
J has its ReLUs rounded off, as in audits: behind ReLUs δ is along a singular vector of that one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fl_privacy.attacks import GaussNewton
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.spectrum import dense_gram
from fl_privacy.studies.results import Portion
from fl_privacy.studies.scene import Scene, SceneSettings
from fl_privacy.studies.settings import option
from fl_privacy.studies.study import Study, Summary, spread_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINEAR = 1.1
"""Error and law agree to this factor where the update is called linear."""


@dataclass(frozen=True, kw_only=True)
class DirectionsSettings(SceneSettings):
    """Directions over the whole spectrum, at several lengths."""

    num_images: int = option(2, "Images, the first of the test set.", minimum=1)
    num_directions: int = option(12, "Eigenvectors, evenly spaced by rank from the largest eigenvalue on.", minimum=2)
    norms: tuple[float, ...] = option(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 5.0), "Lengths of the perturbation; the paper's is 5.", above=0
    )


@dataclass(frozen=True, kw_only=True)
class DirectionRow:
    """One perturbation along one eigenvector; lengths are norms in units of the input."""

    image: int
    norm: float
    """‖δ‖."""
    rank: int
    """Of the eigenvalue; 0 is the largest."""
    eigenvalue: float
    ridge: float
    law: float
    """‖δ‖/√λ."""
    shift: float
    """I²F's, with the ridge."""
    predicted: float
    """The root of the squares of shift and of the ridge's pull to the prior, √(‖shift‖² + ε²τ² tr((G + ε)⁻²))."""
    error: float
    """Of the attack."""
    alignment: float
    """|cos| between the attack's error and the eigenvector."""
    converged: bool
    explained: bool


def _portions(settings: DirectionsSettings) -> Iterator[Portion[DirectionRow]]:
    scene = Scene.of(settings)
    dim = scene.images[0].numel()
    ranks = sorted({round(rank) for rank in torch.linspace(0, dim - 1, settings.num_directions).tolist()})
    for image in range(settings.num_images):
        jacobian = scene.jacobian([image])
        spectrum: list[tuple[Tensor, Tensor]] = []  # of this image, found when it is first needed
        for norm in settings.norms:
            keys = [(image, norm, rank) for rank in ranks]
            yield Portion(keys, partial(_rows, scene, image, jacobian, spectrum, ranks, norm))


def _rows(
    scene: Scene,
    image: int,
    jacobian: UpdateJacobian,
    spectrum: list[tuple[Tensor, Tensor]],
    ranks: Sequence[int],
    norm: float,
) -> Iterator[DirectionRow]:
    if not spectrum:
        spectrum.append(eigenpairs(jacobian))
    values, vectors = spectrum[0]
    repeated = jacobian.select(torch.zeros(len(ranks), dtype=torch.long, device=jacobian.device))
    directions, eigenvalues = vectors[:, ranks].T.contiguous(), values[ranks]
    delta = torch.nn.functional.normalize(repeated.jvp(directions), dim=1) * norm
    noise_std, tau = norm / math.sqrt(jacobian.update_dim), scene.prior.std
    ridge = (noise_std / tau) ** 2
    attacker = GaussNewton(tolerance=1e-5, max_products=2 * jacobian.input_dim, hops=0)
    group = [image] * len(ranks)
    attack = attacker.run(scene.problem(group, scene.gradients(group) + delta, noise_std))
    errors = (attack.inputs - scene.images[group]).flatten(1)
    lengths = errors.norm(dim=1)
    shift = norm * eigenvalues.sqrt() / (eigenvalues + ridge)
    pull = ridge**2 * tau**2 * (values + ridge).square().reciprocal().sum()
    for unit, rank in enumerate(ranks):
        yield DirectionRow(
            image=image,
            norm=norm,
            rank=rank,
            eigenvalue=float(eigenvalues[unit]),
            ridge=ridge,
            law=norm / math.sqrt(float(eigenvalues[unit])),
            shift=float(shift[unit]),
            predicted=float((shift[unit].square() + pull).sqrt()),
            error=float(lengths[unit]),
            alignment=float((errors[unit] @ directions[unit]).abs() / lengths[unit]),
            converged=bool(attack.converged[unit]),
            explained=bool(attack.explained[unit]),
        )


def eigenpairs(jacobian: UpdateJacobian) -> tuple[Tensor, Tensor]:
    """Returns the eigenvalues `[D]` of one unit's G, largest first, and its eigenvectors as columns `[D, D]`."""
    values, vectors = torch.linalg.eigh(dense_gram(jacobian, 0))
    # Rounding may leave an eigenvalue that is zero below it.
    return values.flip(0).clamp(min=torch.finfo(values.dtype).tiny), vectors.flip(1)


def slope(rows: Sequence[DirectionRow]) -> float:
    """Returns the slope of log error over log eigenvalue, by least squares; NaN of fewer than two eigenvalues."""
    if len({row.eigenvalue for row in rows}) < 2:
        return math.nan
    x, y = np.log([row.eigenvalue for row in rows]), np.log([row.error for row in rows])
    return float(np.polyfit(x, y, 1)[0])


def _linear(row: DirectionRow) -> bool:
    return 1 / LINEAR < row.error / row.law < LINEAR


def _linear_slope(rows: Sequence[DirectionRow]) -> float:
    """The median slope over the lengths that are linear at several eigenvalues."""
    slopes = [slope([row for row in rows if row.norm == norm]) for norm in {row.norm for row in rows}]
    return statistics.median([s for s in slopes if math.isfinite(s)] or [math.nan])


def _summarize(settings: DirectionsSettings, rows: Sequence[DirectionRow]) -> Summary:
    lines = []
    for norm in settings.norms:
        of_norm = [row for row in rows if row.norm == norm]
        ratios = [row.error / row.predicted for row in of_norm]
        lines.append(
            (
                f"{norm:g}",
                f"{statistics.median(row.error / row.law for row in of_norm):.3g}",
                spread_text(ratios),
                f"{slope(of_norm):.3f}",
                f"{statistics.median(row.alignment for row in of_norm):.3f}",
                f"{sum(map(_linear, of_norm))} of {len(of_norm)}",
                f"{sum(not row.explained for row in of_norm)}",
            )
        )
    linear = [row for row in rows if _linear(row)]
    eigenvalues = [row.eigenvalue for row in rows]
    longest = max((row.law for row in linear), default=math.nan)
    return Summary(
        f"Eigenvalues from {min(eigenvalues):.3g} to {max(eigenvalues):.3g}. The law ‖δ‖/√λ holds to "
        f"{LINEAR - 1:.0%} in {len(linear)} of {len(rows)} cases, of which the longest shift is {longest:.3g}; there "
        f"log error falls with log eigenvalue by {_linear_slope(linear):.3f} (law: −0.5).",
        (
            "‖δ‖",
            "error/law, median",
            "error/predicted, median [least, most]",
            "slope",
            "|cos| to eigenvector",
            "law holds",
            "failed",
        ),
        tuple(lines),
    )


def _draw(settings: DirectionsSettings, rows: Sequence[DirectionRow], figure: Figure) -> None:
    axis = figure.subplots()
    for place, norm in enumerate(settings.norms):
        of_norm = sorted((row for row in rows if row.norm == norm), key=lambda row: row.eigenvalue)
        for image in range(settings.num_images):
            line = [row for row in of_norm if row.image == image]
            x = [row.eigenvalue for row in line]
            axis.plot(x, [row.law for row in line], color=f"C{place}", linewidth=0.8, linestyle=":")
            axis.plot(x, [row.predicted for row in line], color=f"C{place}", linewidth=1)
        for explained in (True, False):
            chosen = [row for row in of_norm if row.explained is explained]
            axis.scatter(
                [row.eigenvalue for row in chosen],
                [row.error for row in chosen],
                s=18,
                facecolors=f"C{place}" if explained else "none",
                edgecolors=f"C{place}",
                label=f"‖δ‖ = {norm:g}" if explained else None,
            )
    axis.set(xscale="log", yscale="log", xlabel="eigenvalue of G along the perturbation")
    axis.set_ylabel("‖rebuilt − true‖: attack (dots),\npredicted (lines), law ‖δ‖/√λ (dotted)")
    axis.legend(frameon=False, fontsize=8)


STUDY = Study(
    name="directions",
    settings=DirectionsSettings,
    row=DirectionRow,
    key=("image", "norm", "rank"),
    portions=_portions,
    summarize=_summarize,
    draw=_draw,
    figure_size=(7.0, 5.2),
)
