"""A policy at work: what it advises each client, and what it does to each update that arrived."""

from __future__ import annotations

import math
import re
import traceback
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from logging import WARNING

import numpy as np
from flwr.app import Message
from flwr.supercore import log

from fl_privacy.audit.auditor import Auditor
from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.audit.family import cheaper_family, is_sure, relative_noise
from fl_privacy.audit.policy import Policy
from fl_privacy.audit.settings import Family
from fl_privacy.audit.task import AuditTask, Numbers
from fl_privacy.audit.wording import joined
from fl_privacy.flower.advice import Advice, clipped, noisy, with_update
from fl_privacy.flower.protection import InputAdvice
from fl_privacy.strategies.replies import Reading
from fl_privacy.strategies.shifting import InputShifting, NotShifted, Shifted

_CONTESTED = re.compile(r"(.*) \(node [0-9]+\)")
"""The name of a client that came second under it."""
_SLACK = 1e-6
"""How much more than its target noise on inputs may leak: no more than rounding."""
_MOST_NOISE = 1e3
"""Norm of noise over that of the update beyond which an update is left out rather than drowned."""


class PolicyActions:
    """Applies a policy to the clients of a run, and remembers what they are advised.

    Args:
        policy: What is to follow.
        target_leakage: Of the clients that the policy gives no target of their own.
        parameters: Names of the trained parameters.
        auditor: Audits the run's rounds, and does what takes as long as that.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        target_leakage: float,
        parameters: Sequence[str],
        auditor: Auditor,
    ) -> None:
        self.policy = policy
        self._auditor = auditor
        self._shifting = InputShifting(auditor)
        self._shifted: Mapping[int, Shifted | NotShifted] = {}
        self._target_leakage = target_leakage
        self._parameters = tuple(parameters)
        self._advice: dict[int, Advice] = {}
        self._required: dict[int, float] = {}
        self._own: dict[int, float] = {}
        self._families: dict[int, Family] = {}
        self._unsure: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._rounds: dict[int, int] = {}
        self._bare: set[int] = set()
        self._targets: dict[int, float] = {}

    def target_of(self, client: str) -> float:
        """Returns the leakage that a client is to be brought down to.

        Who comes second under a name may be its owner, so a target of its own counts for both, if it is the stricter.
        """
        if (contested := _CONTESTED.fullmatch(client)) and client not in self.policy.targets:
            return min(self._target_leakage, self.policy.targets.get(contested[1], math.inf))
        return self.policy.targets.get(client, self._target_leakage)

    def absent(self, clients: Iterable[str]) -> list[str]:
        """Returns the names with a target of their own that none of these clients has."""
        named = {contested[1] if (contested := _CONTESTED.fullmatch(client)) else client for client in clients}
        return sorted(set(self.policy.targets) - named)

    def advice_for(self, node_id: int, client: str) -> Advice | InputAdvice | None:
        """Returns what a client is to be told with the next message; `None` if nothing.

        Args:
            node_id: Flower's.
            client: Its name; empty as long as it gave none.
        """
        floor = self.policy.floor_std
        if floor is not None and self.policy.action == "advise" and not self.policy.dry_run:
            return Advice(
                noise_std=floor,
                target_leakage=self.target_of(client),
                parameters=self._parameters,
                clip_norm=self.policy.clip_norm,
            )
        shaped = self.policy.action == "advise" and self._family_of(node_id) == "shaped"
        if shaped and not self.policy.dry_run:
            # Who has no name yet might be anyone: noise that leaks less than it may can be kept, more cannot be undone.
            lowest = min([self._target_leakage, *self.policy.targets.values()])
            return self._input_advice(self.target_of(client) if client else lowest)
        return self._advice.get(node_id)

    def choose_families(self, average_norm: float) -> None:
        """Decides, after a round, for clients of which enough is known by now, which family costs less.

        Args:
            average_norm: Of what the round changed the global parameters by.
        """
        if self.policy.family != "auto" or not average_norm > 0:
            return  # a round that changed nothing says nothing
        for node_id, required in self._required.items():
            if node_id in self._families:
                continue
            relative = relative_noise(
                required,
                update_dim=self._sizes[node_id],
                average_norm=average_norm,
                num_clients=len(self._required),
                shares=self.policy.shares,
            )
            self._families[node_id] = cheaper_family(relative, target_leakage=self._targets[node_id])
            if not is_sure(relative, target_leakage=self._targets[node_id]):
                self._unsure.add(node_id)

    def _family_of(self, node_id: int) -> Family:
        """Returns the family of noise for a client; isotropic as long as nothing is known of it."""
        family = self.policy.family
        return self._families.get(node_id, "isotropic") if family == "auto" else family

    def _input_advice(self, target: float) -> InputAdvice:
        settings = self._auditor.context.settings
        return InputAdvice(
            target_leakage=target,
            covariance=self.policy.covariance,
            kept=self.policy.kept,
            prior_std=settings.prior_std,
            shares=self.policy.shares,
            relu_width=settings.relu_width,
            num_probes=settings.num_probes,
            max_steps=settings.max_steps,
        )

    def prepare(self, readings: Sequence[Reading], params: Mapping[str, Numbers]) -> None:
        """Computes, for all clients of a round at once, what `apply` needs and takes long: updates at x + a.

        Args:
            readings: What is known of the clients that `apply` is to be called for, with their rows.
            params: Global arrays of the round by name.
        """
        self._shifted = self._shifting.shifted(
            params,
            [
                (reading.task, self._input_advice(target), self._generator(reading.row))
                for reading in readings
                if isinstance(reading.task, AuditTask)
                and (target := reading.row.target_leakage) is not None
                and not self.policy.dry_run
                and self._is_shifted(reading)
            ],
            bounds=self.policy.bounds,
        )

    def apply(self, reading: Reading, params: Mapping[str, Numbers]) -> LeakageEstimate:
        """Returns a client's row with what was done; its update may be changed by then.

        For a round whose clients `prepare` was given.

        An update to which the policy cannot be applied is left out, and the row says why: it must not end the round.

        Args:
            reading: What is known of the client, with its row.
            params: Global arrays of the round by name.
        """
        try:
            return self._apply(reading, params)
        except Exception as error:
            log(WARNING, "the policy could not be applied to client %s:\n%s", reading.node_id, traceback.format_exc())
            detail = joined(reading.row.detail, f"the policy could not be applied: {error}")
            return replace(reading.row, action="excluded", passed_leakage=None, detail=detail)

    def _apply(self, reading: Reading, params: Mapping[str, Numbers]) -> LeakageEstimate:
        row = replace(reading.row, passed_leakage=None if reading.row.leakage is None else reading.row.leakage.upper)
        if reading.reply is None:
            return row
        if reading.aggregate:
            return self._of_aggregate(reading.node_id, row)
        if self.policy.floor_std is not None:
            return self._with_floor(reading.node_id, reading.reply, row, self.policy.floor_std, params)
        if self.policy.excludes(row):
            return self._left_out(row, "leaks above the limit")
        if self.policy.action == "advise":
            return self._advised(reading.node_id, row)
        if self.policy.action == "perturb":
            return self._perturb(reading, reading.reply, row, params)
        return row

    def _of_aggregate(self, node_id: int, row: LeakageEstimate) -> LeakageEstimate:
        """Advises a client of whose update only a mean arrived, which it can audit itself; nothing else can be done."""
        if self.policy.floor_std is None and self.policy.action == "advise":
            return self._advised(node_id, row)
        if self.policy.action in ("perturb", "exclude"):
            why = f"the policy ({self.policy.action}) was not applied: no client's own update arrived"
            return replace(row, detail=joined(row.detail, why))
        return row

    def accounted(self, reading: Reading) -> LeakageEstimate:
        """Returns a client's row with the ε of all that it shared so far under a floor that it puts on itself.

        Whatever arrived was shared, be it left out afterwards or not.
        """
        floor, row = self.policy.floor_std, reading.row
        shared = reading.reply is not None and not reading.reply.has_error()
        if floor is None or self.policy.action != "advise" or self.policy.dry_run or not shared:
            return row
        if (row.applied_noise_std or 0.0) < floor or row.claim_holds is False:
            self._bare.add(reading.node_id)
            detail = (
                "no ε is counted for noise that is not there"
                if row.claim_holds is False
                else "the client did not say that it clipped its update and put the floor's noise on it"
            )
            row = replace(row, detail=joined(row.detail, detail))
        return self._with_epsilon(reading.node_id, row)

    def _with_epsilon(self, node_id: int, row: LeakageEstimate) -> LeakageEstimate:
        self._rounds[node_id] = self._rounds.get(node_id, 0) + 1
        epsilon = math.inf if node_id in self._bare else self.policy.epsilon(self._rounds[node_id])
        return replace(row, epsilon=epsilon, delta=self.policy.delta)

    def _with_floor(
        self, node_id: int, reply: Message, row: LeakageEstimate, floor: float, params: Mapping[str, Numbers]
    ) -> LeakageEstimate:
        """Puts the floor on an update that arrived, where the server perturbs; nothing more is done for leakage.

        Noise that is rounded to an array's floating-point type is taken for noise of the real numbers, as usual.
        """
        if self.policy.dry_run:
            return _not_done(row, f"updates would be clipped to {self.policy.clip_norm:g} and get noise of {floor:.3g}")
        if self.policy.action != "perturb" or self.policy.clip_norm is None:
            return row
        ((key, arrays),) = reply.content.array_records.items()
        arrays = clipped(arrays, params, self._parameters, self.policy.clip_norm)
        reply.content[key] = noisy(arrays, self._parameters, floor, self._generator(row))
        return self._with_epsilon(node_id, replace(row, action="perturbed", applied_noise_std=floor))

    def _advised(self, node_id: int, row: LeakageEstimate) -> LeakageEstimate:
        """Advises a client, and says once where its family of noise was chosen by a rule that may be wrong there."""
        unsure, family = node_id in self._unsure, self._family_of(node_id)
        row = self._advise(node_id, row)
        if not unsure or not row.status.has_estimate:
            return row
        self._unsure.discard(node_id)
        what = f"{family} noise was chosen by a rule that is not sure here: see fl-privacy rehearse"
        return replace(row, detail=joined(row.detail, what))

    def _advise(self, node_id: int, row: LeakageEstimate) -> LeakageEstimate:
        """Keeps the advice for the client's next round; of a row without an estimate, the last one stands.

        Examples and training differ from round to round, so the largest noise that any round needed counts, and the
        least noise of its own that a client showed. Its own is measured only while there is none of ours: a client that
        clips clips harder then, and its noise looks larger than it is.
        """
        if self._family_of(node_id) == "shaped":
            return self._advise_shaped(node_id, row)
        if node_id in self._advice and row.applied_noise_std is None and row.status.has_estimate:
            row = replace(row, detail=joined(row.detail, "the client did not put the advised noise on its update"))
        if row.required_noise_std is None or row.target_leakage is None or not math.isfinite(row.required_noise_std):
            return row
        self._required[node_id] = max(self._required.get(node_id, 0.0), row.required_noise_std)
        self._sizes[node_id], self._targets[node_id] = row.update_dim or 0, row.target_leakage
        if row.applied_noise_std is None:
            self._own[node_id] = min(self._own.get(node_id, math.inf), self.policy.own_noise_std(row))
        std = self.policy.missing_noise_std(self._required[node_id], self._own.get(node_id, 0.0))
        if self.policy.dry_run:
            return _not_done(row, f"noise of {std:.3g} would be advised") if std > 0 else row
        self._advice.pop(node_id, None)
        if std > 0:
            self._advice[node_id] = Advice(
                noise_std=std, target_leakage=row.target_leakage, parameters=self._parameters
            )
        return row

    def _advise_shaped(self, node_id: int, row: LeakageEstimate) -> LeakageEstimate:
        """Says in a row what became of the noise that is advised for the inputs: the advice itself needs no row."""
        if self.policy.dry_run:
            if row.leakage is None or row.target_leakage is None or row.leakage.upper <= row.target_leakage:
                return row
            return _not_done(row, f"noise on the inputs for a leakage of {row.target_leakage:g} would be advised")
        if row.advised_input_leakage is not None and not row.input_noise and row.status.has_estimate:
            missing = "the client did not put the advised noise on its inputs (protected_inputs in its training code)"
            if self.policy.family == "auto":
                self._families[node_id] = "isotropic"
                missing += ": isotropic noise is advised from here on"
                row = self._advise(node_id, row)
            return replace(row, detail=joined(row.detail, missing))
        return row

    def _perturb(
        self, reading: Reading, reply: Message, row: LeakageEstimate, params: Mapping[str, Numbers]
    ) -> LeakageEstimate:
        """Puts noise on an update that arrived, in its own scale: an attacker divides out what clipping multiplied."""
        leakage, target, required = row.leakage, row.target_leakage, row.required_noise_std
        if leakage is None or target is None:
            return row
        if (row.input_noise or self.policy.family == "shaped") and leakage.upper <= target * (1 + _SLACK):
            return row
        if self.policy.family == "shaped":
            shifted = self._shifted.get(reading.node_id)
            if self._is_shifted(reading) and self.policy.dry_run:
                return _not_done(row, f"noise on the inputs for a leakage of {target:g} would be put on")
            if isinstance(shifted, Shifted):
                return self._with_shifted(shifted, reply, row, leakage.upper, target, params)
            why = (
                shifted.reason
                if shifted is not None
                else "its training was not reproduced"
                if isinstance(reading.task, AuditTask)
                else "it handed over no batch"
            )
            row = replace(row, detail=joined(row.detail, f"the noise is isotropic, not shaped: {why}"))
        if required is None:
            return row
        if not math.isfinite(required):
            return self._left_out(row, "no noise is known to bring it to its target")
        std = self.policy.missing_noise_std(required, self.policy.own_noise_std(row))
        if std == 0:
            return row
        scale = _scale(row)
        size = std * scale * math.sqrt(row.update_dim or 0)
        if size > _MOST_NOISE * (row.update_norm or math.inf) * scale:
            return self._left_out(row, f"noise of {std:.3g} per parameter would drown it")
        if self.policy.dry_run:
            return _not_done(row, f"noise of {std:.3g} would be put on it")
        ((key, arrays),) = reply.content.array_records.items()
        reply.content[key] = noisy(arrays, self._parameters, std * scale, self._generator(row))
        passed, detail = min(leakage.upper, target), row.detail
        if not row.verified:
            passed = leakage.upper
            detail = joined(detail, "its training was not reproduced, so whether the noise suffices is not known")
        return replace(row, action="perturbed", applied_noise_std=std, passed_leakage=passed, detail=detail)

    def _is_shifted(self, reading: Reading) -> bool:
        """Returns whether a client's update is to be replaced by the one at x + a."""
        row, policy = reading.row, self.policy
        if policy.action != "perturb" or policy.family != "shaped" or reading.aggregate or reading.reply is None:
            return False
        if row.leakage is None or row.target_leakage is None or not row.verified:
            return False
        return isinstance(reading.task, AuditTask) and not row.leakage.upper <= row.target_leakage * (1 + _SLACK)

    def _with_shifted(
        self,
        shifted: Shifted,
        reply: Message,
        row: LeakageEstimate,
        leakage: float,
        target: float,
        params: Mapping[str, Numbers],
    ) -> LeakageEstimate:
        """Replaces an update by the one that the client's training gives at x + a, in the scale of what arrived."""
        ((key, arrays),) = reply.content.array_records.items()
        reply.content[key] = with_update(arrays, params, shifted.update, _scale(row))
        return replace(
            row,
            action="perturbed",
            input_noise=shifted.covariance,
            input_noise_kept=self.policy.kept,
            input_noise_leakage=shifted.leakage,
            input_noise_rms=shifted.rms,
            input_noise_change=shifted.change,
            passed_leakage=min(leakage, target),
            detail=joined(row.detail, shifted.note),
        )

    def _generator(self, row: LeakageEstimate) -> np.random.Generator:
        seed = self.policy.seed
        return np.random.default_rng(
            None if seed is None else [seed, row.server_round, zlib.crc32(row.client.encode())]
        )

    def _left_out(self, row: LeakageEstimate, reason: str) -> LeakageEstimate:
        if self.policy.dry_run:
            return _not_done(row, f"the update would be left out: {reason}")
        return replace(row, action="excluded", passed_leakage=None, detail=joined(row.detail, reason))


def _scale(row: LeakageEstimate) -> float:
    """Returns what an update was multiplied by. Pruning leaves entries as they are, and shrinks only the projection."""
    return row.scale if row.scale is not None and row.even_noise is not False else 1.0


def _not_done(row: LeakageEstimate, what: str) -> LeakageEstimate:
    return replace(row, detail=joined(row.detail, f"dry run: {what}"))
