"""Privacy auditing of federated learning: how much of a client's private input its update gives away.

Names are imported on first use, so that the command line and the ledger start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
    from fl_privacy.influence.directions import ProtectedDirections, protected_directions
    from fl_privacy.influence.i2f import Influence, influence, influence_lower_bound
    from fl_privacy.influence.jacobian import UpdateJacobian
    from fl_privacy.influence.operators import GramSum, MeanGram
    from fl_privacy.influence.prior import GaussianPrior
    from fl_privacy.influence.recommendation import NoiseRecommendation, recommend_noise
    from fl_privacy.influence.sampling import InputNoise, draw_input_noise, sample_input_noise
    from fl_privacy.influence.spectrum import Spectrum, estimate_spectrum
    from fl_privacy.influence.training import LocalTrainingUpdate
    from fl_privacy.influence.update import GradientUpdate
    from fl_privacy.interval import Interval

__version__ = "0.1.0"

__all__ = [
    "GaussianPrior",
    "GradientUpdate",
    "GramSum",
    "Influence",
    "InputNoise",
    "Interval",
    "LeakageEstimate",
    "LocalTrainingUpdate",
    "MeanGram",
    "NoiseRecommendation",
    "ProtectedDirections",
    "Source",
    "Spectrum",
    "Status",
    "UpdateJacobian",
    "__version__",
    "draw_input_noise",
    "estimate_spectrum",
    "influence",
    "influence_lower_bound",
    "protected_directions",
    "recommend_noise",
    "sample_input_noise",
]

_HOMES = {
    "GaussianPrior": "fl_privacy.influence.prior",
    "GradientUpdate": "fl_privacy.influence.update",
    "GramSum": "fl_privacy.influence.operators",
    "Influence": "fl_privacy.influence.i2f",
    "InputNoise": "fl_privacy.influence.sampling",
    "Interval": "fl_privacy.interval",
    "LeakageEstimate": "fl_privacy.audit.estimate",
    "LocalTrainingUpdate": "fl_privacy.influence.training",
    "MeanGram": "fl_privacy.influence.operators",
    "NoiseRecommendation": "fl_privacy.influence.recommendation",
    "ProtectedDirections": "fl_privacy.influence.directions",
    "Source": "fl_privacy.audit.estimate",
    "Spectrum": "fl_privacy.influence.spectrum",
    "Status": "fl_privacy.audit.estimate",
    "UpdateJacobian": "fl_privacy.influence.jacobian",
    "draw_input_noise": "fl_privacy.influence.sampling",
    "estimate_spectrum": "fl_privacy.influence.spectrum",
    "influence": "fl_privacy.influence.i2f",
    "influence_lower_bound": "fl_privacy.influence.i2f",
    "protected_directions": "fl_privacy.influence.directions",
    "recommend_noise": "fl_privacy.influence.recommendation",
    "sample_input_noise": "fl_privacy.influence.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    return globals().setdefault(name, value)  # `influence` is there by now: the package, which is callable


def __dir__() -> list[str]:
    return sorted(__all__)
