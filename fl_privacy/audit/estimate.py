"""The row that an audit writes: one leakage estimate for one client in one round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from fl_privacy.interval import Interval


class Source(StrEnum):
    """Where the Jacobian behind an estimate was taken."""

    TRUSTED = "trusted"
    """On the server, at the client's own batch, which the client handed over."""
    NONE = "none"
    """Nowhere: there was nothing to audit, and the row says why."""


class Status(StrEnum):
    """What became of the audit of one client in one round. Every client that was asked gets a row."""

    AUDITED = "audited"
    """The estimate stands: the captured update was reproduced from the batch and every solver converged."""
    UNVERIFIED = "unverified"
    """The captured update could not be reproduced. No protection is credited for what is unexplained."""
    UNCONVERGED = "unconverged"
    """The budget of products ran out before the tolerance was met; the interval still holds."""
    UNPROTECTED = "unprotected"
    """The client sent no report (it runs without the mod): nothing is known, so nothing is assumed safe."""
    REFUSED = "refused"
    """The client runs the mod, but its own configuration does not allow it to hand its batch over."""
    INVALID_UPDATE = "invalid-update"
    """The shared arrays have wrong names, shapes or dtypes, or hold NaN or infinity."""
    INVALID_REPORT = "invalid-report"
    """The audit record could not be decoded."""
    CLIENT_ERROR = "client-error"
    """The client answered with an error."""
    NO_REPLY = "no-reply"
    """The client was asked and never answered."""
    LATE = "late"
    """The audit was not finished within the round's time limit."""
    AUDIT_FAILED = "audit-failed"
    """The audit itself raised an error."""

    @property
    def has_estimate(self) -> bool:
        """Whether a row of this status carries a leakage estimate."""
        return self in (Status.AUDITED, Status.UNVERIFIED, Status.UNCONVERGED)


@dataclass(frozen=True, kw_only=True)
class LeakageEstimate:
    """How much of its private input one client gave away in one round.

    Numbers that do not exist for a row (an error, a missing reply) are `None`. Leakage is in [0, 1], the share of the
    private input's variance that the best linear-Gaussian attacker recovers; with several audited examples the leakage
    interval, rmse, PSNR and I²F are those of the example that leaks most. Lengths (`rmse`, `i2f`, `lower_bound`,
    `prior_std`) are in units of the model's input; `noise` figures are in units of the shared update.
    """

    # Who and when.
    server_round: int
    client: str
    status: Status
    source: Source = Source.NONE
    node_id: int | None = None
    detail: str = ""
    defence: str = ""
    """What the client says it did to its update: a claim, not a finding."""
    num_examples: int | None = None
    action: str = "passed"
    """What became of the client's update: `passed` on to the inner strategy or `excluded`."""

    # What leaks.
    unit: str = ""
    """`example` (one example is private) or `batch` (the whole batch is)."""
    units_audited: int | None = None
    leakage: Interval[float] | None = None
    leakage_mean: float | None = None
    """Mean over the audited examples; equals `leakage.value` for unit `batch`."""
    worst_example: int | None = None
    """Index, among the examples the client trained on this round, of the one that leaks most."""
    worst_label: int | None = None
    rmse: float | None = None
    """Predicted root mean square error per input element of the best attack."""
    psnr: float | None = None
    """20·log10(data range / rmse) in dB."""
    i2f: float | None = None
    """I²F of the observed perturbation, ‖(G + εI)⁻¹Jᵀδ‖ (paper, Eq. 4)."""
    lower_bound: float | None = None
    """‖Jᵀδ‖ / λ_max(G) (paper, Eq. 5)."""

    # What was observed of the shared update.
    update_norm: float | None = None
    perturbation_norm: float | None = None
    cosine: float | None = None
    snr_db: float | None = None
    scale: float | None = None
    """Common factor ⟨shared, u⟩/⟨u, u⟩ by which the update was multiplied (1 without clipping)."""
    noise_std: float | None = None
    """Root mean square per parameter of the perturbation, the scale taken out."""

    # What it was measured with.
    prior_std: float | None = None
    ridge: float | None = None
    target_leakage: float | None = None
    required_noise_std: float | None = None
    """Standard deviation per parameter of the isotropic noise that brings every audited unit to the target."""
    required_noise_norm: float | None = None
    """Expected norm of that noise on the whole update."""
    verified: bool | None = None
    converged: bool | None = None
    residual: float | None = None
    """Relative residual of the I²F solve, recomputed from the solution."""
    replay_error: float | None = None
    """‖replayed − captured‖ / ‖captured‖ of the client's own undefended update."""
    input_dim: int | None = None
    update_dim: int | None = None
    products: int | None = None
    """Products with G that were spent on this client."""
    seconds: float | None = None
    """Wall-clock seconds of audit work spent on this client."""
    device: str = ""
    dtype: str = ""
    batch_norm: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as plain values that JSON can hold."""
        row: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Interval):
                value = list(value)
            elif isinstance(value, StrEnum):
                value = value.value
            elif isinstance(value, Mapping):
                value = dict(value)
            row[item.name] = value
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> LeakageEstimate:
        """Returns the estimate that `to_dict` wrote; unknown keys (written by a newer version) are ignored."""
        known = {item.name for item in fields(cls)}
        values = {name: value for name, value in row.items() if name in known}
        values["status"] = Status(values["status"])
        values["source"] = Source(values.get("source", Source.NONE))
        if values.get("leakage") is not None:
            values["leakage"] = Interval(*values["leakage"])
        return cls(**values)
