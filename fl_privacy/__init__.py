"""Privacy auditing of federated learning: how much of a client's private input its update gives away.

Names are imported on first use, so that the command line and the ledger start without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_privacy.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GaussianPrior": "influence.prior",
        "GradientUpdate": "influence.update",
        "GramSum": "influence.operators",
        "Influence": "influence.i2f",
        "InputNoise": "influence.sampling",
        "Interval": "interval",
        "LeakageEstimate": "audit.estimate",
        "LocalTrainingUpdate": "influence.training",
        "MeanGram": "influence.operators",
        "NoiseRecommendation": "influence.recommendation",
        "ProtectedDirections": "influence.directions",
        "Source": "audit.estimate",
        "Spectrum": "influence.spectrum",
        "Status": "audit.estimate",
        "UpdateJacobian": "influence.jacobian",
        "draw_input_noise": "influence.sampling",
        "estimate_spectrum": "influence.spectrum",
        "influence": "influence.i2f",
        "influence_lower_bound": "influence.i2f",
        "protected_directions": "influence.directions",
        "recommend_noise": "influence.recommendation",
        "sample_input_noise": "influence.sampling",
    },
)
