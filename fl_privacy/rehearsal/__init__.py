"""A federation rehearsed on public examples: which noise costs its model least at equal leakage over the whole run."""

from fl_privacy.rehearsal.federation import Federation
from fl_privacy.rehearsal.outcome import Outcome
from fl_privacy.rehearsal.rehearse import Lead, Rehearsal, RehearsalSettings, RehearsedFamily, rehearse

__all__ = ["Federation", "Lead", "Outcome", "Rehearsal", "RehearsalSettings", "RehearsedFamily", "rehearse"]
