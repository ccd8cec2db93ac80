"""Server-side strategies that audit what clients share."""

from fl_privacy.strategies.inversion_audit import InversionAudit

__all__ = ["InversionAudit"]
