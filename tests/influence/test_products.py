"""Every product of `UpdateJacobian` equals a dense Jacobian by `torch.func.jacrev`, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fl_privacy import LocalTrainingUpdate, UpdateJacobian, estimate_spectrum
from fl_privacy.errors import InvalidInputError

from .cases import (
    BY_NAME,
    CASES,
    LOCAL_TRAINING,
    Case,
    Sgd,
    audited,
    columns_of,
    gradient_update,
    parameters_of,
    reference,
)

UNITS = 2
PRIVATE = torch.tensor([2, 0])
ONE = Sgd(lr=0.3, steps=((0,), (0,), (0,)), momentum=0.5, dampening=0.2, weight_decay=0.1)
SETTINGS = [
    pytest.param(None, 1, None, id="gradient-batch-of-1"),
    pytest.param(None, 3, None, id="gradient-batch-of-3"),
    pytest.param(None, 3, PRIVATE, id="gradient-example-of-3"),
    pytest.param(ONE, 1, None, id="training-batch-of-1"),
    pytest.param(LOCAL_TRAINING, 3, None, id="training-batch-of-3"),
    pytest.param(LOCAL_TRAINING, 3, PRIVATE, id="training-example-of-3"),
]


def close(actual: Tensor, expected: Tensor, rtol: float) -> bool:
    """Whether each unit's vector is right to `rtol` of its norm."""
    error = torch.linalg.vector_norm(actual.double() - expected, dim=-1)
    return bool((error <= rtol * torch.linalg.vector_norm(expected, dim=-1)).all())


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(case: Case, sgd: Sgd | None, examples: int, private: Tensor | None, dtype: torch.dtype) -> UpdateJacobian:
    update = gradient_update(case, dtype) if sgd is None else sgd.update(case, case.model(dtype))
    inputs, labels = case.batch(UNITS, examples)
    return audited(update, inputs.to(dtype), labels.to(dtype) if case.regression else labels, private)


