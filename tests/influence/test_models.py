"""Models that are awkward to audit: what the products of each are, and that none is changed by an audit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fl_privacy import GradientUpdate, UpdateJacobian, estimate_spectrum, influence, influence_lower_bound
from fl_privacy.errors import NotTwiceDifferentiableError

from .cases import BY_NAME, CLASSES, LOCAL_TRAINING, Case, Loss, Sgd, audited, columns_of, dense_jacobian, parameters_of

EXAMPLES = 3
PRIVATE = torch.tensor([1, 2])
UNITS_OF = pytest.mark.parametrize("private", [None, PRIVATE], ids=["batch", "example"])
UPDATES = pytest.mark.parametrize("sgd", [None, LOCAL_TRAINING], ids=["gradient", "training"])


def check(case: Case, model: nn.Module, sgd: Sgd | None, private: Tensor | None) -> None:
    """Products at two units of three examples equal those of the model's dense J."""
    inputs, labels = case.batch(2, EXAMPLES)
    update = sgd.update(case, model) if sgd else GradientUpdate(model, case.loss)
    compare(audited(update, inputs, labels, private), case, model, sgd, inputs, labels, private)


def compare(
    jacobian: UpdateJacobian,
    case: Case,
    plain: nn.Module,
    sgd: Sgd | None,
    inputs: Tensor,
    labels: Tensor,
    private: Tensor | None,
) -> None:
    rows = [dense_jacobian(case, copy.deepcopy(plain), sgd, x, y) for x, y in zip(inputs, labels, strict=True)]
    dense = columns_of(torch.stack(rows), private, inputs.shape[1])
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(len(dense), dense.shape[2], generator=generator, dtype=torch.float64)
    w = torch.randn(len(dense), dense.shape[1], generator=generator, dtype=torch.float64)
    scale = torch.linalg.matrix_norm(dense).max().item()
    assert scale > 0
    jv = torch.einsum("upd,ud->up", dense, v)
    torch.testing.assert_close(jacobian.jvp(v), jv, rtol=1e-8, atol=1e-9 * scale)
    torch.testing.assert_close(jacobian.vjp(w), torch.einsum("upd,up->ud", dense, w), rtol=1e-8, atol=1e-9 * scale)
    gv = torch.einsum("upd,up->ud", dense, jv)
    torch.testing.assert_close(jacobian.gram(v), gv, rtol=1e-8, atol=1e-9 * scale**2)


@UNITS_OF
def test_batch_norm_in_train_mode_uses_the_batch(private: Tensor | None) -> None:
    case = BY_NAME["resnet"]
    model = case.model()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # torch's own way to normalise by the batch, also in eval()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    inputs, labels = case.batch(2, EXAMPLES)
    jacobian = audited(GradientUpdate(model, case.loss, batch_norm="train"), inputs, labels, private)
    compare(jacobian, case, plain, None, inputs, labels, private)


def test_batch_norm_modes_differ() -> None:
    case = BY_NAME["resnet"]
    inputs, labels = case.batch(1, EXAMPLES)
    trained = audited(GradientUpdate(case.model(), case.loss, batch_norm="train"), inputs, labels, None)
    evaluated = audited(GradientUpdate(case.model(), case.loss), inputs, labels, None)
    assert not torch.allclose(trained.update(), evaluated.update(), rtol=0.1)


@UNITS_OF
@UPDATES
def test_frozen_parameters_are_no_part_of_the_update(sgd: Sgd | None, private: Tensor | None) -> None:
    case = BY_NAME["resnet"]
    model = case.model()
    for parameter in model[3].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inputs, labels = case.batch(2, EXAMPLES)
    assert audited(GradientUpdate(model, case.loss), inputs, labels, None).update_dim == trained
    check(case, model, sgd, private)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 5, bias=False)
        self.decoder = nn.Linear(5, 5)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.decoder(torch.tanh(self.encoder(x)))))
        return logits


@UPDATES
def test_tied_weights_are_one_parameter(sgd: Sgd | None) -> None:
    case = replace(BY_NAME["mlp"], name="tied", build=TiedAutoencoder)
    model = case.model()
    assert len(parameters_of(model)) == 4
    check(case, model, sgd, None)


