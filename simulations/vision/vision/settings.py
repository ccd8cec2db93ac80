"""The options of a run, read from the app's `run_config` and checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from flwr.app import UserConfig

from fl_privacy.reference import DATASETS, MODELS

DEFENCES = ("none", "local-dp", "prune")
"""What a client can do to its update. `mixed` hands them out in turn."""
BLIND_SOURCES = ("proxy", "reconstructed")
"""Of an audit that is given nothing but a client's update."""
SOURCES = ("trusted", "client", *BLIND_SOURCES)
"""Where an audit can take the Jacobian."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every option of `[tool.flwr.app.config]`, where each is explained; `-` in a key is `_` here.

    Raises:
        ValueError: A value is none of those that are valid, which the message names.
    """

    dataset: str
    data_root: str
    image_size: int
    model: str
    num_clients: int
    num_server_rounds: int
    dirichlet_alpha: float
    seed: int
    local_steps: int
    batch_size: int
    learning_rate: float
    momentum: float
    defence: str
    dp_clipping_norm: float
    dp_noise_multiplier: float
    dp_delta: float
    prune_keep: float
    audit_source: str
    audit_unit: str
    audit_target_leakage: float
    audit_policy: str
    audit_noise_family: str
    audit_shares: int
    audit_dry_run: bool
    audit_max_examples: int
    audit_prior_std: float
    audit_workers: int
    audit_gpus: float
    audit_time_limit: float
    audit_on_failure: str
    picture: bool
    reference_run: bool
    ledger: str
    tensorboard: str

    def __post_init__(self) -> None:
        choices = {
            "dataset": tuple(sorted(DATASETS)),
            "model": tuple(sorted(MODELS)),
            "defence": ("mixed", *DEFENCES),
            "audit_source": SOURCES,
            "audit_unit": ("example", "batch"),
            "audit_policy": ("report", "advise", "perturb", "exclude"),
            "audit_noise_family": ("isotropic", "shaped", "white", "auto"),
            "audit_on_failure": ("continue", "exclude"),
        }
        for name, valid in choices.items():
            self._require(name, getattr(self, name) in valid, f"one of {', '.join(valid)}")
        for name in ("image_size", "num_clients", "num_server_rounds", "local_steps", "batch_size", "audit_shares"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("dirichlet_alpha", "learning_rate", "dp_clipping_norm", "dp_noise_multiplier", "audit_time_limit"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in ("audit_workers", "audit_gpus", "audit_prior_std"):
            self._require(name, getattr(self, name) >= 0, "zero or positive")
        self._require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._require("prune_keep", 0 < self.prune_keep <= 1, "in (0, 1]")
        self._require("dp_delta", 0 < self.dp_delta < 1, "in (0, 1)")

    @classmethod
    def from_run_config(cls, run_config: UserConfig) -> Self:
        """Returns the checked settings of a run.

        Raises:
            ValueError: A key is missing or unknown, or a value has another type or is not valid.
        """
        expected = {field.name.replace("_", "-"): str(field.type) for field in fields(cls)}
        if run_config.keys() != expected.keys():
            missing, unknown = expected.keys() - run_config.keys(), run_config.keys() - expected.keys()
            raise ValueError(f"run config lacks {sorted(missing)} and has the unknown keys {sorted(unknown)}")
        values: dict[str, object] = {}
        for key, kind in expected.items():
            value = run_config[key]
            if kind == "float" and type(value) is int:
                value = float(value)
            if type(value).__name__ != kind:
                raise ValueError(f"run config: {key} must be of type {kind}, got {value!r}")
            values[key.replace("-", "_")] = value
        return cls(**values)  # type: ignore[arg-type]  # each value was compared with its field's type above

    def defence_of(self, partition_id: int) -> str:
        """Returns the name of the defence that the client of this partition uses."""
        return DEFENCES[partition_id % len(DEFENCES)] if self.defence == "mixed" else self.defence

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"run config: {name.replace('_', '-')} must be {expected}, got {getattr(self, name)!r}")
