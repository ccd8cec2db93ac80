"""What is known of one client in one round: the input of an audit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_privacy.audit.estimate import LeakageEstimate, Source, Status
from fl_privacy.errors import InvalidInputError

Array = NDArray[np.generic]
Numbers = NDArray[Any]
"""An array to compute with."""


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
class InputShift:
    """Noise that was put on private examples before a model was trained on them.

    Attributes:
        noise: a `[N, *shape]`, 0 for examples without.
        leakage: What x + a tells of x, `[N]`, for noise of a's law under a prior of `prior_std`; 1 without noise. The
            law is the word of whoever drew it.
        prior_std: τ.
        covariance: What shaped it: `client`, `public` or `white`.
        kept: Whether an example has the same noise in every round.
        bounds: Lowest and highest valid input, each a number or one per channel `[C, 1, ...]`: x + a was moved to the
            nearest valid value, which is a function of x + a alone and so tells no more.
        note: What was not as asked.

    Raises:
        InvalidInputError: The parts do not fit together.
    """

    noise: Numbers
    leakage: Numbers
    prior_std: float
    covariance: str
    kept: bool
    bounds: tuple[Numbers, Numbers] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Raises InvalidInputError where the parts do not fit together."""
        if not np.issubdtype(self.noise.dtype, np.floating) or not np.isfinite(self.noise).all():
            raise InvalidInputError(f"expected noise on the inputs of finite floats, got {self.noise.dtype}")
        if self.leakage.shape != self.noise.shape[:1] or not ((self.leakage >= 0) & (self.leakage <= 1)).all():
            raise InvalidInputError(
                f"expected a leakage in [0, 1] for each of {len(self.noise)} noises, got {list(self.leakage.shape)}"
            )
        if not (math.isfinite(self.prior_std) and self.prior_std > 0):
            raise InvalidInputError(f"expected a finite prior_std > 0, got {self.prior_std}")
        for bound in self.bounds or ():
            shape = bound.shape
            if len(shape) not in (0, self.noise.ndim - 1) or any(size != 1 for size in shape[1:]):
                raise InvalidInputError(
                    f"expected bounds that are numbers or one per channel [C, 1, ...], got shape {list(shape)}: bounds "
                    "that differ from place to place could tell what they bound"
                )

    def on(self, inputs: Numbers) -> Numbers:
        """Returns x + a, within the bounds: what the model is trained on.

        Raises:
            InvalidInputError: The inputs have another shape, or are themselves out of bounds.
        """
        if inputs.shape != self.noise.shape:
            raise InvalidInputError(f"expected inputs {list(self.noise.shape)}, got {list(inputs.shape)}")
        moved: Numbers = (inputs + self.noise).astype(inputs.dtype)
        if self.bounds is None:
            return moved
        low, high = self.bounds
        slack = 1e-5 * (high - low)  # of inputs that were scaled in another floating-point type
        if not ((low < high).all() and (inputs >= low - slack).all() and (inputs <= high + slack).all()):
            raise InvalidInputError(
                f"expected inputs within {low.tolist()} and {high.tolist()}, got values from {inputs.min():.4g} to "
                f"{inputs.max():.4g}: give the bounds in the units of the inputs, after any normalisation"
            )
        within: Numbers = np.clip(moved, low, high).astype(inputs.dtype)
        return within

    @property
    def rms(self) -> float:
        """Root mean square per element of the noise, over the examples that have some."""
        noisy = self.leakage < 1
        return float(np.sqrt(np.mean(np.square(self.noise[noisy], dtype=np.float64)))) if noisy.any() else 0.0


def example_key(example: Array) -> bytes:
    """Returns what an example is known by from round to round: a digest of its content, type and shape."""
    header = f"{example.dtype}{example.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(example).tobytes()).digest()[:16]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientUpdate:
    """One client's update, and what goes into its row whatever becomes of the audit.

    Attributes:
        server_round: Round number.
        client: Name to show.
        node_id: Flower's node id.
        shared: Update that arrived, shared minus global parameters, by name.
        source: Where the Jacobian is to be taken.
        defence: What the client says it did to its update.
        num_examples: What the client says it trained on.
        target_leakage: What noise is to be found for; `None`: the settings' target.
        applied_noise_std: Noise per parameter that the client says it put on its update.
        advised_noise_std: Noise that it was advised to put on it.
        advised_input_leakage: Leakage that it was advised to bring its inputs to by noise on them.
    """

    server_round: int
    client: str
    node_id: int
    shared: Mapping[str, Array]
    source: Source
    defence: str = ""
    num_examples: int | None = None
    target_leakage: float | None = None
    applied_noise_std: float | None = None
    advised_noise_std: float | None = None
    advised_input_leakage: float | None = None

    @property
    def group(self) -> Hashable:
        """Updates of one group are audited together in one pass; here, each alone."""
        return id(self)

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
            advised_input_leakage=self.advised_input_leakage,
            detail=detail,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditTask(ClientUpdate):
    """One client's update and the batch behind it.

    Attributes:
        inputs: Examples `[N, *shape]`, each once.
        labels: `[N, ...]`.
        trace: How the update was made.
        captured: The client's own update before any defence, by name; `None` if it could not be captured.
        source: Where the batch comes from.
        shift: Noise on the inputs that it was trained with; `inputs` are without it.
    """

    inputs: Array
    labels: Array
    trace: TrainingTrace
    captured: Mapping[str, Array] | None = None
    source: Source = Source.TRUSTED
    shift: InputShift | None = None

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
        if self.shift is not None:
            self.shift.on(self.inputs)
        named = {i for batch in self.trace.batches for i in batch}
        if named and not (min(named) >= 0 and max(named) < len(self.inputs)):
            raise InvalidInputError(
                f"expected mini-batch indices in [0, {len(self.inputs)}), got some in [{min(named)}, {max(named)}]"
            )

    @property
    def given(self) -> Array:
        """What the model was trained on: the inputs, with the noise that was put on them."""
        return self.inputs if self.shift is None else self.shift.on(self.inputs)

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
            self.shift is None,
        )
