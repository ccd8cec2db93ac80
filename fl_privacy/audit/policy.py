"""What is done about a client's leakage: advice for the next round, noise on its update, or leaving it out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.audit.settings import Covariance
from fl_privacy.checks import check_count, check_positive, check_share, is_number
from fl_privacy.differential_privacy import GaussianFloor
from fl_privacy.errors import InvalidInputError

PolicyAction = Literal["report", "advise", "perturb", "exclude"]
FamilyChoice = Literal["isotropic", "shaped", "auto"]
"""A family of noise, or the one that costs less by `fl_privacy.audit.family`."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What follows from a client's leakage.

    *Isotropic* noise is N(0, σ²) on each parameter of the update, with the σ that brings the upper end of the client's
    leakage to its target. It is drawn anew for each share, and T shares of one example tell about T times as much: for
    a target that must hold over T rounds together, σ grows by √T (Fisher information adds up).

    *Shaped* noise is put on the private inputs x, of which the update at x + a is shared: whatever is trained, x + a
    tells no more of x than the target. It needs no earlier audit, so clients are advised from the first round on, and
    their training code calls `fl_privacy.flower.protected_inputs`. An example keeps its noise over the rounds.

    Attributes:
        action: `report`: nothing but rows. `advise`: each client is told in the next round how much noise to add to
            its update before it shares it, and its `InversionAuditMod` or `AuditedClient` does so. `perturb`: the
            server adds the noise to what arrived, before the inner strategy aggregates; it protects against whoever
            sees what comes after, not against the server. `exclude`: the update of a client that leaks more than the
            limit is left out.
        targets: Leakage that a client is to be brought down to, by its name; the others' is the audit's
            `target_leakage`. Names that no client had are logged at the end of the run.
        limit: Leakage above which `exclude` leaves a client out, on the upper end of its interval. `None`: its target.
        margin: Factor on the noise that is advised: it was measured a round before it is used, and training goes on.
        shares: T, the number of shares of one example that must meet the target together. Kept noise needs none.
        family: `isotropic`, `shaped`, or, for `advise`, `auto`: the first audit of a client decides which of the two
            costs the model less (`fl_privacy.audit.family`), and a client that puts no noise on its inputs when it is
            advised to is advised isotropic noise from then on. The server can put shaped noise on (`perturb`) only
            where clients hand over their batches and their training is reproduced; elsewhere its noise is isotropic,
            and rows say so.
        covariance: What shapes noise on inputs: `client`, the G of each private example, which tells a little of it;
            `public`, that of public examples, which the client's app gives to `protected_inputs`, or the server's to
            the strategy for noise that the server puts on; `white`, nothing.
        kept: Whether shaped noise is drawn once for an example, or in every round.
        bounds: Lowest and highest valid input, for shaped noise that the server puts on (`perturb`): x + a is moved to
            the nearest valid value, which protects no less. `None`: inputs may be any number. Clients that put it on
            themselves give bounds to `protected_inputs`.
        clip_norm: C. Together with `noise_multiplier`, noise is a floor for differential privacy: every update is
            clipped to norm C and gets N(0, (2zC)²) on each parameter from the first round on, whatever an audit finds,
            as noise whose size depends on the data is not private. Rows have ε of the trained parameters that a client
            shared so far, beside its leakage, and say so where that is above the target: the floor alone is put on.
            Metrics and numbers of examples leave a client as its app made them, and are not part of ε.
        noise_multiplier: z.
        delta: δ that ε is told for.
        dry_run: Rows say what would be done, and nothing is.
        seed: Of the noise that the server adds. `None`, from the operating system, but for repeatable simulations:
            whoever knows the seed can subtract the noise.

    Raises:
        InvalidInputError: An attribute is out of range.
    """

    action: PolicyAction = "report"
    targets: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    limit: float | None = None
    margin: float = 1.25
    shares: int = 1
    family: FamilyChoice = "isotropic"
    covariance: Covariance = "client"
    kept: bool = True
    bounds: tuple[float, float] | None = None
    clip_norm: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    dry_run: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.action not in get_args(PolicyAction):
            raise InvalidInputError(
                f"expected a policy's action to be one of {', '.join(get_args(PolicyAction))}, got {self.action!r}"
            )
        for name, options in (("family", FamilyChoice), ("covariance", Covariance)):
            if getattr(self, name) not in get_args(options):
                raise InvalidInputError(
                    f"expected a policy's {name} to be one of {', '.join(get_args(options))}, "
                    f"got {getattr(self, name)!r}"
                )
        self._check_floor()
        self._check_bounds()
        if self.family == "auto" and self.action != "advise":
            raise InvalidInputError(f"expected family isotropic or shaped for the action {self.action}, got auto")
        if self.family == "shaped" and self.action not in ("advise", "perturb"):
            raise InvalidInputError(
                f"expected the action advise or perturb for the family shaped, got {self.action}: it puts on no noise"
            )
        for client, target in self.targets.items():
            if not isinstance(client, str):
                raise InvalidInputError(f"expected targets by name of the client, a text, got {client!r}")
            check_share(target, f"the target of client {client}")
        if self.limit is not None and not (is_number(self.limit) and 0 < self.limit <= 1):
            raise InvalidInputError(f"expected a limit in (0, 1], got {self.limit!r}")
        if not (is_number(self.margin) and self.margin >= 1):
            raise InvalidInputError(f"expected a finite margin >= 1, got {self.margin!r}")
        check_count(self.shares, "shares")
        for name in ("kept", "dry_run"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"expected {name} to be True or False, got {getattr(self, name)!r}")

    def _check_bounds(self) -> None:
        if self.bounds is None:
            return
        if self.action != "perturb" or self.family != "shaped":
            raise InvalidInputError(
                "expected bounds of inputs with the action perturb and the family shaped alone, got "
                f"{self.action} and {self.family}: give clients' bounds to protected_inputs"
            )
        if not (len(self.bounds) == 2 and all(map(is_number, self.bounds)) and self.bounds[0] < self.bounds[1]):
            raise InvalidInputError(f"expected bounds (lowest, highest) of inputs, got {self.bounds!r}")

    def _check_floor(self) -> None:
        if (self.clip_norm is None) != (self.noise_multiplier is None):
            raise InvalidInputError(
                "expected clip_norm and noise_multiplier together: one without the other is no floor"
            )
        for name in ("clip_norm", "noise_multiplier"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)
        check_share(self.delta, "delta")
        if self.clip_norm is not None and (self.action not in ("advise", "perturb") or self.family != "isotropic"):
            raise InvalidInputError(
                "expected the action advise or perturb and the family isotropic with a clip_norm, got "
                f"{self.action} and {self.family}"
            )

    @property
    def floor_std(self) -> float | None:
        """σ of the floor, 2zC; `None` without one."""
        if self.clip_norm is None or self.noise_multiplier is None:
            return None
        return 2 * self.noise_multiplier * self.clip_norm

    def epsilon(self, rounds: int) -> float | None:
        """Returns ε at δ of so many rounds with the floor, never less than it is; `None` without a floor.

        Raises:
            ImportError: The extra `dp` is not installed.
        """
        if self.noise_multiplier is None:
            return None
        return GaussianFloor(noise_multiplier=self.noise_multiplier, rounds=rounds).epsilon(self.delta)

    @classmethod
    def of(cls, policy: Policy | PolicyAction) -> Policy:
        """Returns the policy, which may be given by the name of its action alone.

        Raises:
            InvalidInputError: The name is none of the actions.
        """
        return policy if isinstance(policy, Policy) else cls(action=policy)

    def own_noise_std(self, row: LeakageEstimate) -> float:
        """Returns σ_o, the noise per parameter that a client put on its update itself, as far as its leakage shows it.

        Of an update that was reproduced and carries even noise, the σ at which its leakage is the upper end of what was
        found; otherwise 0: what a perturbation is made of is then not known. With noise on the inputs, what was
        measured beside u(x + a).
        """
        if not row.verified or not row.even_noise or row.curve is None or row.leakage is None:
            return 0.0
        if row.input_noise:  # it leaks as little for noise on its inputs, which is none on the update
            return row.noise_std or 0.0
        return row.curve.noise_std_at(row.leakage.upper)

    def missing_noise_std(self, required: float, own: float) -> float:
        """Returns the σ per parameter of the noise that is missing on an update for its target.

        With σ_r what the target requires and σ_o the client's own noise, in units of the undefended update, it is

            √(T·(m·σ_r)² − σ_o²), m the margin for advice, which a later round uses, and 1 otherwise,

        or 0 where the client's own noise suffices.
        """
        margin = self.margin if self.action == "advise" else 1.0
        wanted = math.sqrt(self.shares) * margin * required
        return math.sqrt((wanted - own) * (wanted + own)) if wanted > own else 0.0

    def excludes(self, row: LeakageEstimate) -> bool:
        """Returns whether the client's update is to be left out."""
        if self.action != "exclude" or row.leakage is None:
            return False
        limit = self.limit if self.limit is not None else row.target_leakage
        return limit is not None and not row.leakage.upper <= limit
