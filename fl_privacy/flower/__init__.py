"""The client side of an audit in Flower: a mod that reports how an update was made, and the record it reports in."""

from fl_privacy.flower.capture import record_batch, record_batches
from fl_privacy.flower.mod import InversionAuditMod
from fl_privacy.flower.older_api import AuditedClient
from fl_privacy.flower.protection import protected_inputs

__all__ = ["AuditedClient", "InversionAuditMod", "protected_inputs", "record_batch", "record_batches"]
