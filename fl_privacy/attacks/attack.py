"""The one interface of all attacks, and the attacks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from fl_privacy.attacks.analytic import LinearLayerLeak
from fl_privacy.attacks.gauss_newton import GaussNewton
from fl_privacy.attacks.gradient_matching import deep_leakage, inverting_gradients
from fl_privacy.attacks.optimizers import Adam
from fl_privacy.attacks.posterior_linearization import PosteriorLinearization
from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.attacks.result import Reconstruction
from fl_privacy.influence.prior import GaussianPrior


class Attack(Protocol):
    """What rebuilds inputs from updates. Each is a frozen configuration; it keeps nothing between runs."""

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns the inputs rebuilt for every unit, with how it went."""


@dataclass(frozen=True)
class WithWhitePrior:
    """An attack by one who does not know how the inputs' elements vary together.

    Attributes:
        attack: That he runs.
    """

    attack: Attack

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns what is rebuilt under the white prior of the same mean and standard deviation."""
        return self.attack.run(replace(problem, prior=problem.prior.white))


@dataclass(frozen=True, eq=False)
class WithPrior:
    """An attack by one who believes something else of the inputs than the problem says.

    Attributes:
        attack: That he runs.
        prior: What he believes, in the problem's dtype and on its device.
    """

    attack: Attack
    prior: GaussianPrior

    def run(self, problem: AttackProblem) -> Reconstruction:
        """Returns what is rebuilt under this prior."""
        return self.attack.run(replace(problem, prior=self.prior))


ATTACKS: Mapping[str, Callable[[], Attack]] = MappingProxyType(
    {
        "gauss-newton": GaussNewton,
        "gauss-newton-white": lambda: WithWhitePrior(GaussNewton()),
        "posterior-linearization": PosteriorLinearization,
        "dgl": deep_leakage,
        "dgl-adam": lambda: deep_leakage(optimizer=Adam()),
        "inverting-gradients": inverting_gradients,
        "linear-layer": LinearLayerLeak,
    }
)
"""The attacks by name, each with its defaults."""
