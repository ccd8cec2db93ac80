"""Second derivatives of a loss at one point, as products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from fl_privacy.errors import NotTwiceDifferentiableError
from fl_privacy.influence.convolution import LaneConvolution
from fl_privacy.influence.layout import ParameterLayout
from fl_privacy.influence.precision import full_precision

Parts = tuple[Tensor, ...]
"""A vector over parameters or their gradients, one tensor `[L, *shape]` for each of the layout's parameters."""
LaneLoss = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]
"""(parameters by name, inputs `[N, *shape]`, labels `[N, ...]`) -> scalar mean loss."""


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
        layout: Order and shapes of the parameters in θ.
        theta: Parameters `[L, P]`, one row a lane.
        inputs: `[L, N, *shape]`.
        labels: `[L, N, ...]`.
        vectorize: Whether to run all lanes through one `vmap`; otherwise one lane after the other.

    Raises:
        NotTwiceDifferentiableError: The gradient of the loss does not depend on the inputs, or autograd cannot
            differentiate it again.
    """

    def __init__(
        self,
        loss: LaneLoss,
        layout: ParameterLayout,
        theta: Tensor,
        inputs: Tensor,
        labels: Tensor,
        *,
        vectorize: bool,
    ) -> None:
        self._layout = layout
        self._theta = _leaves(layout, theta)
        self._inputs = inputs.detach().requires_grad_()
        with torch.enable_grad():
            named = dict(zip(layout.names, self._theta, strict=True))
            losses = _lane_losses(loss, named, self._inputs, labels, vectorize=vectorize)
            if not losses.requires_grad:
                raise NotTwiceDifferentiableError(
                    "expected a loss that autograd can differentiate, got one that depends on neither parameters nor "
                    "inputs: look for detach(), no_grad() or argmax in the model or the loss"
                )
            *g_theta, self._g_inputs = _differentiate(losses.sum(), (*self._theta, self._inputs), create_graph=True)
        self._g_theta = g_theta
        if self._g_inputs is None or not any(g is not None and g.requires_grad for g in g_theta):
            raise NotTwiceDifferentiableError(
                "expected a loss whose parameter gradient depends on the inputs, got one whose gradient is constant in "
                "them: look for detach(), no_grad() or argmax in the model or the loss"
            )
        _check_graph((*g_theta, self._g_inputs))

    @property
    def gradient(self) -> Tensor:
        """g_θ `[L, P]`."""
        return _flat(_filled(self._g_theta, self._theta)).detach()

    def parameter_product(self, theta_dot: Tensor | None, inputs_dot: Tensor | None) -> Tensor:
        """Returns H_θθ θ̇ + H_θx ẋ, `[L, P]`."""
        return _flat(self._product(self._theta, self._split(theta_dot), inputs_dot))

    def input_product(self, theta_dot: Tensor) -> Tensor:
        """Returns H_xθ θ̇, `[L, N, *shape]`."""
        return self._product((self._inputs,), self._split(theta_dot), None)[0]

    def joint_product(self, theta_dot: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (H_θθ θ̇, H_xθ θ̇) from one backward pass."""
        *theta_parts, inputs_part = self._product((*self._theta, self._inputs), self._split(theta_dot), None)
        return _flat(tuple(theta_parts)), inputs_part

    def gram(self, inputs_dot: Tensor) -> Tensor:
        """Returns H_xθ H_θx ẋ, `[L, N, *shape]`; what lies between never becomes one vector of length P."""
        return self._product((self._inputs,), self._product(self._theta, None, inputs_dot), None)[0]

    def _split(self, theta_dot: Tensor | None) -> Parts | None:
        return None if theta_dot is None else tuple(self._layout.unflatten(theta_dot).values())

    def _product(self, wrt: Parts, theta_dot: Parts | None, inputs_dot: Tensor | None) -> Parts:
        pairs: list[tuple[Tensor | None, Tensor | None]] = [(self._g_inputs, inputs_dot)]
        if theta_dot is not None:
            pairs.extend(zip(self._g_theta, theta_dot, strict=True))
        used = [(g, dot) for g, dot in pairs if dot is not None and g is not None and g.requires_grad]
        parts = _differentiate(tuple(g for g, _ in used), wrt, grad_outputs=[dot for _, dot in used], retain_graph=True)
        return _filled(parts, wrt)


def mean_gradient(
    loss: LaneLoss, layout: ParameterLayout, theta: Tensor, inputs: Tensor, labels: Tensor, *, vectorize: bool
) -> Tensor:
    """Returns ∂L/∂θ `[L, P]`, without a graph for second derivatives."""
    leaves = _leaves(layout, theta)
    with torch.enable_grad():
        named = dict(zip(layout.names, leaves, strict=True))
        losses = _lane_losses(loss, named, inputs.detach(), labels, vectorize=vectorize)
        gradient = _differentiate(losses.sum(), leaves)
    return _flat(_filled(gradient, leaves))


def _leaves(layout: ParameterLayout, theta: Tensor) -> Parts:
    return tuple(part.detach().requires_grad_() for part in layout.unflatten(theta).values())


def _filled(parts: Sequence[Tensor | None], like: Parts) -> Parts:
    """Derivatives with zeros for those that autograd found to be no function of the leaf."""
    return tuple(torch.zeros_like(leaf) if part is None else part for part, leaf in zip(parts, like, strict=True))


def _flat(parts: Parts) -> Tensor:
    return torch.cat([part.detach().flatten(1) for part in parts], dim=1)


def _lane_losses(
    loss: LaneLoss, named: dict[str, Tensor], inputs: Tensor, labels: Tensor, *, vectorize: bool
) -> Tensor:
    with full_precision(inputs.device):
        if vectorize and len(inputs) > 1:
            with LaneConvolution():
                losses: Tensor = vmap(loss)(named, inputs, labels)
            return losses
        if len(inputs) == 1:  # a squeezed leaf costs no copy in the backward pass, an indexed one does
            return loss({name: part.squeeze(0) for name, part in named.items()}, inputs.squeeze(0), labels[0])[None]
        lanes = [({name: part[i] for name, part in named.items()}, inputs[i], labels[i]) for i in range(len(inputs))]
        return torch.stack([loss(*lane) for lane in lanes])


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
        with full_precision(wrt[0].device):
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
