"""What a server has that holds no private data: public examples of the same kind, and the updates that arrive."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fl_privacy.audit.claims import Traces
from fl_privacy.audit.estimate import Source
from fl_privacy.audit.task import Array, ClientUpdate
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.update import Loss

_NEAR = 0.25
"""How far what is seen of noise may be from what is claimed for the claim to be taken at its word."""
_NO_NOISE = 0.01
"""Share of zeros in an update above which nobody put independent noise on all of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PublicExamples:
    """Examples of the kind that clients train on, at which the server can audit, or shape noise, without their data.

    Attributes:
        inputs: `[M, *shape]`, floating point, as the model is given them.
        labels: `[M]`, class indices.
        lr: Learning rate of a client's step, by which its update becomes a gradient: needed to rebuild inputs, and to
            recover how often each label occurs in a batch. `None`: the entry `lr` of the round's training
            configuration, where there is one.
        most: Most examples whose Jacobian is taken in a round, evenly from all classes. They serve all clients.
        max_rebuilt: Most examples behind an update that is attacked; larger batches get a row that says so.
        attack_steps: Most linearisations of that attack from a start, which with `time_limit` is its budget.

    Raises:
        InvalidInputError: Shapes or types do not fit together, values are not finite, or a number is out of range.
    """

    inputs: Array
    labels: Array
    lr: float | None = None
    most: int = 96
    max_rebuilt: int = 8
    attack_steps: int = 60

    def __post_init__(self) -> None:
        if self.inputs.ndim < 2 or 0 in self.inputs.shape or not np.issubdtype(self.inputs.dtype, np.floating):
            raise InvalidInputError(
                "expected public inputs [examples, *shape] of floats with nothing empty, got "
                f"{self.inputs.dtype} {list(self.inputs.shape)}"
            )
        if len(self.inputs) < 2 or self.labels.shape != self.inputs.shape[:1]:
            raise InvalidInputError(
                f"expected at least 2 public examples and a label for each, got {len(self.inputs)} and labels "
                f"{list(self.labels.shape)}"
            )
        if not np.issubdtype(self.labels.dtype, np.integer):
            raise InvalidInputError(f"expected class indices as public labels, got {self.labels.dtype}")
        if not np.isfinite(self.inputs).all():
            raise InvalidInputError("expected finite public inputs, got NaN or infinity")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise InvalidInputError(f"expected a finite lr > 0, got {self.lr}")
        for name, least in (("most", 2), ("max_rebuilt", 1), ("attack_steps", 1)):
            if getattr(self, name) < least:
                raise InvalidInputError(f"expected {name} >= {least}, got {getattr(self, name)}")

    def check(self, model: nn.Module, loss: Loss) -> None:
        """Raises InvalidInputError where the model does not take these inputs, or the loss these labels."""
        net = copy.deepcopy(model).eval()
        like = next(net.parameters())
        inputs = torch.from_numpy(np.array(self.inputs[:1])).to(like)
        try:
            with torch.no_grad():
                outputs = net(inputs)
                for label in np.unique(self.labels):
                    loss(outputs, torch.tensor([int(label)], device=like.device))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise InvalidInputError(
                f"expected public examples that the model takes, got inputs {list(self.inputs.shape[1:])} with labels "
                f"from {self.labels.min()} to {self.labels.max()}: {str(error).splitlines()[0]}"
            ) from error

    def chosen(self, seed: int, most: int | None = None) -> tuple[Array, Array]:
        """Returns inputs and labels of at most `most` examples, by default its own, drawn evenly from the classes."""
        order = np.random.default_rng(seed).permutation(len(self.labels))
        rank = np.empty(len(order), dtype=int)  # of each example among those of its class
        for label in np.unique(self.labels):
            members = order[self.labels[order] == label]
            rank[members] = np.arange(len(members))
        chosen = order[np.argsort(rank[order], kind="stable")][: self.most if most is None else most]
        return self.inputs[chosen], self.labels[chosen]


@dataclass(frozen=True, kw_only=True, eq=False)
class UpdateTask(ClientUpdate):
    """One client's update alone, to be audited without the batch behind it.

    Attributes:
        traces: What the update shows of how it was defended.
        claimed_noise_std: Noise per parameter that the client says is on it; `None`: it says nothing.
        lr: Learning rate of the client's steps, as far as it is known.
    """

    traces: Traces
    claimed_noise_std: float | None = None
    lr: float | None = None

    @property
    def group(self) -> Hashable:
        """Public examples are measured once for all clients; an attack is made on each alone."""
        return Source.PROXY if self.source is Source.PROXY else id(self)

    @property
    def noise_std(self) -> float:
        """Noise per parameter to credit: what the update shows, and no more than its client says.

        A claim counts to the letter where what is seen is within a quarter of it, and no further from it than chance
        brings it. None for an update with many exact zeros: there is no noise on every parameter, whatever the sums of
        its last layer say.
        """
        if self.traces.noise_std is None or self.traces.sparsity > _NO_NOISE:
            return 0.0
        claimed = math.inf if self.claimed_noise_std is None else self.claimed_noise_std
        return claimed if self._claim_agrees else min(self.traces.noise_std, claimed)

    @property
    def noise_error(self) -> float:
        """Standard error of `noise_std`, relative to it: none where a client's word and its update agree."""
        return 0.0 if self.noise_std == 0 or self._claim_agrees else self.traces.relative_error

    @property
    def _claim_agrees(self) -> bool:
        if not self.claimed_noise_std or self.traces.noise_std is None:
            return False
        tolerance = min(4 * self.traces.relative_error, _NEAR)
        return abs(self.traces.noise_std / self.claimed_noise_std - 1) <= tolerance
