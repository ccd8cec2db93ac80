"""Every exception of its own that the package raises.

    FLPrivacyError
    ├── InvalidInputError (also a ValueError)   shapes, dtypes, labels or values that cannot be audited
    ├── NotTwiceDifferentiableError             an update without a Jacobian that autograd can compute
    ├── RecordError (also a ValueError)         an audit record in a message that cannot be decoded
    └── LedgerError                             a ledger that cannot be opened, read or written

Numerical outcomes (a solver that did not converge) are data in a result, never exceptions.
"""

from __future__ import annotations


class FLPrivacyError(Exception):
    """Base of the package's exceptions: catch it to catch them all."""


class InvalidInputError(FLPrivacyError, ValueError):
    """An argument is not what was expected; the message names what was expected, what came and what to do."""


class NotTwiceDifferentiableError(FLPrivacyError):
    """The update has no Jacobian with respect to the inputs that autograd can compute."""


class RecordError(FLPrivacyError, ValueError):
    """An audit record that arrived in a message cannot be decoded."""


class LedgerError(FLPrivacyError):
    """A ledger cannot be opened, read or written. A ledger that was tampered with is a result of `verify` instead."""
