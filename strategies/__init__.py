"""Server-side strategies that audit what clients share."""

from fl_privacy.strategies.inversion_audit import InversionAudit
from fl_privacy.strategies.older_api import OlderInversionAudit

__all__ = ["InversionAudit", "OlderInversionAudit"]
