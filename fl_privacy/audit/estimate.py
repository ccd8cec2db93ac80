"""The row that an audit writes: one leakage estimate for one client in one round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from fl_privacy.audit.curve import ExampleLeakage, LeakageCurve
from fl_privacy.interval import Interval

MAX_EXAMPLES = 32
"""Most examples that a row lists one by one."""


class Source(StrEnum):
    """Where the Jacobian behind an estimate was taken."""

    TRUSTED = "trusted"
    """On the server, at the client's own batch, which the client handed over."""
    CLIENT = "client"
    """On the client, which sent scalars of its own making: a claim that the server cannot recompute."""
    PROXY = "proxy"
    """On the server, at public examples in place of the client's own, scaled to the update that arrived."""
    RECONSTRUCTED = "reconstructed"
    """On the server, at what an attack of its own rebuilt from the update."""
    NONE = "none"
    """Nowhere: there was nothing to audit, and the row says why."""


APPROXIMATE_SOURCES = (Source.PROXY, Source.RECONSTRUCTED)
"""Those at other inputs than the client's own."""


class Status(StrEnum):
    """What became of the audit of one client in one round. Every client that was asked gets a row."""

    AUDITED = "audited"
    """The estimate stands: the update was reproduced from the batch, and the leakage is known to its tolerance."""
    UNVERIFIED = "unverified"
    """The captured update could not be reproduced. No protection is credited for what is unexplained."""
    UNCONVERGED = "unconverged"
    """The budget of products ran out before the tolerance was met; the interval still holds."""
    APPROXIMATE = "approximate"
    """Measured at other inputs than the client's own: an indication, and its interval says how far such inputs vary."""
    UNPROTECTED = "unprotected"
    """The client sent no report (it runs without the mod): nothing is known, so nothing is assumed safe."""
    REFUSED = "refused"
    """The client runs the mod, but its own configuration does not allow what the server asks for."""
    AGGREGATE_ONLY = "aggregate-only"
    """Secure aggregation: only the mean of all clients' updates arrived, so no client's own could be audited here."""
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
        return self in (Status.AUDITED, Status.UNVERIFIED, Status.UNCONVERGED, Status.APPROXIMATE)


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
    """What became of the client's update: `passed` on to the inner strategy, `perturbed` before, or `excluded`."""
    advised_noise_std: float | None = None
    """Noise per parameter that the client was advised to put on this update before it shared it."""
    applied_noise_std: float | None = None
    """Noise per parameter that was put on it: by the client, which says so, or by the server (`perturbed`)."""
    advised_input_leakage: float | None = None
    """Leakage that the client was advised to bring its inputs to, by noise that it puts on them before training."""
    input_noise: str = ""
    """What shaped the noise on the inputs: `client`, `public`, or `white` where nothing did, though a shape may have
    been advised; empty if there was none."""
    input_noise_kept: bool | None = None
    """Whether each example has the same noise in every round, so that rounds together tell no more than one."""
    input_noise_leakage: float | None = None
    """What x + a tells of x by the noise's law, of the worst audited example: no update of x + a tells more. The law is
    the word of whoever drew the noise; its size is checked where the batch is handed over."""
    input_noise_rms: float | None = None
    """Root mean square of that noise per input element, measured."""
    input_noise_change: float | None = None
    """‖u(x + a) − u(x)‖, measured by running local training on both."""
    epsilon: float | None = None
    """ε at `delta` of the client's rounds so far, by the policy's clipping and noise: differential privacy, another
    number than leakage. Infinite once an update came without; where clients put the noise on, it is their word."""
    delta: float | None = None
    passed_leakage: float | None = None
    """Upper end of the leakage of what went to the inner strategy; lower than `leakage` where the server perturbed."""

    # What leaks.
    unit: str = ""
    """`example` (one example is private) or `batch` (the whole batch is)."""
    units_audited: int | None = None
    leakage: Interval[float] | None = None
    rounds_leakage: Interval[float] | None = None
    """Leakage of one example over all of the client's rounds so far, this one included: two bounds that hold, from each
    round's own leakage, and between them an estimate as if every round had this one's eigenvectors."""
    rounds_passed_leakage: Interval[float] | None = None
    """The same of what went to the inner strategy: less where the server perturbed, or left updates out."""
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
    """I²F of the observed perturbation, ‖(G + εI)⁻¹Jᵀδ‖ (paper, Eq. 4); `None` with noise on the inputs."""
    lower_bound: float | None = None
    """‖Jᵀδ‖ / λ_max(G) (paper, Eq. 5)."""
    curve: LeakageCurve | None = None
    """Leakage of the most exposed example against noise; rows of 0.1.0 before it, and failed audits, have none."""
    examples: tuple[ExampleLeakage, ...] = ()
    """The audited examples, the most exposed first, at most `MAX_EXAMPLES`; empty for unit `batch`."""

    # What was observed of the shared update, beside the undefended one: with noise on the inputs, beside u(x + a).
    update_norm: float | None = None
    perturbation_norm: float | None = None
    cosine: float | None = None
    snr_db: float | None = None
    scale: float | None = None
    """Common factor ⟨shared, u⟩/⟨u, u⟩ by which the update was multiplied (1 without clipping)."""
    noise_std: float | None = None
    """Root mean square per parameter of the perturbation, the scale taken out."""
    even_noise: bool | None = None
    """Whether that is spread like noise on every parameter; pruning's is not, and adds up with noise to less."""

    # What it was measured with.
    prior_std: float | None = None
    ridge: float | None = None
    target_leakage: float | None = None
    observed_noise_std: float | None = None
    """Most noise per parameter that the shared update alone shows, without the batch; `None`: no layer tells."""
    observed_sparsity: float | None = None
    """Share of the shared update's entries that are exactly zero."""
    claim_holds: bool | None = None
    """Whether the shared update shows the defence that the client claims, or should have; `None`: nothing to check."""
    required_noise_std: float | None = None
    """Standard deviation per parameter of the isotropic noise that brings every audited unit to the target."""
    required_noise_interval: Interval[float] | None = None
    """How far that varies over public examples, where they stand in for the client's own (`approximate`)."""
    required_noise_norm: float | None = None
    """Expected norm of that noise on the whole update."""
    verified: bool | None = None
    converged: bool | None = None
    residual: float | None = None
    """Relative residual of the I²F solve, recomputed from the solution."""
    change_ratio: float | None = None
    """‖u(x + a) − u(x)‖/‖J·a‖ of the worst audited example, for a draw a of the predicted error, as large as `rmse` and
    no smaller than 1 % of `prior_std`. Far from 1 the update is not linear over it, and the prediction not to be relied
    on: above, more may leak than this row says."""
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
        """Returns the row as values that strict JSON can hold; `from_dict` reads them back.

        JSON has no NaN and no infinity, yet rows do (the signal to noise ratio of an unperturbed update is infinite),
        so those three floats are written as the texts `"NaN"`, `"Infinity"` and `"-Infinity"`. In `settings`, which
        may hold text as well, a text that reads like one of them gets `=` put before it. Tuples become lists.

        Raises:
            TypeError: If a value is none of None, bool, int, float, str, or a sequence or mapping (by text) of them.
        """
        row: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "curve" and value is not None:
                value = value.to_dict()
            elif item.name == "examples":
                value = [example.to_list() for example in value]
            row[item.name] = _encode(value, where=item.name, escape=item.name == "settings")
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], *, light: bool = False) -> LeakageEstimate:
        """Returns the estimate that `to_dict` wrote; unknown keys (written by a newer version) are ignored.

        Args:
            row: What was written.
            light: Leave out the parts that take longest to read: `curve`, `examples`, `settings` and `versions`.

        Raises:
            TypeError: If `client` or `server_round` is missing.
            ValueError: If the status or the source is none that this version knows, or the curve is malformed.
            KeyError: If the status is missing.
        """
        values: dict[str, Any] = {}
        for name in _NAMES:
            if name in row and not (light and name in _HEAVY):
                value = row[name]
                values[name] = _decode(value) if name in _DECODED and isinstance(value, _CODED) else value
        values["status"] = Status(values["status"])
        values["source"] = Source(values.get("source", Source.NONE))
        for name in ("leakage", "rounds_leakage", "rounds_passed_leakage", "required_noise_interval"):
            if values.get(name) is not None:
                values[name] = Interval(*values[name])
        if values.get("curve") is not None:
            values["curve"] = LeakageCurve.from_dict(values["curve"])
        if "examples" in values:
            values["examples"] = tuple(ExampleLeakage.from_list(example) for example in values["examples"])
        return cls(**values)


