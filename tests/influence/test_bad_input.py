"""What cannot be audited is refused with a message that names what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_privacy import (
    GradientUpdate,
    LocalTrainingUpdate,
    UpdateJacobian,
    estimate_spectrum,
    influence,
    influence_lower_bound,
)
from fl_privacy.errors import FLPrivacyError, InvalidInputError

from .cases import CLASSES, parameters_of

UNITS, EXAMPLES, WIDTH = 2, 3, 4


def good() -> dict[str, Any]:
    """Arguments of a Jacobian that can be built."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES)
    return {
        "update": GradientUpdate(model, nn.CrossEntropyLoss()),
        "params": parameters_of(model),
        "inputs": torch.randn(UNITS, EXAMPLES, WIDTH),
        "labels": torch.zeros(UNITS, EXAMPLES, dtype=torch.long),
        "private": None,
    }


def build(**changes: Any) -> UpdateJacobian:
    arguments = good() | changes
    return UpdateJacobian(
        arguments.pop("update"), arguments.pop("params"), arguments.pop("inputs"), arguments.pop("labels"), **arguments
    )


def with_parameter(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    params = good()["params"]
    return {"params": params | {name: change(params[name])}}


def without_parameter(name: str) -> dict[str, Any]:
    return {"params": {key: tensor for key, tensor in good()["params"].items() if key != name}}


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = torch.nan
    return tensor


def labels(*values: int) -> Tensor:
    return torch.tensor(values).repeat(UNITS, 1)


REGRESSION = {"update": GradientUpdate(nn.Linear(WIDTH, CLASSES), nn.MSELoss())}
TRAINING = {"update": LocalTrainingUpdate(nn.Linear(WIDTH, CLASSES), nn.CrossEntropyLoss(), lr=0.1, steps=[[0, 3]])}
JACOBIANS: dict[str, tuple[dict[str, Any], str]] = {
    "no units": ({"inputs": torch.zeros(3, WIDTH)}, "shape [units, examples, *example shape]|got [3, 4]|inputs[None]"),
    "empty batch": ({"inputs": torch.zeros(2, 0, WIDTH), "labels": torch.zeros(2, 0).long()}, "got [2, 0, 4]"),
    "integer inputs": ({"inputs": torch.zeros(2, 3, WIDTH).byte()}, "float32 or float64|got torch.uint8|scale pixels"),
    "half inputs": ({"inputs": torch.zeros(2, 3, WIDTH).half()}, "float32 or float64|got torch.float16"),
    "inputs NaN": ({"inputs": with_nan(torch.zeros(2, 3, WIDTH))}, "finite inputs|NaN or infinity"),
    "inputs infinite": ({"inputs": torch.full((2, 3, WIDTH), torch.inf)}, "finite inputs|NaN or infinity"),
    "few labels": ({"labels": torch.zeros(2, 2).long()}, "labels that begin with [2, 3]|got [2, 2]"),
    "flat labels": ({"labels": torch.zeros(3).long()}, "labels that begin with [2, 3]|got [3]"),
    "label too large": ({"labels": labels(0, 1, 3)}, "labels in [0, 3)|got [3]"),
    "label negative": ({"labels": labels(0, -1, 2)}, "labels in [0, 3)|got [-1]"),
    "label ignored only by name": ({"labels": labels(0, -7, 2)}, "labels in [0, 3)|got [-7]"),
    "labels NaN": (REGRESSION | {"labels": torch.full((2, 3, CLASSES), torch.nan)}, "finite labels|NaN or infinity"),
    "parameter missing": (without_parameter("bias"), "every trained parameter|bias is missing"),
    "parameter shape": (with_parameter("bias", lambda p: p[:2]), "bias of shape [3]|got [2]"),
    "parameter dtype": (with_parameter("weight", Tensor.double), "weight of torch.float32|got torch.float64"),
    "parameter NaN": (with_parameter("weight", with_nan), "finite parameters|in weight|diverged"),
    "private per batch": ({"private": torch.tensor([0])}, "private of shape [2] and torch.int64|got [1]"),
    "private floats": ({"private": torch.zeros(2)}, "torch.int64|torch.float32"),
    "private too large": ({"private": torch.tensor([0, 3])}, "indices in [0, 3)|got [0, 3]"),
    "private negative": ({"private": torch.tensor([0, -1])}, "indices in [0, 3)|got [0, -1]"),
    "no memory": ({"memory_budget": 0}, "memory_budget > 0 bytes|got 0"),
    "mini-batch beyond the batch": (TRAINING, "3"),
}


def refused(match: str) -> Any:
    """Raises InvalidInputError with every part of `match`, which `|` separates."""
    parts = "".join(f"(?=.*{re.escape(part)})" for part in match.split("|"))
    return pytest.raises(InvalidInputError, match=f"(?s){parts}")


@pytest.mark.parametrize(("changes", "match"), JACOBIANS.values(), ids=JACOBIANS.keys())
def test_jacobian_refuses(changes: dict[str, Any], match: str) -> None:
    with refused(match):
        build(**changes)


def test_the_arguments_that_the_others_change_are_accepted() -> None:
    assert build().num_units == UNITS
    assert build(private=torch.tensor([0, 2])).input_dim == WIDTH


def test_errors_are_value_errors_and_the_packages_own() -> None:
    assert issubclass(InvalidInputError, ValueError)
    assert issubclass(InvalidInputError, FLPrivacyError)


@pytest.mark.parametrize("product", ["jvp", "vjp", "gram"])
def test_products_refuse_other_vectors(product: str) -> None:
    jacobian = build()
    dim = jacobian.update_dim if product == "vjp" else jacobian.input_dim
    apply = getattr(jacobian, product)
    with refused(f"shape [2, {dim}]|got [2, {dim + 1}]"):
        apply(torch.zeros(2, dim + 1))
    with refused(f"shape [2, {dim}]|got [{dim}]"):
        apply(torch.zeros(dim))
    with refused("torch.float32|got torch.float64"):
        apply(torch.zeros(2, dim, dtype=torch.float64))


SOLVERS: dict[str, Callable[[UpdateJacobian, Tensor], Any]] = {
    "influence": lambda jacobian, perturbation: influence(jacobian, perturbation, ridge=1.0),
    "lower bound": influence_lower_bound,
}


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS.keys())
def test_solvers_refuse_other_perturbations(solve: Callable[[UpdateJacobian, Tensor], Any]) -> None:
    jacobian = build()
    dim = jacobian.update_dim
    with refused(f"perturbation of shape [2, {dim}]|got [{dim}]"):
        solve(jacobian, torch.zeros(dim))
    with refused(f"[2, {dim}]|got [1, {dim}]"):
        solve(jacobian, torch.zeros(1, dim))
    with refused("torch.float32|got torch.float64"):
        solve(jacobian, torch.zeros(2, dim, dtype=torch.float64))
    spoilt = torch.zeros(2, dim)
    spoilt[1, 3] = torch.inf
    with refused("finite perturbation|units [1]"):
        solve(jacobian, spoilt)


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_influence_refuses_a_ridge_that_is_none(ridge: float) -> None:
    jacobian = build()
    with refused(f"ridge >= 0|got {ridge}"):
        influence(jacobian, torch.zeros(2, jacobian.update_dim), ridge=ridge)