class Branching(nn.Module):
    """Takes one of two ways, by its input: what `vmap` cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)
        self.ways: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        way = x.sum().item() > 0
        self.ways.add(way)
        logits: Tensor = self.first(torch.tanh(x)) if way else self.second(x**2)
        return logits


class PlainBranching(Branching):
    """The same function of x, without control flow."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.sum() > 0, self.first(torch.tanh(x)), self.second(x**2))


@UNITS_OF
@UPDATES
def test_control_flow_that_vmap_cannot_run(sgd: Sgd | None, private: Tensor | None) -> None:
    case = replace(BY_NAME["mlp"], name="branching", build=Branching)
    model = case.model()
    assert isinstance(model, Branching)
    plain = PlainBranching().double()
    plain.load_state_dict(model.state_dict())
    inputs, labels = case.batch(2, EXAMPLES)
    inputs = inputs.abs() * torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None, None]  # each unit its own way
    update = sgd.update(case, model) if sgd else GradientUpdate(model, case.loss)
    compare(audited(update, inputs, labels, private), case, plain, sgd, inputs, labels, private)
    assert model.ways == {True, False}


INTERACTING: dict[str, Loss] = {
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "centred": lambda outputs, labels: F.cross_entropy(outputs - outputs.mean(0), labels),
}


@pytest.mark.parametrize("loss", INTERACTING.values(), ids=INTERACTING.keys())
@UNITS_OF
def test_losses_that_are_no_mean_of_their_examples(loss: Loss, private: Tensor | None) -> None:
    case = replace(BY_NAME["mlp"], name="interacting", loss=loss)
    check(case, case.model(), None, private)


@UNITS_OF
def test_an_ignored_label_leaves_the_mean(private: Tensor | None) -> None:
    case = replace(BY_NAME["mlp"], loss=nn.CrossEntropyLoss(ignore_index=-100))
    model = case.model()
    inputs, labels = case.batch(2, EXAMPLES)
    labels[:, 0] = -100  # no example's private slot; the mean is over the other two
    jacobian = audited(GradientUpdate(model, case.loss), inputs, labels, private)
    compare(jacobian, case, model, None, inputs, labels, private)


def test_examples_that_do_not_interact_are_run_alone() -> None:
    """The private example alone is run, so that an audit of one of many costs no more than of one."""
    seen: list[int] = []
    case = BY_NAME["mlp"]
    model = case.model()
    inputs, labels = case.batch(1, 50)
    jacobian = audited(GradientUpdate(model, case.loss), inputs, labels, torch.tensor([7]))
    model[0].register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0]))  # type: ignore[index]
    jacobian.gram(torch.ones(1, 5, dtype=torch.float64))
    assert set(seen) == {1}


# What an audit leaves behind.

SWITCHES: dict[str, Callable[[], Any]] = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
    "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled,
    "fast path": torch.backends.mha.get_fastpath_enabled,
    "onednn": lambda: torch.backends.mkldnn.enabled,
    "cudnn": lambda: torch.backends.cudnn.enabled,
    "cudnn tf32": lambda: torch.backends.cudnn.allow_tf32,
    "grad": torch.is_grad_enabled,
    "random": lambda: torch.get_rng_state().tolist(),
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model, and about torch, that an audit might change."""
    state: dict[str, Any] = {f"switch {name}": read() for name, read in SWITCHES.items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"{name} data"] = tensor.detach().clone().numpy().tobytes()
        state[f"{name} identity"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor._version)
        state[f"{name} gradient"] = None if tensor.grad is None else tensor.grad.clone().numpy().tobytes()
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        state[f"{name} module"] = (module.training, [list(kind) for kind in hooks], sorted(vars(module)))
        if isinstance(module, nn.BatchNorm2d):
            state[f"{name} statistics"] = (id(module.running_mean), module.track_running_stats)
    return state


def lived_in(case: Case) -> nn.Module:
    """A model in the middle of someone's work: gradients, hooks, a frozen part, modules in both modes."""
    model = case.model()
    inputs, labels = case.batch(1, EXAMPLES)
    ids = torch.zeros(inputs.shape[1:3], dtype=torch.long)
    torch.autograd.backward(case.loss(model(ids if case.input_module else inputs[0]), labels[0]))
    modules = list(model.modules())
    for i, module in enumerate(modules):
        module.train(i % 2 == 0)
        module.register_forward_hook(lambda _m, _a, _o: None)
    next(model.parameters()).requires_grad_(False)
    return model


