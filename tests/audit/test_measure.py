"""What an audit measures, against the engine and against a dense Jacobian, and what it does not credit."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev

from fl_privacy import LocalTrainingUpdate, UpdateJacobian, influence, influence_lower_bound
from fl_privacy.audit import Source, Status, TrainingTrace, measure
from fl_privacy.audit.measure import audit_tasks
from fl_privacy.audit.perturbation import noise_blocks

from .cases import (
    PRIOR,
    SIDE,
    examples,
    flat,
    new_context,
    new_model,
    new_task,
    noisy,
    one_step,
    params_of,
    scaled,
    train,
)

LR = 0.1
EXACT = {"precision": "float64", "solve_rtol": 1e-10, "replay_rtol": 1e-8}


def pruned(update, share=0.5):
    threshold = np.quantile(np.abs(flat(update)), share)
    return {name: np.where(np.abs(array) >= threshold, array, 0) for name, array in update.items()}


def noisy_where_not_zero(update, std):
    return {name: np.where(update[name] == 0, 0, array) for name, array in noisy(update, std).items()}


DEFENCES = {
    "none": lambda update: update,
    "clipping and noise": lambda update: noisy(scaled(update, 0.3), 3e-4),
}


def audit_one(model, task, **settings):
    (row,) = audit_tasks(new_context(model, **settings), params_of(model, task.inputs.dtype), [task])
    return row


def double_task(model, **options):
    return new_task(model, dtype=np.float64, **options)


def dense_jacobians(model, task):
    """J of each example of one step on the whole batch, float64, by `torch.func` alone."""
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    labels, inputs = torch.from_numpy(task.labels), torch.from_numpy(task.inputs)

    def update(example, index):
        batch = torch.cat([inputs[:index], example[None], inputs[index + 1 :]])
        loss = lambda p: nn.functional.cross_entropy(functional_call(model, p, (batch,)), labels)  # noqa: E731
        return torch.cat([-LR * g.flatten() for g in grad(loss)(parameters).values()])

    return [jacrev(lambda x, i=i: update(x, i))(inputs[i]).flatten(1) for i in range(len(inputs))]


class TestNumbers:
    @pytest.mark.parametrize("defence", DEFENCES)
    def test_they_are_those_of_a_dense_jacobian(self, defence):
        model = new_model()
        task = double_task(model, defend=DEFENCES[defence])
        row = audit_one(model, task, **EXACT)

        u, shared = flat(task.captured), flat(task.shared)
        scale = shared @ u / (u @ u)
        delta = torch.from_numpy(shared / scale - u)
        sigma = float(delta.norm()) / len(u) ** 0.5
        ridge = max((sigma / PRIOR) ** 2, 0.0)
        jacobians = dense_jacobians(model, task)
        spectra = [torch.linalg.svdvals(jacobian) ** 2 for jacobian in jacobians]
        leakages = [float((values / (values + ridge)).mean()) for values in spectra]
        if ridge < 1e-25:  # undefended: all that is determined leaks, of every example
            assert row.leakage.value == pytest.approx(1, abs=1e-6)
            assert row.noise_std < 1e-12
            return
        worst = int(np.argmax(leakages))
        pulled, values = jacobians[worst].T @ delta, spectra[worst]
        gram = jacobians[worst].T @ jacobians[worst]
        shift = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), pulled)
        bias = float((ridge**2 * PRIOR**2 / (values + ridge) ** 2).mean())

        assert (row.status, row.source, row.verified) == (Status.AUDITED, Source.TRUSTED, True)
        assert row.worst_example == worst
        assert row.worst_label == task.labels[worst]
        assert row.scale == pytest.approx(scale, rel=1e-8)
        assert row.noise_std == pytest.approx(sigma, rel=1e-6)
        assert row.ridge == pytest.approx(ridge, rel=1e-6)
        assert row.leakage.value == pytest.approx(leakages[worst], rel=1e-6)
        assert row.leakage.lower <= leakages[worst] <= row.leakage.upper
        assert row.leakage_mean == pytest.approx(np.mean(leakages), rel=1e-6)
        assert row.i2f == pytest.approx(float(shift.norm()), rel=1e-6)
        assert row.rmse == pytest.approx((float(shift.norm()) ** 2 / len(shift) + bias) ** 0.5, rel=1e-6)
        assert row.psnr == pytest.approx(20 * np.log10(2.0 / row.rmse))
        assert row.lower_bound == pytest.approx(float(pulled.norm() / values.max()), rel=1e-3)
        assert row.lower_bound <= row.i2f + float(shift.norm()) * 1e-3 or ridge > 0
        assert row.perturbation_norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert row.update_norm == pytest.approx(np.linalg.norm(u), rel=1e-9)
        assert row.cosine == pytest.approx(shared @ u / np.linalg.norm(u) / np.linalg.norm(shared), rel=1e-9)
        assert row.snr_db == pytest.approx(20 * np.log10(np.linalg.norm(u) / float(delta.norm())), rel=1e-6)
        assert (row.input_dim, row.update_dim, row.units_audited) == (16, len(u), 4)

    def test_how_much_more_an_update_changes_than_its_jacobian_says(self):
        model = new_model()
        task = double_task(model, defend=lambda update: noisy(update, 1e-2))
        row = audit_one(model, task, **EXACT)
        jacobian = dense_jacobians(model, task)[row.worst_example]
        values, vectors = torch.linalg.eigh(jacobian.T @ jacobian)
        z = torch.randn(1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        error = z @ vectors @ torch.diag((values + row.ridge).rsqrt()) @ vectors.T  # as the attacker's: (G + ε)^(−½)z
        a = row.rmse * error / error.square().mean().sqrt()
        moved = task.inputs.copy()
        moved[row.worst_example] += a.numpy().reshape(moved[0].shape)
        change = flat(train(model, moved, task.labels, task.trace)) - flat(task.captured)
        expected = np.linalg.norm(change) / float((jacobian @ a[0]).norm())
        assert row.change_ratio == pytest.approx(expected, rel=1e-6)
        assert (0.8 < row.change_ratio < 1.25, row.detail) == (True, "")

    def test_a_network_that_jumps_is_told(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
        )
        task = double_task(model, defend=lambda update: noisy(update, 1e-5))
        row = audit_one(model, task, **EXACT, relu_width=0.0)
        assert (row.status, row.change_ratio > 2) == (Status.AUDITED, True)
        assert f"changes {row.change_ratio:.2g} times as much as its Jacobian says" in row.detail
        smooth = audit_one(model, task, **EXACT)
        assert (smooth.detail, 0.5 < smooth.change_ratio < 2) == ("", True)
        assert smooth.leakage.value > row.leakage.value
        assert smooth.required_noise_std > row.required_noise_std

    def test_what_a_pruned_update_leaks_is_what_its_exact_entries_leak(self):
        model = new_model()
        task = double_task(model, defend=lambda update: scaled(pruned(update, 0.9), 0.3))
        row = audit_one(model, task, **EXACT)
        kept = torch.from_numpy(flat(task.shared) != 0)
        spectra = [torch.linalg.svdvals(jacobian[kept]) ** 2 for jacobian in dense_jacobians(model, task)]
        assert 16 <= kept.sum() < 0.12 * len(kept)
        # Without noise all that is determined leaks: every direction of an input, though 9 in 10 entries are gone.
        assert all((values > 1e-12 * values.max()).all() for values in spectra)
        assert row.leakage.value == pytest.approx(1, abs=1e-6)
        assert row.ridge == 0
        assert row.rmse < 1e-5
        assert row.noise_std > 1e-5  # taken for noise everywhere, what was cut off would look like protection
        assert "90% of the entries were zeroed" in row.detail
        assert "exact" in row.detail

    def test_noise_on_what_pruning_left_is_credited_as_a_dense_jacobian_does(self):
        model, std = new_model(), 1e-3
        task = double_task(model, defend=lambda update: noisy_where_not_zero(pruned(update), std))
        row = audit_one(model, task, **EXACT)
        u, shared = flat(task.captured), flat(task.shared)
        zero = shared == 0
        blocks = noise_blocks(*(torch.from_numpy(v)[None] for v in (shared, u)), [36, 4, 192, 3])
        sigma = blocks.std[0].numpy()
        rms = lambda part: np.sqrt(np.mean((shared - u)[part] ** 2))  # noqa: E731
        weight, bias = slice(40, 232), slice(0, 36)
        for part in (weight, bias):  # the convolution's 36 weights are pooled with the biases
            inside = np.zeros_like(zero)
            inside[part] = True
            if part is weight:
                assert sigma[inside & ~zero] == pytest.approx(rms(inside & ~zero), rel=0.1)
                assert sigma[inside & zero] == pytest.approx(rms(inside & zero), rel=0.1)
        ridge = (sigma.min() / PRIOR) ** 2
        leakages = []
        for jacobian in dense_jacobians(model, task):
            values = torch.linalg.svdvals(torch.from_numpy(sigma.min() / sigma)[:, None] * jacobian) ** 2
            leakages.append(float((values / (values + ridge)).mean()))
        assert row.leakage.value == pytest.approx(max(leakages), rel=1e-6)
        assert row.ridge == pytest.approx(ridge, rel=1e-6)

    def test_noise_on_one_layer_alone_protects_nothing_that_the_others_tell(self):
        model = new_model()

        def first_layer(update):
            return {name: array + (noisy(update, 1.0)[name] if name[0] == "0" else 0) for name, array in update.items()}

        row = audit_one(model, double_task(model, defend=first_layer), **EXACT)
        assert row.cosine < 0.3
        assert row.leakage.value == pytest.approx(1, abs=1e-6)
        assert "noise differs between layers" in row.detail

    def test_the_required_noise_is_what_the_neediest_example_needs(self):
        model = new_model()
        task = double_task(model)
        row = audit_one(model, task, target_leakage=0.4, **EXACT)
        spectra = [torch.linalg.svdvals(jacobian) ** 2 for jacobian in dense_jacobians(model, task)]
        at = [float((values / (values + row.required_noise_std**2 / PRIOR**2)).mean()) for values in spectra]
        assert max(at) == pytest.approx(0.4, rel=1e-6)
        assert row.required_noise_norm == pytest.approx(row.required_noise_std * row.update_dim**0.5)
        assert row.target_leakage == 0.4

    def test_the_curve_bounds_the_leakage_of_the_most_exposed_example_of_a_dense_jacobian(self):
        model = new_model()
        task = double_task(model)
        row = audit_one(model, task, target_leakage=0.4, **EXACT)
        spectra = [torch.linalg.svdvals(jacobian) ** 2 for jacobian in dense_jacobians(model, task)]
        at = [max(float((v / (v + (s / PRIOR) ** 2)).mean()) for v in spectra) for s in row.curve.noise_std]
        assert row.curve.value == pytest.approx(at, abs=2e-4)  # four digits of leakage and of noise
        assert np.all(np.array(row.curve.lower) - 2e-4 <= at)
        assert np.all(np.array(row.curve.upper) + 2e-4 >= at)
        assert (at[0], at[-1]) == pytest.approx((0.99, 0.01), abs=1e-3)
        assert np.interp(np.log(row.required_noise_std), np.log(row.curve.noise_std), at) == pytest.approx(
            0.4, abs=0.02
        )
        assert len(row.curve.noise_std) == 17

    def test_every_audited_example_is_listed_with_its_class_and_the_noise_it_needs(self):
        model = new_model()
        task = double_task(model, defend=DEFENCES["clipping and noise"])
        row = audit_one(model, task, **EXACT)
        spectra = [torch.linalg.svdvals(jacobian) ** 2 for jacobian in dense_jacobians(model, task)]
        assert sorted(example.index for example in row.examples) == [0, 1, 2, 3]
        assert row.examples[0].index == row.worst_example
        for example in row.examples:
            values = spectra[example.index]
            assert example.label == task.labels[example.index]
            assert example.leakage == pytest.approx(float((values / (values + row.ridge)).mean()), rel=1e-3)
            needed = float((values / (values + (example.required_noise_std / PRIOR) ** 2)).mean())
            assert needed == pytest.approx(row.target_leakage, rel=1e-3)

    @pytest.mark.parametrize("unit", ["example", "batch"])
    def test_several_steps_agree_with_the_engine(self, unit):
        model = new_model()
        trace = TrainingTrace(
            optimizer="SGD",
            batches=((0, 1), (2, 3), (1, 2)),
            lr=(0.1, 0.05, 0.2),
            momentum=0.9,
            weight_decay=0.01,
            nesterov=True,
        )
        task = double_task(model, trace=trace, defend=lambda update: noisy(update, 2e-3))
        row = audit_one(model, task, unit=unit, **EXACT)
        training = LocalTrainingUpdate(
            model,
            nn.CrossEntropyLoss(),
            lr=trace.lr,
            steps=trace.batches,
            momentum=0.9,
            weight_decay=0.01,
            nesterov=True,
        )
        theta = {name: p.detach().double() for name, p in model.named_parameters()}
        units = 4 if unit == "example" else 1
        inputs, labels = (torch.from_numpy(a).expand(units, *a.shape) for a in (task.inputs, task.labels))
        private = torch.arange(4) if unit == "example" else None
        jacobian = UpdateJacobian(training, theta, inputs, labels, private=private)
        u, shared = flat(task.captured), flat(task.shared)
        delta = torch.from_numpy(shared / (shared @ u / (u @ u)) - u).expand(units, -1).contiguous()
        solved = influence(jacobian, delta, ridge=row.ridge, rtol=1e-10)
        bound = influence_lower_bound(jacobian, delta)
        worst = row.worst_example if unit == "example" else 0
        assert row.status == Status.AUDITED
        assert row.replay_error < 1e-9
        assert row.i2f == pytest.approx(float(solved.norm[worst]), rel=1e-8)
        assert row.lower_bound == pytest.approx(float(bound[worst]), rel=1e-8)
        assert (row.unit, row.input_dim, row.units_audited) == (unit, 16 if unit == "example" else 64, units)
        assert (row.worst_example is None) == (row.worst_label is None) == (unit == "batch")

    def test_clipping_alone_protects_nobody(self):
        model = new_model()
        rows = [audit_one(model, double_task(model, defend=lambda u, f=f: scaled(u, f)), **EXACT) for f in (1.0, 0.3)]
        assert [row.scale for row in rows] == pytest.approx([1.0, 0.3])
        for row in rows:
            assert row.leakage.value == pytest.approx(1, abs=1e-6)
            assert row.noise_std < 1e-12

    @pytest.mark.parametrize("target", [0.8, 0.5, 0.2])
    @pytest.mark.parametrize("client", [0, 1])
    def test_noise_of_the_required_strength_brings_leakage_to_the_target(self, client, target):
        # A wide model and a batch of some size: noise blurs the scale of an update by σ/‖u‖, which falls with them.
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 3))
        settings = {"target_leakage": target, "precision": "float64", "max_examples": 4}

        def audited(noise_std):
            defend = lambda update: noisy(update, noise_std, seed=client)  # noqa: E731
            return audit_one(model, double_task(model, client=client, count=64, defend=defend), **settings)

        needed = audited(0.0).required_noise_std
        assert audited(needed).noise_std == pytest.approx(needed, rel=0.05)
        assert audited(needed).leakage.value == pytest.approx(target, abs=0.04)
        assert audited(needed / 2).leakage.value > target + 0.05

    def test_an_update_that_noise_has_drowned_leaks_nothing(self):
        model = new_model()
        row = audit_one(model, double_task(model, defend=lambda update: noisy(update, 1.0)))
        assert row.status == Status.AUDITED
        assert row.leakage.value < 0.1

    def test_an_explicit_ridge_is_used_as_it_is(self):
        model = new_model()
        row = audit_one(model, double_task(model, defend=lambda update: noisy(update, 1e-3)), ridge=1.0, **EXACT)
        assert row.ridge == 1.0
        assert row.noise_std == pytest.approx(1e-3, rel=0.2)

    @pytest.mark.parametrize("defence", DEFENCES)
    def test_single_precision_agrees_with_double(self, defence):
        model = new_model()
        rows = [
            audit_one(model, new_task(model, dtype=dtype, defend=DEFENCES[defence]), precision=precision)
            for dtype, precision in ((np.float32, "float32"), (np.float64, "float64"))
        ]
        assert [row.dtype for row in rows] == ["float32", "float64"]
        assert rows[0].leakage.lower <= rows[1].leakage.value <= rows[0].leakage.upper + 1e-3
        if defence != "none":
            assert rows[0].leakage.value == pytest.approx(rows[1].leakage.value, rel=1e-2)
            assert rows[0].i2f == pytest.approx(rows[1].i2f, rel=5e-2)


class TestVerification:
    def dropout_task(self, **options):
        model = new_model(dropout=0.5)
        torch.manual_seed(1)
        return model, new_task(model, **options)

    def assert_unverified(self, row):
        assert (row.status, row.verified) == (Status.UNVERIFIED, False)
        assert row.leakage is not None

    def test_dropout_cannot_be_reproduced_and_what_was_captured_is_the_reference(self):
        model, task = self.dropout_task()
        row = audit_one(model, task)
        self.assert_unverified(row)
        assert row.replay_error > 0.1
        assert row.noise_std == pytest.approx(0, abs=1e-9)
        assert row.leakage.upper > 0.99
        assert "not reproduced" in row.detail

    def test_no_noise_is_credited_where_the_replay_differs_from_what_was_captured(self):
        model, task = self.dropout_task(defend=lambda update: noisy(update, 2e-3))
        row = audit_one(model, task)
        self.assert_unverified(row)
        assert row.noise_std == 0
        assert row.leakage.upper > 0.99
        assert row.perturbation_norm > 0

    def test_nothing_is_credited_where_nothing_was_captured_and_the_replay_differs(self):
        model = new_model()
        task = new_task(model, defend=lambda update: noisy(update, 1e-2), captured=False)
        row = audit_one(model, task)
        self.assert_unverified(row)
        assert (row.noise_std, row.replay_error) == (0.0, None)
        assert row.leakage.upper > 0.99
        assert row.perturbation_norm > 0

    def test_an_undefended_update_needs_no_capture(self):
        row = audit_one(new_model(), new_task(new_model(), captured=False))
        assert (row.status, row.verified) == (Status.AUDITED, True)

    def test_a_batch_that_is_not_the_one_it_was_trained_on(self):
        model = new_model()
        task = new_task(model)
        other, _ = examples(99, 4)
        row = audit_one(model, replace(task, inputs=other))
        self.assert_unverified(row)
        assert row.replay_error > 0.1
        assert row.noise_std == pytest.approx(0, abs=1e-9)

    def test_a_captured_update_that_was_made_up_to_look_like_much_noise(self):
        model = new_model()
        task = new_task(model)
        row = audit_one(model, replace(task, captured=noisy(task.captured, 1e-2)))
        self.assert_unverified(row)
        assert row.noise_std == 0
        assert row.leakage.value > 0.99

    def test_an_optimiser_that_is_not_replayed_stands_in_for_a_gradient_step(self):
        model = new_model()
        inputs, labels = examples(0, 4)
        update = train(model, inputs, labels, one_step(4), optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
        trace = TrainingTrace(optimizer="Adam", batches=(), lr=(), problem="only torch.optim.SGD is replayed")
        row = audit_one(model, replace(new_task(model), shared=update, captured=update))
        self.assert_unverified(row)  # a client that says SGD, and is none
        row = audit_one(model, replace(new_task(model), shared=update, captured=update, trace=trace))
        self.assert_unverified(row)
        assert row.detail == "only torch.optim.SGD is replayed"
        assert row.leakage.upper > 0.99
        assert row.required_noise_std > 0


class TestBatchNorm:
    def test_the_mode_is_the_one_in_which_the_client_trained(self):
        model = new_model(batch_norm=True)
        assert audit_one(model, new_task(model)).batch_norm == "train"
        evaluated = copy.deepcopy(model).eval()
        inputs, labels = examples(0, 4)
        frozen = copy.deepcopy(evaluated)
        frozen.train = lambda mode=True: frozen  # local training that leaves the statistics as they are
        row = audit_one(model, replace(new_task(model), **self.updates(frozen, inputs, labels)))
        assert (row.batch_norm, row.status) == ("eval", Status.AUDITED)

    def updates(self, model, inputs, labels):
        net = copy.deepcopy(model).eval()
        initial = {name: p.detach().clone() for name, p in net.named_parameters()}
        nn.functional.cross_entropy(net(torch.from_numpy(inputs)), torch.from_numpy(labels)).backward()
        update = {name: (-LR * p.grad).numpy() for name, p in net.named_parameters()}
        assert set(update) == set(initial)
        return {"shared": update, "captured": update}

    def test_a_mode_that_is_told_is_kept_though_it_does_not_fit(self):
        model = new_model(batch_norm=True)
        row = audit_one(model, new_task(model), batch_norm="eval")
        assert (row.batch_norm, row.status) == ("eval", Status.UNVERIFIED)

    def test_running_statistics_come_from_the_round_not_from_the_model_at_hand(self):
        model = new_model(batch_norm=True)
        trained_on = copy.deepcopy(model)
        trained_on[1].running_mean += 0.5
        trained_on[1].running_var *= 3
        inputs, labels = examples(0, 4)
        task = replace(new_task(model), **self.updates(trained_on, inputs, labels))
        (row,) = audit_tasks(new_context(model), params_of(trained_on), [task])
        assert (row.batch_norm, row.status) == ("eval", Status.AUDITED)


class TestGroups:
    def test_a_vectorised_pass_gives_what_one_client_at_a_time_gives(self):
        model = new_model()
        tasks = [double_task(model, client=c, defend=lambda u, c=c: noisy(u, 1e-3 * c, seed=c)) for c in range(1, 5)]
        tasks.append(double_task(model, client=9, count=3, defend=lambda update: noisy(update, 1e-3)))
        context, params = new_context(model, **EXACT), params_of(model, np.float64)
        together = audit_tasks(context, params, tasks)
        alone = [audit_tasks(context, params, [task])[0] for task in tasks]
        assert [row.client for row in together] == ["1", "2", "3", "4", "9"]
        for ours, theirs in zip(together, alone, strict=True):
            for name in ("leakage_mean", "rmse", "i2f", "lower_bound", "required_noise_std", "noise_std", "psnr"):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-8), name
            assert tuple(ours.leakage) == pytest.approx(tuple(theirs.leakage), rel=1e-8)
            assert (ours.worst_example, ours.status, ours.products) == (
                theirs.worst_example,
                theirs.status,
                theirs.products,
            )

    def test_a_task_that_cannot_be_audited_fails_alone(self):
        model = new_model()
        tasks = [new_task(model, client=c) for c in range(3)]
        tasks[1] = replace(tasks[1], labels=tasks[1].labels + 10)
        rows = audit_tasks(new_context(model), params_of(model), tasks)
        assert [row.status for row in rows] == [Status.AUDITED, Status.AUDIT_FAILED, Status.AUDITED]
        assert "labels in [0, 3)" in rows[1].detail
        assert rows[1].settings
        assert rows[1].versions == {"x": "1"}

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_inputs_that_are_no_numbers_fail_alone(self, value):
        model = new_model()
        good, bad = new_task(model, client=0), new_task(model, client=1)
        inputs = bad.inputs.copy()
        inputs[0, 0, 0, 0] = value
        rows = audit_tasks(new_context(model), params_of(model), [replace(bad, inputs=inputs), good])
        assert [row.status for row in rows] == [Status.AUDIT_FAILED, Status.AUDITED]

    def test_an_update_of_zeros_and_one_of_a_client_that_shared_nothing(self):
        model = new_model()
        nothing = new_task(model, defend=lambda update: scaled(update, 0.0))
        (row,) = audit_tasks(new_context(model), params_of(model), [nothing])
        assert row.status == Status.AUDITED
        assert np.isfinite([row.leakage.value, row.i2f, row.rmse, row.scale]).all()
        assert row.leakage.value < 1


class TestChoiceOfExamples:
    def chosen(self, **changes):
        model = new_model()
        fields = {"client": "0", "server_round": 1, **changes}
        seed = fields.pop("seed", 0)
        row = audit_one(model, replace(new_task(model, count=12), **fields), max_examples=1, seed=seed)
        assert row.units_audited == 1
        return row.worst_example

    def test_it_depends_on_seed_client_and_round_and_nothing_else(self):
        assert self.chosen() == self.chosen()
        assert len({self.chosen(client=str(c)) for c in range(8)}) > 1
        assert len({self.chosen(server_round=r) for r in range(8)}) > 1
        assert len({self.chosen(seed=s) for s in range(8)}) > 1

    def test_all_are_taken_where_there_are_few(self):
        row = audit_one(new_model(), new_task(new_model(), count=3), max_examples=8)
        assert row.units_audited == 3


class TestDeadline:
    """The clock ticks once each time it is looked at: before each product, never by the wall."""

    def audited(self, monkeypatch, deadline, **settings):
        model, clock = new_model(), itertools.count(1)
        monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
        tasks = [new_task(model, client=client, count=2) for client in range(2)]
        rows = audit_tasks(new_context(model, **settings), params_of(model), tasks, deadline=deadline)
        return rows, next(clock) - 1

    def test_it_stops_before_the_product_that_would_be_late(self, monkeypatch):
        rows, looked = self.audited(monkeypatch, 5)
        assert [(row.status, row.detail, row.leakage) for row in rows] == [
            (Status.LATE, "not audited within the time limit", None)
        ] * 2
        assert looked == 5

    def test_a_deadline_that_is_kept_changes_nothing(self, monkeypatch):
        rows, looked = self.audited(monkeypatch, 10**6)
        assert {row.status for row in rows} == {Status.AUDITED}
        assert looked > 5

    def test_a_long_training_is_stopped_between_its_steps(self, monkeypatch):
        model, clock = new_model(), itertools.count(1)
        monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
        trace = TrainingTrace(optimizer="SGD", batches=((0, 1),) * 40, lr=(LR,) * 40)
        (row,) = audit_tasks(new_context(model), params_of(model), [new_task(model, count=2, trace=trace)], deadline=20)
        assert (row.status, next(clock)) == (Status.LATE, 21)

    def test_the_examples_of_a_large_batch_are_looked_at_one_by_one_and_so_is_the_time(self, monkeypatch):
        model, clock = new_model(), itertools.count(1)
        monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
        (row,) = audit_tasks(new_context(model), params_of(model), [new_task(model, count=64)], deadline=20)
        assert (row.status, next(clock)) == (Status.LATE, 21)

    def test_what_float32_knew_is_kept_where_float64_would_be_late(self, monkeypatch):
        monkeypatch.setattr("fl_privacy.audit.exposure._WIDE", -1.0)  # float32 is never good enough at this ridge
        defaults = {"precision": "auto", "ridge": 1e-30}
        _, in_float32 = self.audited(monkeypatch, 10**6, **{**defaults, "precision": "float32"})
        _, in_both = self.audited(monkeypatch, 10**6, **defaults)
        assert in_both > in_float32
        rows, _ = self.audited(monkeypatch, in_float32 + 2, **defaults)
        assert {row.dtype for row in rows} == {"float32"}
        assert all(row.leakage is not None for row in rows)


LARGE_REPORT = """
import resource, sys
import numpy as np
from tests.audit.cases import CLASSES, SIDE, new_context, new_model, params_of
from fl_privacy.audit import TrainingTrace
from fl_privacy.audit.measure import audit_tasks
from fl_privacy.audit.task import AuditTask, Source