def test_influence_refuses_ridges_of_other_units() -> None:
    jacobian = build()
    with refused("one per unit [2]|got shape [3]"):
        influence(jacobian, torch.zeros(2, jacobian.update_dim), ridge=torch.ones(3))


@pytest.mark.parametrize("solve", [influence, influence_lower_bound])
@pytest.mark.parametrize(("option", "value"), [("rtol", 0.0), ("rtol", float("nan")), ("max_steps", 0)])
def test_solvers_refuse_options_out_of_range(solve: Callable[..., Any], option: str, value: float) -> None:
    jacobian = build()
    options: dict[str, Any] = {option: value} | ({"ridge": 1.0} if solve is influence else {})
    with refused(option):
        solve(jacobian, torch.zeros(2, jacobian.update_dim), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_probes": 0}, "num_probes >= 1|got 0"),
        ({"max_steps": 0}, "max_steps >= 1|0"),
        ({"rtol": 0.0}, "rtol > 0|0.0"),
        ({"rtol": float("nan")}, "rtol > 0|nan"),
        ({"num_probes": 1, "max_steps": 2, "ridge": -1.0}, "ridge >= 0|-1.0"),
        ({"num_probes": 1, "max_steps": 2, "ridge": torch.ones(3)}, "one per unit [2]|[3]"),
    ],
)
def test_estimate_spectrum_refuses(options: dict[str, Any], match: str) -> None:
    with refused(match):
        estimate_spectrum(build(), **options)


