"""Settings of an audit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fl_privacy.errors import InvalidInputError

Unit = Literal["example", "batch"]
Precision = Literal["auto", "float32", "float64"]
BatchNorm = Literal["auto", "eval", "train"]
Family = Literal["isotropic", "shaped"]
"""Where noise is put: on the update, or on the private inputs that it is computed from."""
Covariance = Literal["client", "public", "white"]
"""What shapes noise on inputs: the G of each private example, which tells a little of it; that of public examples,
which tells nothing; or nothing, as much noise in every direction."""

RELU_WIDTH = 0.15
"""Width by which audits round ReLUs off, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What is measured of every client's update, and how exactly.

    Attributes:
        unit: `example`: one example is private and the attacker knows the rest of the batch. `batch`: all of it is.
        target_leakage: The leakage that `required_noise_std` is computed for, in (0, 1).
        prior_std: τ, standard deviation per element of what an attacker believes of an input before he sees the update.
            `None`: the median over clients of that of the inputs they hand over in the first audited round.
        data_range: Range of the input's values, for PSNR. `None`: likewise.
        ridge: ε, to reproduce the paper (which uses 1, and a `relu_width` of 0). `None`: σ²/τ², which is what gets the
            error right.
        max_examples: Most examples audited per client and round, for unit `example`; chosen at random.
        num_probes: Probes per unit, where the eigenvalues are not computed exactly.
        max_steps: Most Lanczos steps per probe. Where `num_probes`·`max_steps` products suffice for the whole of G
            (small inputs), they are spent on that, and nothing is sampled.
        rtol: Tolerance on leakage at which Lanczos stops.
        solve_rtol: Tolerance on the relative residual of I²F.
        solve_steps: Most products for I²F.
        replay_rtol: How closely local training must be reproduced for an estimate to count as verified.
        precision: `float32`, `float64`, or `auto`: float64 where float32 does not know the answer to 0.05.
        batch_norm: Mode in which local training is replayed; `auto`: whichever reproduces what was captured.
        relu_width: Width by which ReLUs are rounded off where J is taken, relative to what they see: the
            update jumps where a ReLU switches, of which the network's own J knows nothing. 0: the network's own J.
        max_local_steps: Most steps of local training that are replayed. Beyond, the estimate is unverified.
        memory_budget: Bytes of graph that one vectorised pass may keep. A client whose local training alone would take
            more is not audited, and its row says so.
        seed: Of the choice of examples and of the probes.
    """

    unit: Unit = "example"
    target_leakage: float = 0.5
    prior_std: float | None = None
    data_range: float | None = None
    ridge: float | None = None
    max_examples: int = 8
    num_probes: int = 4
    max_steps: int = 64
    rtol: float = 0.01
    solve_rtol: float = 1e-2
    solve_steps: int = 128
    replay_rtol: float = 1e-3
    precision: Precision = "auto"
    batch_norm: BatchNorm = "auto"
    relu_width: float = RELU_WIDTH
    max_local_steps: int = 1024
    memory_budget: int = 2 * 1024**3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidInputError where a setting is out of range."""
        choices = {"unit": Unit, "precision": Precision, "batch_norm": BatchNorm}
        for name, options in choices.items():
            if getattr(self, name) not in get_args(options):
                raise InvalidInputError(
                    f"expected {name} to be one of {', '.join(get_args(options))}, got {getattr(self, name)!r}"
                )
        if not 0 < self.target_leakage < 1:
            raise InvalidInputError(f"expected target_leakage strictly between 0 and 1, got {self.target_leakage}")
        for name in ("prior_std", "data_range", "rtol", "solve_rtol", "replay_rtol"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidInputError(f"expected a finite {name} > 0, got {value}")
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise InvalidInputError(f"expected a finite ridge >= 0, got {self.ridge}")
        if not (math.isfinite(self.relu_width) and self.relu_width >= 0):
            raise InvalidInputError(f"expected a finite relu_width >= 0, got {self.relu_width}")
        for name in ("max_examples", "num_probes", "max_steps", "solve_steps", "max_local_steps", "memory_budget"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"expected {name} >= 1, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain values, as they stand in a ledger row."""
        return asdict(self)
