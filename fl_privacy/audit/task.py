"""What is known of one client in one round: the input of an audit."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.errors import InvalidInputError

Array = NDArray[np.generic]


@dataclass(frozen=True, kw_only=True)
class TrainingTrace:
    """How a client made its update: its optimiser, step by step.

    Attributes:
        optimizer: Class name, `SGD` for `torch.optim.SGD`. Others cannot be replayed.
        batches: Per step, the indices of its mini-batch into the examples that were handed over.
        lr: Learning rate per step.
        momentum: As `torch.optim.SGD`.
        dampening: As `torch.optim.SGD`.
        weight_decay: As `torch.optim.SGD`.
        nesterov: As `torch.optim.SGD`.
        problem: Why the trace cannot be replayed; empty if it can.
    """

    optimizer: str
    batches: tuple[tuple[int, ...], ...]
    lr: tuple[float, ...]
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    problem: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditTask:
    """One client's update and the batch behind it.

    Attributes:
        server_round: Round number.
        client: Name to show.
        node_id: Flower's node id.
        shared: Update that arrived, shared minus global parameters, by name.
        inputs: Examples `[N, *shape]`, each once.
        labels: `[N, ...]`.
        trace: How the update was made.
        captured: The client's own update before any defence, by name; `None` if it could not be captured.
        source: Where the batch comes from.
        defence: What the client says it did to its update.
        num_examples: What the client says it trained on.
        target_leakage: What noise is to be found for; `None`: the settings' target.
        applied_noise_std: Noise per parameter that the client says it put on its update.
        advised_noise_std: Noise that it was advised to put on it.
    """

    server_round: int
    client: str
    node_id: int
    shared: Mapping[str, Array]
    inputs: Array
    labels: Array
    trace: TrainingTrace
    captured: Mapping[str, Array] | None = None
    source: Source = Source.TRUSTED
    defence: str = ""
    num_examples: int | None = None
    target_leakage: float | None = None
    applied_noise_std: float | None = None
    advised_noise_std: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidInputError where inputs, labels and trace do not fit together."""
        if self.inputs.ndim < 2 or 0 in self.inputs.shape:
            raise InvalidInputError(
                f"expected inputs [examples, *shape] with nothing empty, got {list(self.inputs.shape)}"
            )
        if self.labels.shape[:1] != self.inputs.shape[:1]:
            raise InvalidInputError(
                f"expected one label for each of {len(self.inputs)} examples, got {list(self.labels.shape)}"
            )
        named = {i for batch in self.trace.batches for i in batch}
        if named and not (min(named) >= 0 and max(named) < len(self.inputs)):
            raise InvalidInputError(
                f"expected mini-batch indices in [0, {len(self.inputs)}), got some in [{min(named)}, {max(named)}]"
            )

    @property
    def group(self) -> Hashable:
        """Tasks of one group have the same shapes and the same trace: one vectorised pass audits them together."""
        if self.trace.problem:
            return id(self)  # audited through a stand-in of its own scale
        return (
            self.inputs.shape,
            self.inputs.dtype.str,
            self.labels.shape,
            self.labels.dtype.str,
            self.trace,
            self.captured is None,
        )

    def row(self, status: Status, *, detail: str = "") -> LeakageEstimate:
        """Returns a row for this client without an estimate."""
        return LeakageEstimate(
            server_round=self.server_round,
            client=self.client,
            node_id=self.node_id,
            status=status,
            source=self.source,
            defence=self.defence,
            num_examples=self.num_examples,
            advised_noise_std=self.advised_noise_std,
            applied_noise_std=self.applied_noise_std,
            detail=detail,
        )
