"""The influence engine: how far an attacker who sees an update would miss its private inputs."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from fl_privacy.influence.bias import own_bias
from fl_privacy.influence.covariance import InputCovariance
from fl_privacy.influence.directions import ProtectedDirections, protected_directions
from fl_privacy.influence.i2f import Influence, influence, influence_lower_bound
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.linearity import change_ratio, likely_error
from fl_privacy.influence.operators import GramSum, InputOperator, MeanGram
from fl_privacy.influence.prior import GaussianPrior
from fl_privacy.influence.recommendation import NoiseRecommendation, recommend_noise
from fl_privacy.influence.sampling import InputNoise, draw_input_noise, sample_input_noise
from fl_privacy.influence.spectrum import Spectrum, estimate_spectrum
from fl_privacy.influence.training import LocalTrainingUpdate
from fl_privacy.influence.update import GradientUpdate, UpdateMap

__all__ = [
    "GaussianPrior",
    "GradientUpdate",
    "GramSum",
    "Influence",
    "InputCovariance",
    "InputNoise",
    "InputOperator",
    "LocalTrainingUpdate",
    "MeanGram",
    "NoiseRecommendation",
    "ProtectedDirections",
    "Spectrum",
    "UpdateJacobian",
    "UpdateMap",
    "change_ratio",
    "draw_input_noise",
    "estimate_spectrum",
    "influence",
    "influence_lower_bound",
    "likely_error",
    "own_bias",
    "protected_directions",
    "recommend_noise",
    "sample_input_noise",
]


class _Package(ModuleType):
    """This package, callable as `influence`.

    `fl_privacy.influence` names this package and the function that the root exports. Importing a package binds it as an
    attribute of its parent, over whatever the parent exports by that name; so that `from fl_privacy import influence`
    can be called whichever came first, the package passes calls on.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Influence:
        return influence(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
