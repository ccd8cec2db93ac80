"""Checks of the predicted error against attacks that really run. Needs the extra `simulation`."""

from fl_privacy.validation.study import ValidationRow, ValidationSettings, run_validation
from fl_privacy.validation.summary import Agreement, summarize

__all__ = ["Agreement", "ValidationRow", "ValidationSettings", "run_validation", "summarize"]
