"""Second derivatives of a loss at one point, as products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.func import vmap

from fl_privacy.errors import NotTwiceDifferentiableError
from fl_privacy.influence.evaluation import LaneConvolution

LaneLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(theta `[P]`, inputs `[N, *shape]`, labels `[N, ...]`) -> scalar mean loss."""


class LossCurvature:
    """Hessian of a loss in (θ, x) jointly, at one point per lane, as products with vectors.

    Every product that an audit needs is one of these: with g_θ = ∂L/∂θ and g_x = ∂L/∂x,

        [H_θθ H_θx] [θ̇]   ∂/∂θ (⟨g_θ, θ̇⟩ + ⟨g_x, ẋ⟩)
        [H_xθ H_xx] [ẋ] = ∂/∂x (⟨g_θ, θ̇⟩ + ⟨g_x, ẋ⟩)

    The graph of the first derivatives is built once and kept, so a product is one backward pass over it: on
    convolutional networks the pair H_θx, H_xθ costs 3 to 4 gradients, less than forward-mode derivatives that start
    from the loss each time.

    Args:
        loss: Loss of one lane.
        theta: Parameters `[L, P]`, one row a lane.
        inputs: `[L, N, *shape]`.
        labels: `[L, N, ...]`.
        vectorize: Whether to run all lanes through one `vmap`; otherwise one lane after the other.

    Raises:
        NotTwiceDifferentiableError: The gradient of the loss does not depend on the inputs, or autograd cannot
            differentiate it again.
    """

    def __init__(self, loss: LaneLoss, theta: Tensor, inputs: Tensor, labels: Tensor, *, vectorize: bool) -> None:
        self._theta = theta.detach().requires_grad_()
        self._inputs = inputs.detach().requires_grad_()
        with torch.enable_grad():
            losses = _lane_losses(loss, self._theta, self._inputs, labels, vectorize=vectorize)
            if not losses.requires_grad:
                raise NotTwiceDifferentiableError(
                    "expected a loss that autograd can differentiate, got one that depends on neither parameters nor "
                    "inputs: look for detach(), no_grad() or argmax in the model or the loss"
                )
            gradients = _differentiate(losses.sum(), (self._theta, self._inputs), create_graph=True)
        self._g_theta, self._g_inputs = gradients
        if self._g_theta is None or self._g_inputs is None or not self._g_theta.requires_grad:
            raise NotTwiceDifferentiableError(
                "expected a loss whose parameter gradient depends on the inputs, got one whose gradient is constant in "
                "them: look for detach(), no_grad() or argmax in the model or the loss"
            )
        _check_graph(gradients)

    @property
    def gradient(self) -> Tensor:
        """g_θ `[L, P]`."""
        assert self._g_theta is not None
        return self._g_theta.detach()

    def parameter_product(self, theta_dot: Tensor | None, inputs_dot: Tensor | None) -> Tensor:
        """Returns H_θθ θ̇ + H_θx ẋ, `[L, P]`."""
        return self._product((self._theta,), theta_dot, inputs_dot)[0]

    def input_product(self, theta_dot: Tensor) -> Tensor:
        """Returns H_xθ θ̇, `[L, N, *shape]`."""
        return self._product((self._inputs,), theta_dot, None)[0]

    def joint_product(self, theta_dot: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (H_θθ θ̇, H_xθ θ̇) from one backward pass."""
        theta_part, inputs_part = self._product((self._theta, self._inputs), theta_dot, None)
        return theta_part, inputs_part

    def _product(self, wrt: tuple[Tensor, ...], theta_dot: Tensor | None, inputs_dot: Tensor | None) -> list[Tensor]:
        pairs = [(self._g_theta, theta_dot), (self._g_inputs, inputs_dot)]
        outputs = [(g, dot) for g, dot in pairs if dot is not None and g is not None and g.requires_grad]
        directions = [dot for _, dot in outputs]
        parts = _differentiate(tuple(g for g, _ in outputs), wrt, grad_outputs=directions, retain_graph=True)
        return [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(parts, wrt, strict=True)]


def mean_gradient(loss: LaneLoss, theta: Tensor, inputs: Tensor, labels: Tensor, *, vectorize: bool) -> Tensor:
    """Returns ∂L/∂θ `[L, P]`, without a graph for second derivatives."""
    leaf = theta.detach().requires_grad_()
    with torch.enable_grad():
        losses = _lane_losses(loss, leaf, inputs.detach(), labels, vectorize=vectorize)
        (gradient,) = _differentiate(losses.sum(), (leaf,))
    return torch.zeros_like(leaf) if gradient is None else gradient.detach()


def _lane_losses(loss: LaneLoss, theta: Tensor, inputs: Tensor, labels: Tensor, *, vectorize: bool) -> Tensor:
    if vectorize and theta.shape[0] > 1:
        with LaneConvolution():
            losses: Tensor = vmap(loss)(theta, inputs, labels)
        return losses
    return torch.stack([loss(theta[i], inputs[i], labels[i]) for i in range(theta.shape[0])])


def _check_graph(gradients: Iterable[Tensor | None]) -> None:
    """Refuses graphs that end in an error node, such as those of once-differentiable functions.

    Such a node is not connected to θ or x: autograd would prune it and take its part of the product for zero.
    """
    todo = [g.grad_fn for g in gradients if g is not None]
    seen: set[object] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise NotTwiceDifferentiableError(
                "expected a model and a loss that autograd can differentiate twice, got an autograd.Function marked "
                "once_differentiable: write its backward with differentiable operations"
            )
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)


def _differentiate(
    outputs: Tensor | tuple[Tensor, ...],
    wrt: tuple[Tensor, ...],
    *,
    grad_outputs: list[Tensor] | None = None,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(
            outputs,
            wrt,
            grad_outputs=grad_outputs,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise NotTwiceDifferentiableError(
            f"expected a model and a loss that autograd can differentiate twice, got: {error}. "
            "Replace the layer that the message names by one without a fused or once-differentiable kernel"
        ) from error