@pytest.mark.parametrize(("sgd", "examples", "private"), SETTINGS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_equal_the_dense_reference(case: Case, sgd: Sgd | None, examples: int, private: Tensor | None) -> None:
    check(case, sgd, examples, private, torch.float64, 1e-8)


@pytest.mark.parametrize(("sgd", "private"), [(None, PRIVATE), (LOCAL_TRAINING, None)], ids=["gradient", "training"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products_in_float32(case: Case, sgd: Sgd | None, private: Tensor | None) -> None:
    check(case, sgd, 3, private, torch.float32, 1e-3)


def check(case: Case, sgd: Sgd | None, examples: int, private: Tensor | None, dtype: torch.dtype, rtol: float) -> None:
    u, whole = reference(case.name, sgd, UNITS, examples)
    dense = columns_of(whole, private, examples)
    jacobian = built(case, sgd, examples, private, dtype)
    assert (jacobian.num_units, jacobian.update_dim, jacobian.input_dim) == dense.shape
    v, w = random(UNITS, dense.shape[2], seed=1), random(UNITS, dense.shape[1], seed=2)
    jv, jtw = torch.einsum("upd,ud->up", dense, v), torch.einsum("upd,up->ud", dense, w)
    gv = torch.einsum("upd,up->ud", dense, jv)
    assert close(jacobian.update(), u, rtol)
    assert close(jacobian.jvp(v.to(dtype)), jv, rtol)
    assert close(jacobian.vjp(w.to(dtype)), jtw, rtol)
    assert close(jacobian.gram(v.to(dtype)), gv, rtol)
    # Not implied by the tolerance above: the two products are each other's adjoint to rounding.
    gap = (jacobian.jvp(v.to(dtype)) * w).sum(-1) - (v * jacobian.vjp(w.to(dtype))).sum(-1)
    scale = torch.linalg.vector_norm(jv, dim=-1) * torch.linalg.vector_norm(w, dim=-1)
    assert (gap.abs() <= 100 * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("private", [None, PRIVATE], ids=["batch", "example"])
def test_weighted_rows_equal_the_dense_reference(private: Tensor | None) -> None:
    u, whole = reference("mlp", None, UNITS, 3)
    dense = columns_of(whole, private, 3)
    weights = random(*dense.shape[:2], seed=3) * (random(*dense.shape[:2], seed=4) > 0)  # half of the rows left out
    jacobian = built(BY_NAME["mlp"], None, 3, private, torch.float64).weighted(weights)
    dense = weights[:, :, None] * dense
    v, w = random(UNITS, dense.shape[2], seed=1), random(UNITS, dense.shape[1], seed=2)
    assert close(jacobian.update(), weights * u, 1e-8)
    assert close(jacobian.jvp(v), torch.einsum("upd,ud->up", dense, v), 1e-8)
    assert close(jacobian.vjp(w), torch.einsum("upd,up->ud", dense, w), 1e-8)
    gram = torch.einsum("upd,upe->ude", dense, dense)
    assert close(jacobian.gram(v), torch.einsum("ude,ue->ud", gram, v), 1e-8)
    second = jacobian.select(torch.tensor([1, 1]))
    assert close(second.gram(v), torch.einsum("de,ue->ud", gram[1], v), 1e-8)
    assert jacobian.to(torch.float32).jvp(v.float()).double() == pytest.approx(jacobian.jvp(v), rel=1e-2, abs=1e-4)
    spectrum = estimate_spectrum(jacobian, num_probes=4, max_steps=64)
    torch.testing.assert_close(spectrum.largest, torch.linalg.eigvalsh(gram)[:, -1], rtol=1e-8, atol=0)
    again = jacobian.weighted(weights)
    assert close(again.jvp(v), weights * torch.einsum("upd,ud->up", dense, v), 1e-8)
    for wrong in (weights[:1], weights.float(), weights / 0):
        with pytest.raises(InvalidInputError, match="expected finite weights"):
            jacobian.weighted(wrong)


OPTIMISERS = {
    "plain": Sgd(lr=0.2, steps=3),
    "decay": Sgd(lr=0.2, steps=3, weight_decay=0.1),
    "momentum": Sgd(lr=0.2, steps=4, momentum=0.9),
    "dampening": Sgd(lr=0.2, steps=4, momentum=0.9, dampening=0.4, weight_decay=0.1),
    "nesterov": Sgd(lr=0.2, steps=((0, 1), (2, 0), (0, 1, 2)), momentum=0.9, weight_decay=0.1, nesterov=True),
    "repeated": Sgd(lr=0.2, steps=((0, 0, 1), (2,)), momentum=0.9),
}


@pytest.mark.parametrize("sgd", OPTIMISERS.values(), ids=OPTIMISERS.keys())
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_local_training_is_what_torch_optim_does(name: str, sgd: Sgd) -> None:
    case = BY_NAME[name]
    model = case.model().eval()
    inputs, labels = case.batch(1, 3)
    trained = copy.deepcopy(model)
    optimiser = torch.optim.SGD(
        trained.parameters(),
        lr=sgd.lr,
        momentum=sgd.momentum,
        dampening=sgd.dampening,
        weight_decay=sgd.weight_decay,
        nesterov=sgd.nesterov,
    )
    for batch in sgd.batches(3):
        optimiser.zero_grad()
        torch.autograd.backward(case.loss(trained(inputs[0, batch]), labels[0, batch]))
        optimiser.step()
    change = torch.cat([(a - b).flatten() for a, b in zip(trained.parameters(), model.parameters(), strict=True)])
    jacobian = audited(sgd.update(case, model), inputs, labels, None)
    assert close(jacobian.update(), change.detach()[None], 1e-10)
    dense = reference(name, sgd, 1, 3)[1]
    v = random(1, jacobian.input_dim, seed=1)
    assert close(jacobian.gram(v), torch.einsum("upd,upe,ue->ud", dense, dense, v), 1e-8)


def test_learning_rate_may_change_from_step_to_step() -> None:
    case = BY_NAME["mlp"]
    model = case.model()
    inputs, labels = case.batch(1, 2)
    trained = copy.deepcopy(model)
    rates = (0.3, 0.1)
    for rate in rates:
        optimiser = torch.optim.SGD(trained.parameters(), lr=rate)
        optimiser.zero_grad()
        torch.autograd.backward(case.loss(trained(inputs[0]), labels[0]))
        optimiser.step()
    change = torch.cat([(a - b).flatten() for a, b in zip(trained.parameters(), model.parameters(), strict=True)])
    update = LocalTrainingUpdate(model, case.loss, lr=rates, steps=2)
    assert close(audited(update, inputs, labels, None).update(), change.detach()[None], 1e-10)


def test_called_as_a_function_an_update_map_names_its_parameters() -> None:
    case = BY_NAME["lenet"]
    model = case.model()
    inputs, labels = case.batch(1, 3)
    named = gradient_update(case)(parameters_of(model), inputs[0], labels[0])
    torch.autograd.backward(case.loss(model(inputs[0]), labels[0]))
    assert named.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(named[name], parameter.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("lanes", [0, 2], ids=["rebuilt-for-each-product", "two-at-a-time"])
@pytest.mark.parametrize("sgd", [None, LOCAL_TRAINING], ids=["gradient", "training"])
@pytest.mark.parametrize("name", ["mlp", "lenet", "text-transformer"])
def test_memory_budget_changes_no_number(name: str, sgd: Sgd | None, lanes: int) -> None:
    case = BY_NAME[name]
    update = gradient_update(case) if sgd is None else sgd.update(case, case.model())
    inputs, labels = case.batch(5, 3)
    params = parameters_of(update.model)
    roomy = UpdateJacobian(update, params, inputs, labels)
    tight = UpdateJacobian(update, params, inputs, labels, memory_budget=int((lanes + 0.5) * roomy.lane_bytes))
    assert (tight.lanes_per_pass, roomy.lanes_per_pass >= 5) == (max(1, lanes), True)
    v, w = random(5, roomy.input_dim, seed=1), random(5, roomy.update_dim, seed=2)
    assert close(tight.update(), roomy.update(), 1e-12)
    assert close(tight.jvp(v), roomy.jvp(v), 1e-12)
    assert close(tight.vjp(w), roomy.vjp(w), 1e-12)
    assert close(tight.gram(v), roomy.gram(v), 1e-12)


def test_graphs_of_several_passes_are_kept_where_they_fit() -> None:
    """More units than one pass takes: as fast as one pass, and no other numbers."""
    case = BY_NAME["linear"]
    update = gradient_update(case)
    inputs, labels = case.batch(150, 1)
    jacobian = audited(update, inputs, labels, None)
    assert jacobian.lanes_per_pass < 150
    v = random(150, jacobian.input_dim, seed=1)
    first = jacobian.gram(v)
    runs: list[int] = []
    update.model.register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(jacobian.gram(v), first)
    assert not runs
    expected = torch.cat([jacobian.select(part).gram(v[part]) for part in torch.arange(150).split(10)])
    assert close(first, expected, 1e-12)


@pytest.mark.parametrize("private", [None, torch.tensor([0, 1, 2])], ids=["batch", "example"])
@pytest.mark.parametrize("sgd", [None, LOCAL_TRAINING], ids=["gradient", "training"])
def test_select_takes_units_in_any_order_and_number(sgd: Sgd | None, private: Tensor | None) -> None:
    case = BY_NAME["mlp"]
    update = gradient_update(case) if sgd is None else sgd.update(case, case.model())
    inputs, labels = case.batch(3, 3)
    jacobian = audited(update, inputs, labels, private)
    v = random(3, jacobian.input_dim, seed=1)
    products = jacobian.gram(v)  # before and after: what was kept for three units must not serve four
    chosen = torch.tensor([2, 0, 2, 1])
    selected = jacobian.select(chosen)
    assert selected.num_units == 4
    assert close(selected.gram(v[chosen]), products[chosen], 1e-12)
    assert close(selected.update(), jacobian.update()[chosen], 1e-12)
    assert torch.equal(selected.private_inputs, jacobian.private_inputs[chosen])


def test_private_inputs_are_those_of_the_unit() -> None:
    case = BY_NAME["lenet"]
    inputs, labels = case.batch(2, 3)
    update = gradient_update(case)
    whole, single = audited(update, inputs, labels, None), audited(update, inputs, labels, PRIVATE)
    assert torch.equal(whole.private_inputs, inputs.flatten(1))
    assert torch.equal(single.private_inputs, torch.stack([inputs[0, 2], inputs[1, 0]]).flatten(1))


@pytest.mark.parametrize("name", ["mlp-mse", "resnet"])
def test_to_float64_of_a_float32_audit(name: str) -> None:
    case = BY_NAME[name]
    precise = built(case, None, 3, PRIVATE, torch.float32).to(torch.float64)
    dense = columns_of(reference(name, None, UNITS, 3)[1], PRIVATE, 3)
    v = random(UNITS, precise.input_dim, seed=1)
    # Inputs and parameters were rounded to float32 on the way; the product itself must not be.
    assert precise.dtype == torch.float64
    assert close(precise.gram(v), torch.einsum("upd,upe,ue->ud", dense, dense, v), 1e-4)
    w = precise.jvp(v)
    torch.testing.assert_close((v * precise.gram(v)).sum(-1), (w * w).sum(-1), rtol=1e-12, atol=0.0)


def test_every_unit_is_its_own_problem() -> None:
    case = BY_NAME["resnet"]
    update = gradient_update(case)
    inputs, labels = case.batch(3, 2)
    together = audited(update, inputs, labels, None)
    v = random(3, together.input_dim, seed=1)
    alone = [audited(update, inputs[i, None], labels[i, None], None).gram(v[i, None]) for i in range(3)]
    assert close(together.gram(v), torch.cat(alone), 1e-12)