def test_spectrum_refuses_numbers_out_of_range() -> None:
    spectrum = estimate_spectrum(build())
    with refused("prior_std > 0|got 0.0"):
        spectrum.leakage(1.0, 0.0)
    with refused("noise_std >= 0|got -1.0"):
        spectrum.leakage(-1.0, 1.0)
    with refused("noise_std|got nan"):
        spectrum.leakage(float("nan"), 1.0)
    with refused("noise_std as one number or one per unit [2]|[3]"):
        spectrum.leakage(torch.ones(3), 1.0)
    for target in (0.0, 1.0, -0.5, 2.0, float("nan")):
        with refused(f"strictly between 0 and 1|got {target}"):
            spectrum.required_noise_std(target, 1.0)


TRAININGS: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"steps": 0}, "at least one step|steps=0"),
    "no mini-batches": ({"steps": []}, "at least one step|steps=[]"),
    "empty mini-batch": ({"steps": [[0], []]}, "no empty mini-batch|[[0], []]"),
    "negative steps": ({"steps": -1}, "at least one step|steps=-1"),
    "rates": ({"lr": [0.1, 0.2, 0.3], "steps": 2}, "one per step (2)|got 3"),
    "negative lr": ({"lr": -0.1}, "lr >= 0|got -0.1"),
    "infinite lr": ({"lr": [0.1, float("inf")], "steps": 2}, "lr|got inf"),
    "lr NaN": ({"lr": [0.1, float("nan")], "steps": 2}, "lr|got nan"),
    "negative momentum": ({"momentum": -0.5}, "momentum >= 0|got -0.5"),
    "negative decay": ({"weight_decay": -0.5}, "weight_decay >= 0|got -0.5"),
    "infinite dampening": ({"dampening": float("inf"), "momentum": 0.5}, "dampening|inf"),
    "nesterov alone": ({"nesterov": True}, "momentum > 0 and dampening = 0"),
    "nesterov dampened": ({"nesterov": True, "momentum": 0.5, "dampening": 0.1}, "momentum > 0 and dampening = 0"),
    "batch norm": ({"batch_norm": "test"}, "'eval' or 'train'|got 'test'"),
    "input module": ({"input_module": "embedding"}, "name a submodule|got 'embedding'"),
}


@pytest.mark.parametrize(("options", "match"), TRAININGS.values(), ids=TRAININGS.keys())
def test_local_training_refuses(options: dict[str, Any], match: str) -> None:
    with refused(match):
        LocalTrainingUpdate(nn.Linear(WIDTH, 2), nn.CrossEntropyLoss(), **({"lr": 0.1, "steps": 1} | options))


def test_a_model_that_trains_nothing_is_refused() -> None:
    with refused("trainable parameters|Linear"):
        GradientUpdate(nn.Linear(2, 2).requires_grad_(False), nn.CrossEntropyLoss())


def test_a_loss_per_example_is_refused() -> None:
    with refused("one number|[3]|reduction='mean'"):
        build(update=GradientUpdate(nn.Linear(WIDTH, CLASSES), nn.CrossEntropyLoss(reduction="none")))


def test_a_loss_that_is_no_tensor_is_refused() -> None:
    with refused("one number as a tensor|float"):
        build(update=GradientUpdate(nn.Linear(WIDTH, CLASSES), lambda outputs, labels: 1.0))  # type: ignore[arg-type, return-value]


def test_inputs_that_the_model_cannot_take_are_named() -> None:
    with refused("the model and the loss can take|[3, 2]"):
        build(inputs=torch.zeros(2, 3, 2))
