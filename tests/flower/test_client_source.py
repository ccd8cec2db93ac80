"""Audits on the client: what leaves, what does not, what the server makes of it, and what the client may say."""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.clientapp.mod import LocalDpMod
from flwr.common.serde import recorddict_to_proto
from torch import nn
from torch.func import functional_call, grad, jacrev

from fl_privacy import Interval
from fl_privacy.audit import AuditSettings, LeakageEstimate, Source, Status, measure, self_audit
from fl_privacy.audit.perturbation import observed_perturbation
from fl_privacy.errors import InvalidInputError, RecordError
from fl_privacy.flower import InversionAuditMod, record_batches
from fl_privacy.flower.disclosure import Disclosure
from fl_privacy.flower.options import ClientOptions
from fl_privacy.flower.records import REPORT_KEY, decode_report
from fl_privacy.flower.request import SETTINGS_KEY, Request
from fl_privacy.strategies import InversionAudit

from .cases import LocalGrid, audited_app, batches_of, new_app, new_context, new_model, report_of, step, train_message
from .test_strategy import GOOD, ODD, audit, editing, fed_avg, grid_of, row_of, run

LOSS = nn.CrossEntropyLoss()
SETTINGS = AuditSettings(max_examples=2, prior_std=1.0, data_range=4.0)


def mod(**options):
    defaults = {"model": lambda context: new_model(), "loss": LOSS}
    return InversionAuditMod(**{**defaults, **options})


def asked(settings=SETTINGS):
    """A training message that asks for an estimate."""
    return train_message(request="estimate", **{SETTINGS_KEY: Request.for_estimate(settings).settings})


def report_from(app, settings=SETTINGS, context=None):
    return report_of(app(asked(settings), context or new_context(2)))


def client_audit(inner=None, **options):
    return audit(inner, **{"source": "client", "settings": SETTINGS, **options})


