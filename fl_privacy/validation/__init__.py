"""Checks of the predicted error against attacks that really run. Needs the extra `simulation`."""

from fl_privacy.validation.study import ValidationRow, ValidationSettings, attacks_of, run_validation
from fl_privacy.validation.summary import Agreement, summarize, summarize_attacks

__all__ = [
    "Agreement",
    "ValidationRow",
    "ValidationSettings",
    "attacks_of",
    "run_validation",
    "summarize",
    "summarize_attacks",
]