def audit(case: Case, model: nn.Module, sgd: Sgd | None, batch_norm: Any) -> None:
    inputs, labels = case.batch(2, EXAMPLES)
    update = (
        sgd.update(case, model)
        if sgd
        else GradientUpdate(model, case.loss, batch_norm=batch_norm, input_module=case.input_module)
    )
    jacobian = audited(update, inputs, labels, PRIVATE)
    perturbation = torch.ones(2, jacobian.update_dim, dtype=torch.float64)
    jacobian.update()
    influence(jacobian, perturbation, ridge=1.0, max_steps=3)
    influence_lower_bound(jacobian, perturbation, max_steps=3)
    estimate_spectrum(jacobian, num_probes=1, max_steps=3)


@pytest.mark.parametrize(
    ("name", "sgd", "batch_norm"),
    [
        ("resnet", None, "eval"),
        ("resnet", None, "train"),
        ("resnet", LOCAL_TRAINING, "eval"),
        ("vit-mha", None, "eval"),
        ("text-transformer", None, "eval"),
        ("text-lstm", LOCAL_TRAINING, "eval"),
    ],
)
def test_an_audit_changes_nothing(name: str, sgd: Sgd | None, batch_norm: str) -> None:
    case = BY_NAME[name]
    model = lived_in(case)
    before = snapshot(model)
    audit(case, model, sgd, batch_norm)
    assert snapshot(model) == before


class LossError(Exception):
    """Raised by a model's loss in the middle of an audit."""


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize(("name", "batch_norm"), [("resnet", "train"), ("text-lstm", "eval"), ("vit-mha", "eval")])
def test_an_audit_that_raises_changes_nothing(name: str, batch_norm: str, calls: int) -> None:
    left = [calls]

    def failing(loss: Loss, outputs: Tensor, labels: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise LossError
        return loss(outputs, labels)

    case = BY_NAME[name]
    case = replace(case, loss=functools.partial(failing, case.loss))
    left[0] = 1000
    model = lived_in(case)
    left[0] = calls
    before = snapshot(model)
    with pytest.raises(LossError):
        audit(case, model, LOCAL_TRAINING if name == "text-lstm" else None, batch_norm)
    assert snapshot(model) == before


def test_switches_the_user_has_off_stay_off() -> None:
    case = BY_NAME["vit-mha"]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        audit(case, case.model(), None, "eval")
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not SWITCHES["flash"]()
        assert SWITCHES["efficient"]()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.backends.cuda.enable_flash_sdp(True)


# Updates without second derivatives.


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 2 * x * grad_output


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.wrap, self.linear = wrap, nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.wrap(x))
        return logits


BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], Loss, str]] = {
    "once": (OnceDifferentiable.apply, nn.CrossEntropyLoss(), "once_differentiable: write"),
    "detach": (lambda x: x.detach().tanh(), nn.CrossEntropyLoss(), "constant in"),
    "argmax": (torch.tanh, lambda outputs, _labels: outputs.argmax(-1).double().mean(), "depends on neither"),
    "no_grad": (torch.tanh, torch.no_grad()(nn.CrossEntropyLoss()), "depends on neither"),
}


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize(("wrap", "loss", "match"), BROKEN.values(), ids=BROKEN.keys())
def test_updates_without_second_derivatives_are_refused(
    wrap: Callable[[Tensor], Tensor], loss: Loss, match: str, units: int
) -> None:
    case = BY_NAME["mlp"]
    inputs, labels = case.batch(units, 2)
    jacobian = audited(GradientUpdate(Wrapped(wrap).double(), loss), inputs, labels, None)
    with pytest.raises(NotTwiceDifferentiableError, match=match):
        jacobian.gram(torch.ones(units, 10, dtype=torch.float64))
