"""Update maps: what a client shares, as a function u(x) of its private inputs.

An update map knows how a client turns its inputs into the update it shares, and how to linearise that: to first order
u(x + a) = u(x) + J·a. All of it is built from products with the Hessian of one scalar loss (`curvature`).
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fl_privacy.errors import InvalidInputError, NotTwiceDifferentiableError
from fl_privacy.influence.curvature import LaneLoss, LossCurvature, mean_gradient
from fl_privacy.influence.evaluation import BatchNormMode, RoundedReLUs, audit_mode, replaced_output
from fl_privacy.influence.layout import ParameterLayout

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]
"""(model outputs `[N, ...]`, labels `[N, ...]`) -> scalar, the mean over the N examples."""


class Linearization(ABC):
    """An update map and its Jacobian at one point per lane."""

    @abstractmethod
    def update(self) -> Tensor:
        """Returns u(x), `[L, P]`."""

    @abstractmethod
    def jvp(self, inputs_dot: Tensor) -> Tensor:
        """Returns J·v, `[L, P]`, for v `[L, N, *shape]`."""

    @abstractmethod
    def vjp(self, update_bar: Tensor) -> Tensor:
        """Returns Jᵀ·w, `[L, N, *shape]`, for w `[L, P]`."""

    def gram(self, inputs_dot: Tensor) -> Tensor:
        """Returns JᵀJ·v, `[L, N, *shape]`, for v `[L, N, *shape]`."""
        return self.vjp(self.jvp(inputs_dot))


class UpdateMap(ABC):
    """What a client shares, as a function of its inputs at given global parameters.

    Args:
        model: Any module; it is never changed. Its buffers are used as they are when a product is computed.
        loss: (outputs, labels) -> scalar mean loss, for example `nn.CrossEntropyLoss()`.
        batch_norm: Whether batch normalisation uses its running statistics (`eval`) or the batch's own (`train`).
        input_module: Name of a submodule whose output is the private input in place of the model's argument: with an
            embedding layer's name, `inputs` are embeddings `[N, T, E]`, and the model is run on token ids of zero.
            The submodule must take integer ids of the inputs' shape without the last axis.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, batch_norm: BatchNormMode = "eval", input_module: str | None = None
    ) -> None:
        if batch_norm not in ("eval", "train"):
            raise InvalidInputError(f"expected batch_norm to be 'eval' or 'train', got {batch_norm!r}")
        if input_module is not None and input_module not in dict(model.named_modules()):
            raise InvalidInputError(f"expected input_module to name a submodule of the model, got {input_module!r}")
        self.model = model
        self.loss = loss
        self.batch_norm: BatchNormMode = batch_norm
        self.input_module = input_module
        self.layout = ParameterLayout.of(model)
        self.relu_width = 0.0
        """To which ReLUs are rounded off, relative to what they see; `rounding.rounded_off` makes such a map."""
        self._vectorizable = True

    def __call__(self, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns the update of one client by parameter name.

        Args:
            params: Global parameters by name.
            inputs: `[N, *shape]`.
            labels: `[N, ...]`.
        """
        theta = self.layout.flatten(params)[None]
        return self.layout.unflatten(self.update(params, theta, inputs[None], labels[None])[0])

    @abstractmethod
    def update(self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Returns u(x) `[L, P]` for lanes of theta `[L, P]`, inputs `[L, N, *shape]` and labels `[L, N, ...]`."""

    @abstractmethod
    def linearize(
        self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor, *, retain: bool = True
    ) -> Linearization:
        """Returns the update and its Jacobian at the given point, with the lanes of `update`.

        With `retain`, graphs are kept from one product to the next; without, they are built anew for each.
        """

    @property
    @abstractmethod
    def num_graphs(self) -> int:
        """Number of loss graphs that a retained linearisation keeps per lane."""

    @property
    def mixes_examples(self) -> bool:
        """Whether the update is, by construction, more than a mean of one term per example."""
        return False

    def graph(self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor) -> LossCurvature:
        """Returns the graph of one mini-batch, as a linearisation keeps it, so that its size can be measured."""
        return self._curvature(params, theta, inputs, labels)

    def largest_batch(self, tensor: Tensor) -> Tensor:
        """Returns what the largest of the graphs that a linearisation keeps takes of a tensor `[L, N, ...]`."""
        return tensor

    def check_batch_size(self, num_examples: int) -> None:  # noqa: B027 - most maps take any batch
        """Raises InvalidInputError where the map cannot use a batch of this size."""

    def example_losses(
        self,
        params: Mapping[str, Tensor],
        inputs: Tensor,
        labels: Tensor,
        *,
        before_example: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of the batch `[N, *shape]` and those of its examples, each run alone, `[N]`."""
        trained = {name: params[name] for name in self.layout.names}
        with torch.no_grad(), audit_mode(self.model, batch_norm=self.batch_norm):
            loss = self._lane_loss(params, inputs)
            alone = []
            for i in range(len(inputs)):
                before_example()
                alone.append(loss(trained, inputs[i : i + 1], labels[i : i + 1]))
            return loss(trained, inputs, labels), torch.stack(alone)

    def check_loss(self, outputs: Tensor, labels: Tensor) -> None:
        """Raises InvalidInputError where the loss cannot be computed from outputs and labels, both `[N, ...]`."""
        with torch.no_grad(), _named_failure(outputs, labels):
            _checked(self.loss(outputs, labels))

    def outputs(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Returns the model's outputs for inputs `[N, *shape]`, in audit mode and without a graph."""
        with torch.no_grad(), audit_mode(self.model, batch_norm=self.batch_norm), _named_failure(inputs):
            constants = self._constants(params, inputs)
            return self._forward({name: params[name] for name in self.layout.names}, constants, inputs)

    def _curvature(self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor) -> LossCurvature:
        with audit_mode(self.model, batch_norm=self.batch_norm):
            loss = self._lane_loss(params, inputs)
            return self._try_vectorized(lambda v: LossCurvature(loss, self.layout, theta, inputs, labels, vectorize=v))

    def _gradient(self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        with audit_mode(self.model, batch_norm=self.batch_norm):
            loss = self._lane_loss(params, inputs)
            return self._try_vectorized(lambda v: mean_gradient(loss, self.layout, theta, inputs, labels, vectorize=v))

    def _try_vectorized(self, build: Callable[[bool], T]) -> T:
        """Builds with all lanes in one `vmap`, or lane by lane for a model that `vmap` cannot run."""
        if self._vectorizable:
            try:
                return build(True)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, NotTwiceDifferentiableError):
                built = build(False)  # raises again where vmap was not the reason
                self._vectorizable = False
                return built
        return build(False)

    def _lane_loss(self, params: Mapping[str, Tensor], like: Tensor) -> LaneLoss:
        constants = self._constants(params, like)

        def loss(trained: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
            return _checked(self.loss(self._forward(trained, constants, inputs), labels))

        return loss

    def _constants(self, params: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Frozen parameters and buffers, copied to the device and dtype of `like`; call it in audit mode."""
        constants = {name: params.get(name, p) for name, p in self.model.named_parameters() if not p.requires_grad}
        constants |= dict(self.model.named_buffers())
        return {
            name: t.detach().to(like.device, like.dtype if t.is_floating_point() else t.dtype, copy=True)
            for name, t in constants.items()
        }

    def _forward(self, trained: Mapping[str, Tensor], constants: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        state = {**constants, **trained}
        with RoundedReLUs(self.relu_width) if self.relu_width else contextlib.nullcontext():
            if self.input_module is None:
                return functional_call(self.model, state, (inputs,))  # type: ignore[no-any-return]
            ids = torch.zeros(inputs.shape[:-1], dtype=torch.long, device=inputs.device)
            with replaced_output(self.model, self.input_module, inputs):
                return functional_call(self.model, state, (ids,))  # type: ignore[no-any-return]


class GradientUpdate(UpdateMap):
    """u(x) = ∂L/∂θ: the mean-loss gradient that a FedSGD client shares."""

    def update(self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean-loss gradient `[L, P]`."""
        return self._gradient(params, theta, inputs, labels)

    def linearize(
        self, params: Mapping[str, Tensor], theta: Tensor, inputs: Tensor, labels: Tensor, *, retain: bool = True
    ) -> Linearization:
        """Returns the gradient and its Jacobian: J = H_θx, Jᵀ = H_xθ."""
        build = lambda: self._curvature(params, theta, inputs, labels)  # noqa: E731
        return _GradientLinearization(build, retain=retain)

    @property
    def num_graphs(self) -> int:
        """One: the update is a single gradient."""
        return 1


class _GradientLinearization(Linearization):
    def __init__(self, build: Callable[[], LossCurvature], *, retain: bool) -> None:
        self._curvature = functools.cache(build) if retain else build

    def update(self) -> Tensor:
        return self._curvature().gradient

    def jvp(self, inputs_dot: Tensor) -> Tensor:
        return self._curvature().parameter_product(None, inputs_dot)

    def vjp(self, update_bar: Tensor) -> Tensor:
        return self._curvature().input_product(update_bar)

    def gram(self, inputs_dot: Tensor) -> Tensor:
        return self._curvature().gram(inputs_dot)


def _checked(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim:
        raise InvalidInputError(
            "expected a loss that returns one number as a tensor, the mean over the batch, got "
            f"{list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}: use reduction='mean'"
        )
    return loss


@contextlib.contextmanager
def _named_failure(*tensors: Tensor) -> Iterator[None]:
    """Turns whatever a model or a loss raises on tensors that it cannot take into an error that names them."""
    try:
        yield
    except (InvalidInputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        given = " and ".join(f"{list(tensor.shape)} of {tensor.dtype}" for tensor in tensors)
        raise InvalidInputError(
            f"expected inputs and labels that the model and the loss can take, got {given}: {error}"
        ) from error
