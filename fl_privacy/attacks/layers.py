"""A model's linear layers, as an attacker sees them run: which one meets the input, which one gives the logits."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_privacy.attacks.problem import AttackProblem
from fl_privacy.errors import InvalidInputError
from fl_privacy.influence.training import LocalTrainingUpdate
from fl_privacy.influence.update import GradientUpdate, UpdateMap


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """One `nn.Linear` and what went through it, at the prior mean.

    Attributes:
        name: Of the module.
        has_bias: Whether its bias is trained.
        inputs: `[1, ..., in]`.
        outputs: `[1, ..., out]`.
    """

    name: str
    has_bias: bool
    inputs: Tensor
    outputs: Tensor


def input_layer(problem: AttackProblem) -> LinearLayer:
    """Returns the linear layer that is fed the flattened model input itself.

    Raises:
        InvalidInputError: The model has none with a trained bias.
    """
    example = problem.prior.sample(1, 1, torch.Generator().manual_seed(0))
    layers, _ = _observed(problem, example)
    for layer in layers:
        if layer.has_bias and layer.inputs.shape == example.shape and torch.equal(layer.inputs, example):
            return layer
    raise InvalidInputError(
        "expected a model whose input enters a linear layer with a trained bias, got none: rebuild its inputs with an "
        "iterative attack"
    )


def output_layer(problem: AttackProblem) -> LinearLayer:
    """Returns the linear layer whose outputs are the model's.

    Raises:
        InvalidInputError: The model has none.
    """
    layers, outputs = _observed(problem, problem.prior.start(1, 1))
    for layer in reversed(layers):
        if layer.outputs.shape == outputs.shape and torch.equal(layer.outputs, outputs):
            return layer
    raise InvalidInputError("expected a model whose last layer is linear, got none: pass labels to the problem")


def mean_gradient(problem: AttackProblem) -> dict[str, Tensor]:
    """Returns the mean-loss gradient by name `[U, *shape]` that the shared updates stand for.

    For a gradient it is the update itself. For one step of local training it follows from the parameter change, for
    several it is their average, weighted by learning rate.
    """
    flat = _as_gradient(problem.update, problem)
    return problem.update.layout.unflatten(flat)


@functools.singledispatch
def _as_gradient(update: UpdateMap, problem: AttackProblem) -> Tensor:
    raise InvalidInputError(
        f"expected an update map whose gradient can be read off, got {type(update).__name__}: pass labels to the "
        "problem and use an iterative attack"
    )


@_as_gradient.register
def _(update: GradientUpdate, problem: AttackProblem) -> Tensor:
    return problem.shared


@_as_gradient.register
def _(update: LocalTrainingUpdate, problem: AttackProblem) -> Tensor:
    # θ_T − θ_0 = −Σ η_t (g_t + wθ_t), θ_t ≈ θ_0
    theta = update.layout.flatten(problem.params)
    return -problem.shared / sum(update.lr) - update.weight_decay * theta


def _observed(problem: AttackProblem, example: Tensor) -> tuple[list[LinearLayer], Tensor]:
    """Returns the linear layers in the order in which they run on one flat example `[1, d]`, and the outputs."""
    seen: list[LinearLayer] = []
    trained = set(problem.update.layout.names)

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append(LinearLayer(name, f"{name}.bias" in trained, args[0].detach(), output.detach()))

        return record

    with contextlib.ExitStack() as stack:
        for name, module in problem.update.model.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" in trained:
                stack.callback(module.register_forward_hook(recorder(name)).remove)
        outputs = problem.update.outputs(problem.params, example.reshape(1, *problem.prior.mean.shape))
    return seen, outputs
