"""Local training as an update map: the parameter change of a FedAvg client, differentiated through its steps."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.curvature import LossCurvature
from fl_privacy.influence.evaluation import BatchNormMode
from fl_privacy.influence.update import Linearization, Loss, UpdateMap


class LocalTrainingUpdate(UpdateMap):
    """u(x) = θ_T − θ_0: the parameter change of a FedAvg client's local SGD, differentiated through every step.

    The steps are those of `torch.optim.SGD`. The Jacobian is exact: tangents and adjoints follow the optimiser's
    recursion, with one Hessian product of the loss a step.

    Args:
        model: As for `UpdateMap`.
        loss: As for `UpdateMap`.
        lr: Learning rate, one number or one per step.
        steps: Number of steps on the whole batch, or, per step, the indices into the N examples of its mini-batch.
        momentum: As `torch.optim.SGD`.
        dampening: As `torch.optim.SGD`.
        weight_decay: As `torch.optim.SGD`.
        nesterov: As `torch.optim.SGD`.
        batch_norm: As for `UpdateMap`.
        input_module: As for `UpdateMap`.
        before_step: Called before each step of training, and before each step of a product with its Jacobian; what it
            raises ends either: a time limit's place to stop.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        lr: float | Sequence[float],
        steps: int | Sequence[Sequence[int]],
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        batch_norm: BatchNormMode = "eval",
        input_module: str | None = None,
        before_step: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(model, loss, batch_norm=batch_norm, input_module=input_module)
        self.batches: tuple[tuple[int, ...] | None, ...] = (
            (None,) * steps if isinstance(steps, int) else tuple(tuple(int(i) for i in batch) for batch in steps)
        )
        if not self.batches or any(batch is not None and not batch for batch in self.batches):
            raise InvalidInputError(f"expected at least one step and no empty mini-batch, got steps={steps!r}")
        self.lr = (float(lr),) * len(self.batches) if isinstance(lr, int | float) else tuple(float(rate) for rate in lr)
        if len(self.lr) != len(self.batches):
            raise InvalidInputError(
                f"expected one learning rate or one per step ({len(self.batches)}), got {len(self.lr)}"
            )
        numbers = [("momentum", momentum), ("weight_decay", weight_decay), *(("lr", rate) for rate in self.lr)]
        for name, number in numbers:
            if not (math.isfinite(number) and number >= 0):
                raise InvalidInputError(f"expected a finite {name} >= 0, got {number}")
        if not math.isfinite(dampening):
            raise InvalidInputError(f"expected a finite dampening, got {dampening}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise InvalidInputError("expected momentum > 0 and dampening = 0 with nesterov, as torch.optim.SGD does")
        self.momentum, self.dampening, self.weight_decay, self.nesterov = momentum, dampening, weight_decay, nesterov
        self.before_step = before_step

    def update(self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the parameter change `[L, P]`."""
        (last,) = collections.deque(self._trajectory(params, theta, inputs, labels), maxlen=1)
        return last - theta

    def linearize(
        self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor, *, retain: bool = True
    ) -> Linearization:
        """Returns the parameter change and its Jacobian."""
        return _TrainingLinearization(self, params, theta, inputs, labels, retain=retain)

    @property
    def num_graphs(self) -> int:
        """One per step."""
        return len(self.batches)

    @property
    def mixes_examples(self) -> bool:
        """True but for a single step on the whole batch: later steps start where earlier examples led."""
        return self.batches != (None,)

    def check_batch_size(self, num_examples: int) -> None:
        """Raises InvalidInputError where a mini-batch names an example that is not there."""
        named = [i for batch in self.batches if batch is not None for i in batch]
        if named and (min(named) < 0 or max(named) >= num_examples):
            raise InvalidInputError(
                f"expected mini-batch indices in [0, {num_examples}), got some in [{min(named)}, {max(named)}]"
            )

    def largest_batch(self, tensor: Tensor) -> Tensor:
        """Returns the largest mini-batch's examples of a tensor `[L, N, ...]`."""
        sizes = [tensor.shape[1] if batch is None else len(batch) for batch in self.batches]
        return self.minibatch(sizes.index(max(sizes)), tensor)

    def coefficients(self, step: int) -> tuple[float, float]:
        """Returns (a, c) of the momentum buffer's recursion b ← a·b + c·d, with d = g + weight_decay·θ."""
        first = step == 0 or self.momentum == 0
        return (0.0, 1.0) if first else (self.momentum, 1.0 - self.dampening)

    def advance(self, step: int, theta: Tensor, buffer: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (θ, b) after one step of SGD; linear in its tensors, so that tangents take it, too."""
        a, c = self.coefficients(step)
        d = gradient + self.weight_decay * theta
        buffer = a * buffer + c * d
        direction = d + self.momentum * buffer if self.nesterov else buffer
        return theta - self.lr[step] * direction, buffer

    def minibatch(self, step: int, tensor: Tensor) -> Tensor:
        """Returns the step's examples of a tensor `[L, N, ...]`."""
        batch = self.batches[step]
        return tensor if batch is None else tensor.index_select(1, torch.tensor(batch, device=tensor.device))

    def _trajectory(
        self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor
    ) -> Iterator[Tensor]:
        """Yields θ_0 to θ_T, each `[L, P]`."""
        buffer = torch.zeros_like(theta)
        yield theta
        for step in range(len(self.batches)):
            if self.before_step is not None:
                self.before_step()
            gradient = self._gradient(params, theta, self.minibatch(step, inputs), self.minibatch(step, labels))
            theta, buffer = self.advance(step, theta, buffer, gradient)
            yield theta


class _TrainingLinearization(Linearization):
    """Tangent and adjoint of T steps of SGD.

    With g_t = ∂L/∂θ at (θ_t, x_t), the tangent takes the optimiser's own step with ġ_t = H_θθ θ̇_t + H_θx ẋ_t. The
    adjoint of θ_{t+1} = θ_t − η·dir, dir = b_{t+1} (or d + μ b_{t+1} with Nesterov), b_{t+1} = a b_t + c d,
    d = g_t + w θ_t runs backwards:

        dir̄ = −η θ̄_{t+1},  b̄ ← b̄_{t+1} + (μ or 1)·dir̄,  d̄ = c·b̄ (+ dir̄),
        θ̄_t = θ̄_{t+1} + w d̄ + H_θθ d̄,  x̄_t = H_xθ d̄,  b̄_t = a·b̄.
    """

    def __init__(
        self,
        training: LocalTrainingUpdate,
        params: Mapping[str, Tensor],
        theta: Tensor,
        inputs: Tensor,
        labels: Tensor,
        *,
        retain: bool,
    ) -> None:
        self._training = training
        self._inputs_shape = inputs.shape
        self._thetas = list(training._trajectory(params, theta, inputs, labels))

        def curvature(step: int) -> LossCurvature:
            x, y = training.minibatch(step, inputs), training.minibatch(step, labels)
            return training._curvature(params, self._thetas[step], x, y)

        self._graph = functools.cache(curvature) if retain else curvature

    def _curvature(self, step: int) -> LossCurvature:
        if self._training.before_step is not None:
            self._training.before_step()
        return self._graph(step)

    def update(self) -> Tensor:
        return self._thetas[-1] - self._thetas[0]

    def jvp(self, inputs_dot: Tensor) -> Tensor:
        training = self._training
        theta_dot: Tensor | None = None
        buffer_dot: Tensor | None = None
        for step in range(len(training.batches)):
            x_dot = training.minibatch(step, inputs_dot)
            if theta_dot is None and not x_dot.any():
                continue  # nothing private has been seen yet
            g_dot = self._curvature(step).parameter_product(theta_dot, x_dot)
            if theta_dot is None or buffer_dot is None:
                theta_dot = buffer_dot = torch.zeros_like(g_dot)
            theta_dot, buffer_dot = training.advance(step, theta_dot, buffer_dot, g_dot)
        return torch.zeros_like(self._thetas[0]) if theta_dot is None else theta_dot

    def vjp(self, update_bar: Tensor) -> Tensor:
        training = self._training
        theta_bar, buffer_bar = update_bar, torch.zeros_like(update_bar)
        inputs_bar = update_bar.new_zeros(self._inputs_shape)
        for step in reversed(range(len(training.batches))):
            a, c = training.coefficients(step)
            direction_bar = -training.lr[step] * theta_bar
            buffer_bar = buffer_bar + (training.momentum * direction_bar if training.nesterov else direction_bar)
            d_bar = c * buffer_bar + direction_bar if training.nesterov else c * buffer_bar
            buffer_bar = a * buffer_bar
            batch = training.batches[step]
            if step > 0:
                h_theta, x_bar = self._curvature(step).joint_product(d_bar)
                theta_bar = theta_bar + training.weight_decay * d_bar + h_theta
            else:  # θ_0 is given: no adjoint is asked for
                x_bar = self._curvature(step).input_product(d_bar)
            if batch is None:
                inputs_bar = inputs_bar + x_bar
            else:
                inputs_bar = inputs_bar.index_add(1, torch.tensor(batch, device=x_bar.device), x_bar)
        return inputs_bar