_NAMES = tuple(item.name for item in fields(LeakageEstimate))
_HEAVY = frozenset({"curve", "examples", "settings", "versions"})
_CODED = (str, list, Mapping)
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_DECODED = frozenset(item.name for item in fields(LeakageEstimate) if "float" in str(item.type)) | {"settings"}
"""Fields in which the texts of `_NON_FINITE` stand for floats; everywhere else text is text."""


def _encode(value: object, *, where: str, escape: bool) -> Any:
    """Returns `value` as strict JSON holds it; `where` names it in errors, `escape` says that text may be ambiguous."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        text = str.__str__(value)  # the plain text of a StrEnum member
        return f"={text}" if escape and text.lstrip("=") in _NON_FINITE else text
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r} ({type(key).__name__}): keys must be text")
        return {key: _encode(entry, where=f"{where}[{key!r}]", escape=escape) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry, where=f"{where}[{index}]", escape=escape) for index, entry in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold: expected None, bool, int, float, str, "
        "or a list or mapping of them (call .item() on a tensor or NumPy scalar)"
    )


def _decode(value: Any) -> Any:
    """Returns what `_encode` was given."""
    if isinstance(value, str):
        if value in _NON_FINITE:
            return _NON_FINITE[value]
        return value[1:] if value.startswith("=") and value.lstrip("=") in _NON_FINITE else value
    if isinstance(value, Mapping):
        return {key: _decode(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    return value