class TestTheEstimate:
    def test_it_is_the_row_that_a_trusted_audit_gives_of_the_same_update(self):
        trusted = audit(settings=SETTINGS)
        run(trusted, grid_of())
        own = client_audit()
        run(own, LocalGrid({node: new_app(mod()) for node in GOOD}))
        for node in GOOD:
            ours, theirs = row_of(own, node), row_of(trusted, node)
            assert (ours.source, ours.status, ours.action) == (Source.CLIENT, Status.AUDITED, "passed")
            assert (ours.units_audited, ours.update_dim, ours.input_dim) == (2, theirs.update_dim, theirs.input_dim)
            assert ours.verified
            # Which two of the four examples are audited is the client's own choice: it knows no round number.
            assert ours.leakage.value == pytest.approx(theirs.leakage.value, abs=0.02)
            assert ours.required_noise_std == pytest.approx(theirs.required_noise_std, rel=1.0)
            assert ours.detail == ""

    def test_with_every_example_audited_the_numbers_are_the_same_but_for_their_digits(self):
        settings = AuditSettings(max_examples=8, prior_std=1.0, data_range=4.0)
        trusted, own = audit(settings=settings), client_audit(settings=settings)
        run(trusted, grid_of())
        run(own, LocalGrid({node: new_app(mod()) for node in GOOD}))
        for node in GOOD:
            ours, theirs = row_of(own, node), row_of(trusted, node)
            for name in ("rmse", "i2f", "required_noise_std", "lower_bound", "required_noise_norm"):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=0.01, abs=1e-5), name
            assert ours.leakage.lower <= theirs.leakage.lower
            assert ours.leakage.upper >= theirs.leakage.upper
            assert ours.required_noise_std >= theirs.required_noise_std

    def test_first_in_the_list_it_credits_the_noise_that_another_mod_adds(self):
        noise = 0.05
        dp = LocalDpMod(10.0, 10.0, 10.0 * math.sqrt(2 * math.log(1.25 / 1e-5)) / noise, 1e-5)
        np.random.seed(0)
        estimate = report_from(new_app(mod(), dp)).estimate
        assert estimate.noise_std == pytest.approx(noise, rel=0.1)
        assert estimate.leakage.upper < 0.9

    def test_what_changes_the_update_after_the_audit_is_not_credited_and_the_row_says_so(self):
        np.random.seed(0)
        dp = LocalDpMod(10.0, 10.0, 10.0 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.05, 1e-5)
        strategy = client_audit()
        run(strategy, LocalGrid({ODD: new_app(dp, mod()), GOOD[0]: new_app(mod())}))
        row = row_of(strategy)
        assert row.noise_std < 1e-5
        assert row.leakage.value > 0.99
        assert (row.status, row.leakage.upper) == (Status.UNVERIFIED, 1.0)
        assert "nothing that it found is credited" in row.detail
        assert row_of(strategy, GOOD[0]).detail == ""

    def test_training_that_cannot_be_replayed_is_unverified_and_why_stays_on_the_client(self):
        def adam(model, batches):
            optimizer = torch.optim.Adam(model.parameters())
            for batch in record_batches(batches):
                step(model, optimizer, batch)

        strategy = client_audit()
        run(strategy, LocalGrid({ODD: new_app(mod(), train=adam)}))
        row = row_of(strategy)
        assert (row.status, row.verified, row.noise_std) == (Status.UNVERIFIED, False, 0)
        assert row.detail == "the client could not reproduce its own local training; its log says why"

    def test_the_model_may_be_a_module_a_class_or_a_function_of_the_context(self):
        class Net(nn.Sequential):
            def __init__(self):
                super().__init__(*new_model())

        for model in (new_model(), Net, lambda context: new_model(seed=context.node_id)):
            assert report_from(new_app(mod(model=model))).estimate.status is Status.AUDITED

    def test_prior_and_range_are_the_clients_own_and_stay_the_same_over_rounds(self):
        context, counter = new_context(2), itertools.count()

        def other_batches_each_round(model, batches):
            factor = 2.0 ** next(counter)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for inputs, labels in record_batches([(factor * x, y) for x, y in batches]):
                step(model, optimizer, (inputs, labels))

        app = new_app(mod(), train=other_batches_each_round)
        first, second = (report_from(app, AuditSettings(), context).estimate for _ in range(2))
        assert first.prior_std == pytest.approx(float(batches_of(2)[0][0].std(correction=0)), rel=0.01)
        assert second.prior_std == first.prior_std
        assert report_from(app, AuditSettings(prior_std=0.25), context).estimate.prior_std == 0.25


class TestBudget:
    def audited(self, monkeypatch, ticks, **options):
        """Runs with a clock that ticks a second whenever it is looked at."""
        clock = itertools.count()
        monkeypatch.setattr(measure.time, "monotonic", lambda: float(next(clock)))  # every module's: it is one `time`
        return report_from(new_app(mod(time_limit=ticks, **options)), AuditSettings(prior_std=1.0, data_range=4.0))

    def test_a_client_audits_as_many_examples_as_its_time_allows(self, monkeypatch):
        assert self.audited(monkeypatch, 1e6).estimate.units_audited == 4
        assert self.audited(monkeypatch, 110.0).estimate.units_audited in (1, 2, 3)

    def test_an_audit_that_takes_longer_than_the_limit_is_late(self, monkeypatch):
        estimate = self.audited(monkeypatch, 10.0).estimate
        assert (estimate.status, estimate.leakage) == (Status.LATE, None)

    def test_a_late_client_is_a_row_of_its_own(self, monkeypatch):
        strategy = client_audit(on_audit_failure="exclude")
        run(strategy, LocalGrid({ODD: new_app(mod(time_limit=1e-9)), GOOD[0]: new_app(mod())}))
        row = row_of(strategy)
        assert (row.status, row.source, row.leakage, row.action) == (Status.LATE, Source.CLIENT, None, "excluded")

    def test_neither_side_can_have_more_examples_audited_than_the_other_says(self):
        assert report_from(new_app(mod(max_examples=1))).estimate.units_audited == 1
        wish = AuditSettings(max_examples=3, prior_std=1.0, data_range=1.0)
        assert report_from(new_app(mod(max_examples=100)), wish).estimate.units_audited == 3

    def test_memory_is_bounded_by_the_client(self, monkeypatch):
        seen = []
        real = self_audit.Auditor

        def watching(*args, settings, **options):
            seen.append(settings.memory_budget)
            return real(*args, settings=settings, **options)

        monkeypatch.setattr(self_audit, "Auditor", watching)
        report_from(new_app(mod(memory_budget=12345678)))
        assert set(seen) == {12345678}


