"""Runs to report on: small ones that went wrong in every way, and one as large as they come."""

from __future__ import annotations

import math

from fl_privacy.audit.curve import ExampleLeakage, LeakageCurve
from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.interval import Interval

HOSTILE = "<script>alert('owned')</script><img src=x onerror=alert(1)>\u202e$\\frac{1}{0}$"
"""A client's name, or what it says: markup, a bidirectional override, a formula."""


def audited(server_round: int, client: str, leakage: float, *, needed: float = 0.01, **changes) -> LeakageEstimate:
    noise = tuple(needed * 10 ** ((step - 8) / 4) for step in range(17))
    value = tuple(1 / (1 + (sigma / needed) ** 2) for sigma in noise)
    curve = LeakageCurve(
        noise_std=noise,
        lower=tuple(max(0.0, v - 0.02) for v in value),
        value=value,
        upper=tuple(min(1.0, v + 0.02) for v in value),
    )
    fields = {
        "status": Status.AUDITED,
        "source": Source.TRUSTED,
        "unit": "example",
        "leakage": Interval(max(0.0, leakage - 0.02), leakage, min(1.0, leakage + 0.02)),
        "leakage_mean": leakage / 2,
        "worst_label": 3,
        "rmse": 0.4 * math.sqrt(1 - leakage),
        "noise_std": needed * math.sqrt(1 / leakage - 1) if leakage else None,
        "prior_std": 0.4,
        "target_leakage": 0.5,
        "required_noise_std": needed,
        "required_noise_norm": 100 * needed,
        "update_norm": 1.0,
        "device": "cpu",
        "dtype": "float32",
        "settings": {"unit": "example", "target_leakage": 0.5, "seed": 7},
        "versions": {"torch": "2.15.0"},
        "curve": curve.rounded(),
        "examples": tuple(
            ExampleLeakage(index=i, label=(i + 3) % 10, leakage=leakage / (i + 1), required_noise_std=needed / (i + 1))
            for i in range(4)
        ),
    }
    return LeakageEstimate(server_round=server_round, client=client, **{**fields, **changes})


def silent(server_round: int, client: str, *, status: Status = Status.NO_REPLY, detail: str = "") -> LeakageEstimate:
    return LeakageEstimate(server_round=server_round, client=client, status=status, detail=detail, action="excluded")