model, count = new_model(), int(sys.argv[1])
context = new_context(model, memory_budget=64 * 2**20)
ones = {name: np.ones_like(array) for name, array in params_of(model).items()}


def audited(count):
    inputs, labels = np.zeros((count, 1, SIDE, SIDE), np.float32), np.zeros(count, np.int64)
    trace = TrainingTrace(optimizer="Adam", batches=(), lr=(), problem="only torch.optim.SGD is replayed")
    task = AuditTask(
        server_round=1, client="c", node_id=1, shared=ones, inputs=inputs, labels=labels, trace=trace, captured=ones
    )
    (row,) = audit_tasks(context, params_of(model), [task])
    return row


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


assert audited(4).leakage is not None
before = peak()
row = audited(count)
print(row.status, peak() - before, row.detail)
"""


class TestMemory:
    def test_a_report_that_would_take_more_than_the_budget_is_refused_before_it_does(self):
        """One process for it: the most that a process ever took is never less again."""
        count = 500_000
        run = subprocess.run(
            [sys.executable, "-c", LARGE_REPORT, str(count)], capture_output=True, text=True, check=False, timeout=120
        )
        assert run.returncode == 0, run.stderr
        status, taken, detail = run.stdout.split(maxsplit=2)
        report = count * (4 * SIDE**2 + 8) / 2**20
        assert status == "audit-failed"
        assert float(taken) < 6 * report, "a gradient of all its examples takes some fifty times as much"
        assert detail.startswith("expected a replay within 64 MiB, and 1 steps on up to 500000 of 500000 examples take")
        assert "raise AuditSettings(memory_budget=...)" in detail

    def test_so_is_a_step_that_names_its_examples_again_and_a_training_that_keeps_too_many_parameters(self):
        model = new_model()
        again = TrainingTrace(optimizer="SGD", batches=(tuple(range(8)) * 8,), lr=(LR,))
        long = TrainingTrace(optimizer="SGD", batches=((0,),) * 200, lr=(LR,) * 200)
        for trace, budget in ((again, 50_000), (long, 150_000)):
            task = new_task(model, count=8, trace=trace)
            assert audit_one(model, task, memory_budget=2**30).status is Status.AUDITED
            row = audit_one(model, task, memory_budget=budget)
            assert (row.status, row.detail[:24]) == (Status.AUDIT_FAILED, "expected a replay within")

    def test_clients_that_fit_only_one_by_one_are_audited_one_by_one(self):
        model = new_model()
        tasks = [new_task(model, client=client, count=64) for client in range(4)]
        alone = [audit_one(model, task, memory_budget=2**30) for task in tasks]
        needed = 64 * SIDE**2 * 4 * 4 * (2 + 8)  # of all four, in copies
        together = audit_tasks(new_context(model, memory_budget=needed), params_of(model), tasks)
        assert [row.status for row in together] == [Status.AUDITED] * 4
        assert [row.leakage for row in together] == [pytest.approx(row.leakage, rel=1e-3) for row in alone]