SCALARS = {
    "status", "shared_norm", "unit", "dtype", "batch_norm", "leakage", "psnr", "verified", "converged",
    "units_audited", "input_dim", "update_dim", "products", "leakage_mean", "rmse", "i2f", "lower_bound", "noise_std",
    "prior_std", "ridge", "target_leakage", "required_noise_std", "residual", "replay_error", "change_ratio", "seconds",
}  # fmt: skip


class TestWhatLeaves:
    """The message, attacked."""

    def test_it_holds_these_scalars_and_nothing_else(self):
        reply = new_app(mod())(asked(), new_context(2))
        record = reply.content[REPORT_KEY]
        assert set(record) == {"head"}
        head = json.loads(record["head"])
        assert {name for name, value in head.items() if value} == {"version", "client", "estimate"}
        assert set(head["estimate"]) == SCALARS
        for name, value in head["estimate"].items():
            values = value if name == "leakage" else [value]
            assert all(isinstance(v, str | bool | int | float) for v in values)
            floats = [v for v in values if isinstance(v, float)]
            assert all(float(f"{v:.3g}") == v for v in floats if name != "seconds"), name

    def test_it_is_smaller_than_one_example_could_be(self):
        reply = new_app(mod())(asked(), new_context(2))
        assert len(reply.content[REPORT_KEY]["head"]) < 1000

    def test_no_value_of_the_batch_or_of_the_undefended_update_is_in_its_bytes(self):
        reply = new_app(mod())(asked(), new_context(2))
        data = recorddict_to_proto(type(reply.content)({REPORT_KEY: reply.content[REPORT_KEY]})).SerializeToString()
        inputs, _ = batches_of(2)[0]
        handed_over = report_of(audited_app()(train_message(), new_context(2)))
        private = [inputs.numpy(), *handed_over.captured.values()]
        for array in private:
            for dtype in (np.float16, np.float32, np.float64):
                for value in array.astype(dtype).ravel():
                    assert value.tobytes() not in data
                    assert f"{value:.5f}".encode() not in data

    def test_the_most_exposed_example_is_told_only_where_the_client_allows_it(self):
        assert report_from(new_app(mod())).estimate.worst_label is None
        estimate = report_from(new_app(mod(reveal_worst=True))).estimate
        assert estimate.worst_label == batches_of(2)[0][1][estimate.worst_example]

    def test_an_error_does_not_take_data_with_it(self):
        def broken(outputs, labels):
            raise RuntimeError(f"cannot handle {labels.tolist()}")

        report = report_from(new_app(mod(loss=broken)))
        assert (report.estimate.status, report.estimate.leakage) == (Status.AUDIT_FAILED, None)
        assert set(report.estimate.to_dict()) == {"status", "shared_norm", "unit", "dtype", "batch_norm"}

        def no_model(context):
            raise RuntimeError("the patient's name is in this text")

        report = report_from(new_app(mod(model=no_model)))
        assert report.refused == "the client could not make its report: RuntimeError"

    def test_a_regression_over_many_clients_learns_inputs_from_updates_and_nothing_from_estimates(self):
        """An attacker who trains on clients whose data he knows, and applies it to others."""
        inputs, updates, estimates = zip(*(self.observed(client) for client in range(60)), strict=True)
        inputs = np.stack(inputs)
        assert held_out_r2(np.stack(updates), inputs) > 0.5
        assert held_out_r2(np.stack(estimates), inputs) < 0.1

    def observed(self, client):
        context = new_context(client)
        model = linear_model()
        message = asked(AuditSettings(prior_std=1.0, data_range=4.0))
        message.content["arrays"] = type(message.content["arrays"])(model.state_dict())
        own = InversionAuditMod(model=linear_model(), loss=LOSS)
        app = new_app(own, model=linear_model, train=one_example)
        reply = app(message, context)
        update = reply.content["arrays"]["1.weight"].numpy() - model.state_dict()["1.weight"].numpy()
        sent = report_of(reply).estimate.to_dict()
        numbers = [v for k, v in sorted(sent.items()) if isinstance(v, float) and k != "seconds"] + sent["leakage"]
        return batches_of(client)[0][0][0].numpy().ravel(), update.ravel(), np.array(numbers)

    def test_who_knows_all_but_the_input_rebuilds_it_from_the_update_and_not_from_the_estimate(self):
        """An attacker who optimises inputs until what a client says would be said of them.

        He knows the model, its parameters, the label, the prior, and even the noise on the update: all that is said is
        then a function of the input, which he differentiates.
        """
        by_update, by_estimate, by_prior = [], [], []
        for client in range(5):
            secret, update, noise, told = self.audited_with_noise(client)
            view = functools.partial(what_is_told, noise=noise, told=told)
            # The message is what his function says of the true input, to its three digits.
            assert view(secret).abs().max() < 0.02
            starts = torch.randn(3, 16, generator=torch.Generator().manual_seed(client), dtype=torch.float64)
            starts = [torch.zeros(16, dtype=torch.float64), *starts]
            guess, misfit = best_of(view, starts)
            assert misfit < 0.02, "he finds an input of which the same would be told"
            rebuilt, _ = best_of(lambda x, update=update: 100 * (curved_update(x) - update), starts)
            for found, x in ((by_update, rebuilt), (by_estimate, guess), (by_prior, torch.zeros(16))):
                found.append(float((x - secret).square().mean()))
        assert max(by_update) < 1e-4
        assert np.mean(by_estimate) > 0.95 * np.mean(by_prior)

    def audited_with_noise(self, client):
        """Returns a client's input, the update that it captured, the noise that it added, and what it tells."""
        added = {}

        def noisy(message, context, call_next):
            reply = call_next(message, context)
            generator = np.random.default_rng(client)
            arrays = {name: array.numpy() for name, array in reply.content["arrays"].items()}
            added.update({name: 0.02 * generator.normal(size=a.shape).astype("float32") for name, a in arrays.items()})
            reply.content["arrays"] = ArrayRecord({name: Array(a + added[name]) for name, a in arrays.items()})
            return reply

        settings = AuditSettings(prior_std=1.0, data_range=4.0, precision="float64")
        message = asked(settings)
        message.content["arrays"] = ArrayRecord(curved_model().state_dict())
        own = InversionAuditMod(model=curved_model, loss=LOSS)
        app = new_app(own, noisy, model=curved_model, train=one_example)
        told = report_of(app(message, new_context(client))).estimate
        secret = batches_of(client)[0][0][0].ravel().double()
        noise = torch.cat([torch.from_numpy(array).double().ravel() for array in added.values()])
        return secret, curved_update(secret), noise, told


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def curved_model(context=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


CURVED = curved_model().double()


def curved_update(x):
    """What one step on one example `[16]` of class 0 changes."""
    params = {name: parameter.detach() for name, parameter in CURVED.named_parameters()}

    def loss(params):
        return LOSS(functional_call(CURVED, params, (x.reshape(1, 1, 4, 4),)), torch.zeros(1, dtype=torch.long))

    return torch.cat([-0.1 * part.ravel() for part in grad(loss)(params).values()])


def what_is_told(x, *, noise, told):
    """Logarithms of what a client that trains on x tells, over what was told."""
    update = curved_update(x)
    seen = observed_perturbation((update + noise)[None], update[None])
    delta = seen.delta[0]
    jacobian = jacrev(curved_update)(x)
    gram, eye = jacobian.T @ jacobian, torch.eye(16, dtype=torch.float64)

    def leakage(ridge):
        return torch.linalg.solve(gram + ridge * eye, gram).diagonal().mean()

    solve = torch.linalg.inv(gram + seen.noise_std[0] ** 2 * eye)
    shift = solve @ (jacobian.T @ delta)
    bias = (seen.noise_std[0] ** 4) * (solve @ solve).diagonal().mean()
    pairs = [
        (leakage(seen.noise_std[0] ** 2), told.leakage.value),
        (leakage(told.required_noise_std**2), told.target_leakage),
        (torch.linalg.vector_norm(update + noise), told.shared_norm),
        (torch.linalg.vector_norm(shift), told.i2f),
        (torch.linalg.vector_norm(jacobian.T @ delta) / torch.linalg.eigvalsh(gram)[-1], told.lower_bound),
        (seen.noise_std[0], told.noise_std),
        ((shift.square().mean() + bias).sqrt(), told.rmse),
    ]
    return torch.stack([value.log() - math.log(number) for value, number in pairs])


def best_of(residual, starts, *, steps=25):
    """Returns where Levenberg-Marquardt from several starts brings a residual closest to 0, and how close."""

    def descended(x):
        damping, r = 1.0, residual(x)
        for _ in range(steps):
            slope = jacrev(residual)(x)
            step = torch.linalg.solve(slope.T @ slope + damping * torch.eye(len(x), dtype=x.dtype), slope.T @ r)
            trial = residual(x - step)
            if r.abs().max() < 1e-6:
                break
            if trial.norm() < r.norm():
                x, r, damping = x - step, trial, damping / 3
            else:
                damping *= 4
        return x, float(r.abs().max())

    return min((descended(start) for start in starts), key=lambda found: found[1])


def one_example(model, batches):
    inputs, _ = batches[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in record_batches([(inputs[:1], torch.zeros(1, dtype=torch.long))]):
        step(model, optimizer, batch)


def held_out_r2(features, targets, trained=45):
    """Share of the targets' variance that ridge regression explains on clients that it was not fitted to."""
    scaled = (features - features[:trained].mean(0)) / (features[:trained].std(0) + 1e-12)
    design = np.concatenate([scaled, scaled**2, np.ones((len(scaled), 1))], axis=1)
    known, unknown = design[:trained], design[trained:]
    weights = np.linalg.solve(known.T @ known + 3.0 * np.eye(known.shape[1]), known.T @ targets[:trained])
    rest = targets[trained:] - unknown @ weights
    return 1 - float((rest**2).sum() / ((targets[trained:] - targets[:trained].mean(0)) ** 2).sum())


@functools.cache
def honest_head():
    return json.loads(new_app(mod())(asked(), new_context(ODD)).content[REPORT_KEY]["head"])


def forging(**changes):
    """A mod that sends an honest estimate with other entries; `...` removes one."""

    def edit(content):
        merged = {**honest_head()["estimate"], **changes}
        estimate = {name: value for name, value in merged.items() if value is not ...}
        content[REPORT_KEY] = ConfigRecord({"head": json.dumps({**honest_head(), "estimate": estimate})})

    return editing(edit)


FORGED = {
    "a leakage above one": ({"leakage": [0.1, 0.2, 1.5]}, "interval within"),
    "a negative leakage": ({"leakage": [-0.1, 0.2, 0.5]}, "leakage >= 0"),
    "bounds that are crossed": ({"leakage": [0.5, 0.2, 0.6]}, "interval within"),
    "a leakage of two numbers": ({"leakage": [0.5, 0.6]}, "three numbers"),
    "a leakage that is text": ({"leakage": "0.5"}, "three numbers"),
    "a NaN": ({"leakage": [0.1, math.nan, 0.5]}, "leakage >= 0"),
    "an infinite noise": ({"required_noise_std": math.inf}, "finite required_noise_std"),
    "a negative noise": ({"required_noise_std": -1.0}, "required_noise_std >= 0"),
    "a noise that is true": ({"noise_std": True}, "finite noise_std"),
    "a noise beyond floats": ({"noise_std": 10**400}, "finite noise_std"),
    "a count that is a fraction": ({"units_audited": 1.5}, "units_audited as a whole number"),
    "a count beyond integers": ({"products": 2**70}, "products as a whole number"),
    "a label that is negative": ({"worst_label": -1}, "worst_label as a whole number"),
    "an array": ({"rmse": [1.0] * 1000}, "finite rmse"),
    "a status of the server's own": ({"status": "no-reply"}, "status to be one of"),
    "a status that nobody knows": ({"status": "perfectly safe"}, "status to be one of"),
    "an estimate without a leakage": ({"leakage": ...}, "leakage with an estimate"),
    "a failure with a leakage": ({"status": "late"}, "leakage with an estimate"),
    "no norm": ({"shared_norm": ...}, "finite shared_norm"),
    "no noise": ({"noise_std": ...}, "noise_std with an estimate"),
    "a field of the server's row": ({"action": "passed"}, "'action' among them"),
    "decibels that are text": ({"psnr": "very many"}, "psnr in decibels"),
    "an update of another size": ({"update_dim": 7}, "estimate of an update of"),
    "another target": ({"target_leakage": 0.99}, "target_leakage of 0.5, as asked"),
    "another unit": ({"unit": "batch"}, "unit of example, as asked"),
    "another prior": ({"prior_std": 100.0}, "prior_std of 1.0, as asked"),
}


class TestTheServersSide:
    @pytest.mark.parametrize("name", FORGED)
    def test_a_forged_estimate_is_an_invalid_report_and_the_round_goes_on(self, name):
        changes, detail = FORGED[name]
        strategy = client_audit(on_audit_failure="exclude")
        run(strategy, LocalGrid({ODD: new_app(forging(**changes)), GOOD[0]: new_app(forging())}))
        row = row_of(strategy)
        assert (row.status, row.leakage, row.action) == (Status.INVALID_REPORT, None, "excluded")
        assert detail in row.detail
        unforged = row_of(strategy, GOOD[0])  # readable, but for an update of another norm
        assert (unforged.status, unforged.action) == (Status.UNVERIFIED, "passed")

    def test_batches_that_were_not_asked_for_are_not_looked_at(self):
        handed_over = audited_app()(train_message(), new_context(ODD)).content[REPORT_KEY]

        def eager(content):
            content[REPORT_KEY] = handed_over

        strategy = client_audit()
        run(strategy, LocalGrid({ODD: new_app(editing(eager))}))
        row = row_of(strategy)
        assert (row.status, row.leakage) == (Status.INVALID_REPORT, None)
        assert "holds a batch, and only an estimate was asked for" in row.detail

    def test_an_estimate_does_not_stand_in_for_the_batches_that_were_asked_for(self):
        own = new_app(mod())(asked(), new_context(ODD)).content[REPORT_KEY]

        def evasive(content):
            content[REPORT_KEY] = own

        strategy = audit()
        run(strategy, LocalGrid({ODD: new_app(editing(evasive))}))
        row = row_of(strategy)
        assert (row.status, row.leakage, row.source) == (Status.INVALID_REPORT, None, Source.NONE)

    def test_clients_without_the_mod_or_without_a_model_are_rows(self):
        strategy = client_audit()
        run(strategy, LocalGrid({ODD: new_app(), GOOD[0]: audited_app()}))
        assert row_of(strategy).status is Status.UNPROTECTED
        row = row_of(strategy, GOOD[0])
        assert row.status is Status.REFUSED
        assert row.detail == "no audit on this client: its app gives it no model and loss"

    def test_a_source_that_nobody_knows(self):
        with pytest.raises(InvalidInputError, match="source to be one of trusted, client"):
            InversionAudit(fed_avg(), model=new_model(), loss=LOSS, source="oracle", ledger=None)


class TestConsent:
    @pytest.mark.parametrize(
        ("app", "environment", "node", "run_config", "against"),
        [
            (None, None, None, None, ""),
            (False, "1", True, True, "the app forbids it"),
            (None, "no", None, None, "the environment"),
            (True, None, False, None, "the node's configuration"),
            (True, None, None, False, "the run's configuration"),
        ],
    )
    def test_a_model_is_a_yes_and_one_no_is_enough(self, monkeypatch, app, environment, node, run_config, against):
        if environment is not None:
            monkeypatch.setenv("FL_PRIVACY_SEND_ESTIMATES", environment)
        key = "fl-privacy-send-estimates"
        context = new_context(2, **({} if node is None else {key: node}))
        context.run_config = {} if run_config is None else {key: run_config}
        report = report_from(new_app(mod(send_estimates=app)), context=context)
        assert against in report.refused
        assert (report.estimate is None) == bool(against)

    def test_who_starts_a_run_cannot_allow_that_batches_are_handed_over(self):
        context = new_context(2)
        context.run_config = {"fl-privacy-hand-over-batches": True}
        report = report_of(new_app(InversionAuditMod())(train_message(), context))
        assert "nothing on this client allows it" in report.refused

    def test_who_starts_a_run_can_forbid_it(self):
        context = new_context(2)
        context.run_config = {"fl-privacy-hand-over-batches": False}
        report = report_of(audited_app()(train_message(), context))
        assert "the run's configuration (fl-privacy-hand-over-batches) forbids it" in report.refused

    @pytest.mark.parametrize(
        ("argument", "environment", "node", "run_config", "units"),
        [
            (1, "2", 3, 4, 1),
            (None, "2", 3, 4, 2),
            (None, None, 3, 4, 3),
            (None, None, None, 1, 1),
            (4, None, None, 2, 2),
            (None, "2", None, 1, 1),
        ],
    )
    def test_limits_come_from_the_first_that_says_and_a_run_can_lower_them(
        self, monkeypatch, argument, environment, node, run_config, units
    ):
        if environment is not None:
            monkeypatch.setenv("FL_PRIVACY_MAX_EXAMPLES", environment)
        key = "fl-privacy-max-examples"
        context = new_context(2, **({} if node is None else {key: node}))
        context.run_config = {key: run_config}
        wish = AuditSettings(prior_std=1.0, data_range=4.0)
        assert report_from(new_app(mod(max_examples=argument)), wish, context).estimate.units_audited == units

    @pytest.mark.parametrize("own", [{}, {"max_bytes": 2**20}])
    def test_who_starts_a_run_cannot_raise_what_a_client_spends(self, own):
        context = new_context(2)
        limits = {
            "time-limit": 1e6,
            "memory-budget": 2**50,
            "max-examples": 10**6,
            "max-bytes": 2**50,
            "device": "cuda",
        }
        context.run_config = {f"fl-privacy-{name}": value for name, value in limits.items()}
        assert ClientOptions.gather(own, context) == ClientOptions.gather(own, new_context(2))

    def test_who_starts_a_run_can_lower_it(self):
        context = new_context(2)
        limits = {"time_limit": 2.5, "memory_budget": 1000, "max_examples": 1, "max_bytes": 50, "device": "cpu"}
        context.run_config = {f"fl-privacy-{name.replace('_', '-')}": value for name, value in limits.items()}
        options = ClientOptions.gather({"device": "cuda", "time_limit": 9.0}, context)
        assert {name: getattr(options, name) for name in limits} == limits

    def test_a_limit_of_the_run_that_cannot_be_read_is_a_refusal_too(self):
        context = new_context(2)
        context.run_config = {"fl-privacy-max-bytes": "many"}
        assert (
            "from the run's configuration (fl-privacy-max-bytes)"
            in report_from(new_app(mod(max_bytes=2**20)), context=context).refused
        )

    @pytest.mark.parametrize("value", ["inf", "many", "-1", "nan"])
    def test_a_limit_that_cannot_be_read_is_a_refusal_that_names_its_place(self, monkeypatch, value):
        monkeypatch.setenv("FL_PRIVACY_TIME_LIMIT", value)
        report = report_from(new_app(mod()))
        assert "from the environment (FL_PRIVACY_TIME_LIMIT)" in report.refused

    def test_a_count_without_end_costs_no_training(self):
        context = new_context(2, **{"fl-privacy-max-examples": math.inf})
        assert "max_examples as int" in report_from(new_app(mod()), context=context).refused

    @pytest.mark.parametrize("settings", ["{", "[]", '{"unit": "house"}', '{"prior_std": 1e999}', "9" * 9999])
    def test_settings_that_cannot_be_read_are_a_refusal(self, settings):
        message = train_message(request="estimate", **{SETTINGS_KEY: settings})
        report = report_of(new_app(mod())(message, new_context(2)))
        assert report.refused == "the client could not make its report: RecordError"

    def test_model_and_loss_come_together(self):
        with pytest.raises(InvalidInputError, match="model and loss together"):
            InversionAuditMod(model=new_model())


class TestDisclosure:
    ROW = LeakageEstimate(
        server_round=1,
        client="a",
        status=Status.AUDITED,
        leakage=Interval(0.123456, 0.234567, 0.345678),
        leakage_mean=0.1999,
        noise_std=0.0123456,
        prior_std=0.3,
        units_audited=3,
        update_dim=10,
        target_leakage=0.5,
        required_noise_std=0.0123412,
        psnr=math.inf,
        i2f=math.nan,
        worst_example=3,
        worst_label=7,
        update_norm=3.14159,
        unit="example",
        dtype="float32",
    )

    def test_numbers_are_rounded_to_the_cautious_side(self):
        told = Disclosure.of(self.ROW, shared_norm=1.23456)
        assert told.leakage == Interval(0.123, 0.235, 0.346)
        assert (told.required_noise_std, told.noise_std, told.leakage_mean) == (0.0124, 0.0123, 0.2)
        assert (told.shared_norm, told.psnr, told.i2f) == (1.23, math.inf, None)
        assert (told.worst_example, told.worst_label) == (None, None)

    def test_it_survives_strict_json(self):
        told = Disclosure.of(self.ROW, shared_norm=1.0, reveal_worst=True)
        assert Disclosure.from_dict(json.loads(json.dumps(told.to_dict(), allow_nan=False))) == told

    @pytest.mark.parametrize(
        ("found", "told"),
        [
            ({"change_ratio": 1.2}, False),
            ({"change_ratio": 3.0}, True),
            ({"change_ratio": 3.0, "status": Status.UNCONVERGED}, True),
            ({"change_ratio": 3.0, "input_noise": "own", "input_noise_leakage": 0.01}, False),  # the noise's law limits
        ],
    )
    def test_an_update_that_is_not_linear_is_told_of_as_in_a_row_of_the_server(self, found, told):
        row = Disclosure.of(replace(self.ROW, **found), shared_norm=1.0).applied(
            LeakageEstimate(server_round=1, client="a", status=Status.NO_REPLY)
        )
        assert ("changes 3 times as much as its Jacobian says" in row.detail) == told
        assert ("budget of products ran out" in row.detail) == (row.status is Status.UNCONVERGED)

    def test_an_estimate_whose_numbers_are_not_finite_is_a_failed_audit(self):
        row = LeakageEstimate(**{**self.ROW.__dict__, "noise_std": math.nan})
        assert Disclosure.of(row, shared_norm=1.0).status is Status.AUDIT_FAILED

    def test_statuses_of_the_servers_are_not_a_clients_to_tell(self):
        with pytest.raises(ValueError, match="status of an audit"):
            Disclosure.of(LeakageEstimate(server_round=1, client="a", status=Status.NO_REPLY), shared_norm=1.0)

    def test_a_record_of_another_kind_is_none(self):
        with pytest.raises(RecordError, match="estimate as"):
            decode_report(ConfigRecord({"head": json.dumps(HEAD | {"estimate": [1]})}), max_bytes=10_000)


HEAD = {"version": 1, "client": "a", "defence": "", "refused": "", "trace": None, "arrays": {}}
