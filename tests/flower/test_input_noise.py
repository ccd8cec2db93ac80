"""Noise on inputs in a federation: clients train on x + a, and rows credit what x + a tells and no more."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from fl_privacy.audit import AuditSettings, Policy, PublicExamples, Source, Status, family
from fl_privacy.audit.input_noise import draw_for_examples, leakage_under, shortfall, topped_up
from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.audit.task import InputShift
from fl_privacy.errors import InvalidInputError
from fl_privacy.flower import InversionAuditMod, protected_inputs, record_batch, record_batches
from fl_privacy.flower.protection import INPUT_ADVICE_KEY, InputAdvice, InputProtection, KeptNoise
from fl_privacy.flower.records import REPORT_KEY
from fl_privacy.influence.jacobian import DEFAULT_MEMORY_BUDGET
from fl_privacy.influence.rounding import rounded_off
from fl_privacy.influence.update import GradientUpdate
from fl_privacy.strategies import InversionAudit

from .cases import (
    LR,
    SHAPE,
    audited_app,
    batches_of,
    change_of,
    new_app,
    new_context,
    new_model,
    report_of,
    step,
    train_message,
)
from .test_policies import PARAMETERS, TARGET, Recording, flat, rows, run

NODES = (10, 20)


def audit(
    policy,
    *,
    source="trusted",
    model=new_model,
    unit="example",
    target=TARGET,
    prior_std=1.0,
    relu_width=RELU_WIDTH,
    num_probes=4,
    max_steps=64,
    **options,
):
    return InversionAudit(
        Recording(),
        model=model(),
        loss=nn.CrossEntropyLoss(),
        policy=policy,
        source=source,
        settings=AuditSettings(
            max_examples=4,
            target_leakage=target,
            prior_std=prior_std,
            unit=unit,
            relu_width=relu_width,
            num_probes=num_probes,
            max_steps=max_steps,
        ),
        ledger=None,
        show=False,
        **options,
    )


def protecting(**options):
    """A training loop with the one call, on two batches."""

    def train(model, batches):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for inputs, labels in record_batches(batches):
            step(model, optimizer, (protected_inputs(model, inputs, labels, **options), labels))

    return train


def shaped_app(mod=None, **options):
    mod = mod or InversionAuditMod(hand_over_batches=True, noise_seed=lambda _message, context: context.node_id)
    return new_app(mod, train=protecting(**options), count=2)


def protecting_by(advice, state=None, *, seed=None, **options):
    """A client's protection in one round, without an audit."""
    generator = np.random.default_rng(seed)
    return InputProtection(
        advice,
        RecordDict() if state is None else state,
        None,
        generator,
        memory_budget=DEFAULT_MEMORY_BUDGET,
        **options,
    )


def drawn_for(model, inputs, labels, **options):
    return draw_for_examples(
        GradientUpdate(model, nn.CrossEntropyLoss()),
        {name: p.detach() for name, p in model.named_parameters()},
        inputs,
        labels,
        prior_std=1.0,
        generator=np.random.default_rng(0),
        **options,
    )


def trained_on(arrays, batches):
    """The change of the parameters by training on batches, in float64."""
    model = new_model().double()
    model.load_state_dict({name: torch.from_numpy(np.array(array)).double() for name, array in arrays.items()})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for inputs, labels in batches:
        step(model, optimizer, (inputs.double(), labels))
    return flat({name: (p.detach() - before[name]).numpy() for name, p in model.named_parameters()})


def change(strategy, server_round, node):
    """What a client shared, minus what it was sent."""
    sent = strategy.strategy.global_arrays[server_round - 1]
    shared = strategy.strategy.given[server_round - 1][node].content["arrays"]
    return flat({name: shared[name].numpy().astype(np.float64) - sent[name] for name in PARAMETERS})


def shifted_batches(kept, node):
    """A client's batches with its kept noise on them."""
    noise = iter(torch.from_numpy(draw.noise) for draw in kept.draws.values())
    return [(torch.stack([x + next(noise) for x in inputs]), labels) for inputs, labels in batches_of(node, count=2)]


@pytest.mark.parametrize("covariance", ["client", "public", "white"])
def test_clients_share_the_update_at_x_plus_a_from_the_first_round_and_keep_a(covariance):
    public = batches_of(99)[0]
    strategy = audit(Policy(action="advise", family="shaped", covariance=covariance))
    grid = run(strategy, {node: shaped_app(public=public) for node in NODES}, rounds=2)
    for node in NODES:
        kept = KeptNoise.read(grid.contexts[node].state)
        assert len(kept.draws) == 8
        for server_round in (1, 2):
            row = rows(strategy, server_round)[node]
            assert row.status is Status.AUDITED
            assert row.advised_input_leakage == TARGET
            assert (row.input_noise, row.input_noise_kept) == (covariance, True)
            assert row.leakage.upper == row.passed_leakage <= TARGET * (1 + 1e-6)
            assert row.leakage.upper > 0.9 * TARGET  # an exact spectrum meets the target, and not more
            assert row.input_noise_leakage == pytest.approx(row.leakage.upper)
            assert row.rmse == pytest.approx(math.sqrt(1 - row.input_noise_leakage), rel=1e-3)
            assert row.noise_std < 1e-4  # beside u(x + a), nothing was done to the update
            assert (row.detail, row.i2f) == ("", None)
            # One draw for each example, whatever the round: the update is that of training on x + a.
            sent = strategy.strategy.global_arrays[server_round - 1]
            at_shifted = trained_on(sent, shifted_batches(kept, node))
            np.testing.assert_allclose(change(strategy, server_round, node), at_shifted, atol=2e-6)
            # What the row says was emitted is what was emitted.
            noise = np.stack([draw.noise for draw in kept.draws.values()])
            assert row.input_noise_rms == pytest.approx(np.sqrt(np.mean(noise**2)), rel=1e-5)
            moved = np.linalg.norm(at_shifted - trained_on(sent, batches_of(node, count=2)))
            assert row.input_noise_change == pytest.approx(moved, rel=1e-3)
    assert all(INPUT_ADVICE_KEY in message.content["config"] for message in grid.sent)


def test_shaped_noise_changes_the_update_less_than_white_noise_of_the_same_leakage():
    moved = {}
    for covariance in ("client", "white"):  # at a target whose noise is within the linear regime
        policy = Policy(action="advise", family="shaped", covariance=covariance)
        strategy = audit(policy, target=0.95)
        run(strategy, {node: shaped_app() for node in NODES})
        moved[covariance] = sum(row.input_noise_change for row in strategy.estimates)
    assert moved["client"] < 0.8 * moved["white"]


def test_noise_before_relus_is_shaped_by_the_jacobian_that_the_audit_takes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    inputs, labels = batches_of(1)[0]
    loss = nn.functional.cross_entropy
    drawn = {}
    for width in (0.0, 0.3):
        grid = run(audit(Policy(action="advise", family="shaped"), relu_width=width), {10: shaped_app()})
        advice = replace(InputAdvice.take(dict(grid.sent[0].content["config"])), kept=False)
        assert advice.relu_width == width
        protection = protecting_by(advice, seed=7)
        with protection.active():
            drawn[width] = protected_inputs(model, inputs, labels, loss=loss) - inputs
        expected = draw_for_examples(
            rounded_off(GradientUpdate(model, loss), width),
            {name: p.detach() for name, p in model.named_parameters()},
            inputs,
            labels,
            target_leakage=TARGET,
            prior_std=1.0,
            generator=np.random.default_rng(7),
        )
        torch.testing.assert_close(drawn[width], expected.noise, rtol=0, atol=1e-6)
    assert float((drawn[0.0] - drawn[0.3]).norm() / drawn[0.3].norm()) > 0.05


def test_the_noise_of_examples_follows_the_law_and_meets_the_target_by_the_dense_formula():
    model, (inputs, labels) = new_model().double(), batches_of(1)[0]
    update = GradientUpdate(model, nn.CrossEntropyLoss())
    params = {name: p.detach() for name, p in model.named_parameters()}
    generator = np.random.default_rng(0)
    draws = [
        draw_for_examples(
            update,
            params,
            inputs.double()[:1].expand(200, *SHAPE),
            labels[:1].expand(200),
            target_leakage=0.3,
            prior_std=1.0,
            generator=generator,
        )
        for _ in range(5)
    ]
    assert all(float(draw.leakage.max()) <= 0.3 * (1 + 1e-6) for draw in draws)
    a = torch.cat([draw.noise for draw in draws]).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(a.T @ a / len(a))
    # 1,000 draws of 16 elements: the spread of sampled eigenvalues biases the mean of 1/(1 + h) by 1 to 2 %.
    assert float((1 / (1 + eigenvalues)).mean()) == pytest.approx(0.3, rel=0.04)
    assert eigenvalues[-1] > 3 * eigenvalues[0]


def test_fresh_noise_is_drawn_in_every_round_and_for_all_shares_together():
    policy = Policy(action="advise", family="shaped", covariance="white", kept=False, shares=4)
    mod = InversionAuditMod(hand_over_batches=True)
    strategy = audit(policy)
    grid = run(strategy, {10: shaped_app(mod)}, rounds=2)
    assert not grid.contexts[10].state.array_records
    first, second = (rows(strategy, r)[10] for r in (1, 2))
    assert first.input_noise_kept is False
    assert first.input_noise_rms != second.input_noise_rms
    uniform = math.sqrt(1 / TARGET - 1)
    for row in (first, second):  # 128 normal numbers, to five of their standard errors
        assert abs(row.input_noise_rms / (2 * uniform) - 1) < 5 / math.sqrt(2 * 128)


def test_a_stricter_target_puts_more_on_what_was_kept_and_leaves_it_in():
    state, message = new_context(3), train_message
    app = shaped_app()
    kept = []
    for target in (0.5, 0.5, 0.2):
        advice = InputAdvice(target_leakage=target, prior_std=1.0)
        report_of(app(message(**advice.entries()), state))
        kept.append(KeptNoise.read(state.state))
    noise = [np.stack([draw.noise for draw in k.draws.values()]) for k in kept]
    np.testing.assert_array_equal(noise[0], noise[1])
    added = noise[2] - noise[0]
    assert abs(np.sqrt(np.mean(added**2)) / math.sqrt(1 / 0.2 - 1 / 0.5) - 1) < 5 / math.sqrt(2 * added.size)
    assert all(draw.leakage <= 0.2 for draw in kept[2].draws.values())


def test_topping_up_and_other_priors_never_credit_more_than_the_dense_formula():
    generator = np.random.default_rng(1)
    for _ in range(50):
        h = generator.exponential(size=30) ** 3

        def leakage(extra=0.0, tau=0.7, h=h):
            return float(np.mean(tau**2 / (tau**2 + h + extra)))

        target = 0.6 * leakage()
        draws, told = topped_up(np.zeros(20000), leakage(), target_leakage=target, prior_std=0.7, generator=generator)
        assert leakage(float(np.var(draws))) <= told * 1.02
        for tau in (0.3, 0.7, 2.0):
            assert leakage(tau=tau) <= leakage_under(np.array(leakage()), 0.7, tau) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variances", [np.ones(64), np.r_[np.zeros(32), np.full(32, 2.0)]], ids=["white", "half"])
def test_noise_of_the_leakage_that_is_said_of_it_is_believed_and_a_third_of_it_is_not(seed, variances):
    noise = np.random.default_rng(seed).standard_normal((40, 64)) * np.sqrt(variances)
    leakage = np.full(40, np.mean(1 / (1 + variances)))

    def shift(scale):
        return InputShift(noise=scale * noise, leakage=leakage, prior_std=1.0, covariance="white", kept=True)

    assert shortfall(shift(1.0)) == ""
    assert "none of it is credited" in shortfall(shift(1 / 3))


def test_a_client_that_only_claims_noise_on_its_inputs_is_credited_nothing():
    def lying(message, context, call_next):
        reply = call_next(message, context)
        report = reply.content[REPORT_KEY]
        head = json.loads(report["head"])
        count = head["arrays"]["shift/leakage"][1][0]
        entries = {**report, "array/shift/leakage": np.full(count, 0.01).tobytes()}
        reply.content[REPORT_KEY] = ConfigRecord(entries)
        return reply

    strategy = audit(Policy(action="advise", family="shaped"))
    mod = InversionAuditMod(hand_over_batches=True)
    run(strategy, {10: new_app(lying, mod, train=protecting(), count=2)})
    row = rows(strategy, 1)[10]
    assert row.leakage.lower > 0.99
    assert "none of it is credited" in row.detail


def test_a_batch_that_was_left_as_it_is_makes_the_noise_on_the_others_worth_nothing():
    def half(model, batches):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for index, (inputs, labels) in enumerate(record_batches([*batches, *batches])):
            given = inputs if index == 1 else protected_inputs(model, inputs, labels)
            step(model, optimizer, (given, labels))

    strategy = audit(Policy(action="advise", family="shaped"))
    run(strategy, {10: audited_app(train=half)})
    row = rows(strategy, 1)[10]
    assert row.status is Status.UNVERIFIED
    assert row.leakage.upper > 0.99
    assert "not credited" in row.detail


def test_an_app_without_the_call_and_a_client_that_says_no_are_told_apart_from_protected_ones(monkeypatch):
    strategy = audit(Policy(action="advise", family="shaped"))
    run(strategy, {10: audited_app()})
    monkeypatch.setenv("FL_PRIVACY_FOLLOW_ADVICE", "no")
    run(strategy, {20: shaped_app()})
    for row in strategy.estimates:
        assert row.advised_input_leakage == TARGET
        assert row.input_noise == ""
        assert row.leakage.lower > 0.99
        assert "did not put the advised noise on its inputs" in row.detail


def test_what_the_model_is_given_may_be_recorded_instead_of_what_was_drawn():
    def train(model, batches):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for inputs, labels in batches:
            given, labels = record_batch(protected_inputs(model, inputs, labels), labels)
            step(model, optimizer, (given, labels))

    strategy = audit(Policy(action="advise", family="shaped"))
    run(strategy, {10: audited_app(train=train, count=2)})
    row = rows(strategy, 1)[10]
    assert row.status is Status.AUDITED
    assert row.leakage.upper <= TARGET * (1 + 1e-6)


def test_inputs_with_a_valid_range_stay_in_it_and_are_protected_no_less():
    seen = []

    def train(model, batches):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for inputs, labels in record_batches([(torch.sigmoid(x), y) for x, y in batches]):
            given = protected_inputs(model, inputs, labels, bounds=(0.0, torch.ones(1, 1, 1)))
            seen.append(given)
            step(model, optimizer, (given, labels))

    strategy = audit(Policy(action="advise", family="shaped"))
    run(strategy, {10: audited_app(train=train)})
    row = rows(strategy, 1)[10]
    assert row.status is Status.AUDITED
    assert row.leakage.upper <= TARGET * (1 + 1e-6)
    assert float(seen[0].min()) == 0.0
    assert float(seen[0].max()) == 1.0
    assert row.input_noise_rms > 1.0  # of a, not of what the bounds left of it


def test_without_an_audit_or_advice_inputs_are_what_they_were():
    inputs, labels = batches_of(1)[0]
    assert protected_inputs(new_model(), inputs, labels) is inputs
    seen = []
    plain, protected = (new_app(*mods, train=protecting(), seen=seen) for mods in ((), (InversionAuditMod(),)))
    for app in (plain, protected):
        reply = app(train_message(), new_context())
        for name, value in change_of(reply, new_model().state_dict()).items():
            np.testing.assert_array_equal(
                value, change_of(plain(train_message(), new_context()), new_model().state_dict())[name]
            )


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0.0, 1.0), "expected inputs within"),
        ((torch.full(SHAPE, -9.0), torch.full(SHAPE, 9.0)), "could tell what they bound"),
    ],
)
def test_bounds_that_cannot_hold_end_the_training_rather_than_the_protection(bounds, message):
    strategy = audit(Policy(action="advise", family="shaped"))
    run(strategy, {10: shaped_app(bounds=bounds)})
    row = rows(strategy, 1)[10]
    assert row.status is Status.CLIENT_ERROR
    assert message in row.detail


def test_without_public_examples_the_noise_is_white_and_the_row_says_so():
    strategy = audit(Policy(action="advise", family="shaped", covariance="public"))
    run(strategy, {10: shaped_app()})
    row = rows(strategy, 1)[10]
    assert row.leakage.upper == pytest.approx(TARGET)
    assert "no public examples were given: the noise is white" in row.detail


def test_a_model_whose_spectrum_cannot_be_had_gets_white_noise():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    class Doubling(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    model, (inputs, labels) = nn.Sequential(Doubling(), new_model()), batches_of(1)[0]
    draw = drawn_for(model, inputs, labels, target_leakage=0.25)
    assert "the noise is white" in draw.note
    assert (draw.leakage == 0.25).all()
    assert abs(float(draw.noise.std()) / math.sqrt(3) - 1) < 0.5


@pytest.mark.parametrize(("once", "leaks"), [(True, 1.0), (False, 0.6)])
def test_who_meets_the_target_without_noise_gets_it_all_the_same_where_later_rounds_share_it_again(once, leaks):
    """Two outputs' gradient of a frozen first layer: of 16 inputs no more than two numbers can be known at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 3))
    model[1].requires_grad_(False)
    inputs, labels = batches_of(1)[0]
    draw = drawn_for(model, inputs, labels, target_leakage=0.6, once=once)
    assert "meet the target without noise" in draw.note
    assert (draw.leakage == leaks).all()
    assert bool(draw.noise.any()) is not once


def test_noise_that_a_coarse_spectrum_cannot_shape_is_white_and_says_so():
    model, (inputs, labels) = new_model(), batches_of(1)[0]
    coarse = drawn_for(model, inputs, labels, target_leakage=0.5, num_probes=1, max_steps=2)
    assert coarse.note == (
        "the noise on 4 of 4 examples is white, which costs the update less than noise shaped by a spectrum of 2 "
        "products does: raise the audit's max_steps"
    )
    assert not coarse.shaped.any()
    assert (coarse.leakage == 0.5).all()
    exact = drawn_for(model, inputs, labels, target_leakage=0.5)
    assert exact.note == ""
    assert exact.shaped.all()


def test_public_examples_that_meet_the_target_without_noise_shape_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 3))
    model[1].requires_grad_(False)
    inputs, labels = batches_of(1)[0]
    public = (inputs[:1], labels[:1])
    draw = drawn_for(model, inputs, labels, target_leakage=0.6, covariance="public", public=public)
    assert draw.note == "the noise is white: public examples meet the target without noise, and shape none"
    assert (draw.leakage == 0.6).all()
    assert not draw.shaped.any()


@pytest.mark.parametrize("action", ["advise", "perturb"])
def test_a_row_says_white_where_the_audits_spectrum_is_too_coarse_to_shape_noise(action):
    policy = Policy(action=action, family="shaped")
    strategy = audit(policy, num_probes=1, max_steps=3)
    grid = run(strategy, {10: shaped_app() if action == "advise" else audited_app(count=2)}, rounds=2)
    for server_round in (1, 2):
        row = rows(strategy, server_round)[10]
        assert row.input_noise == "white"
        assert row.passed_leakage == pytest.approx(TARGET)
    assert "is white, which costs the update less" in rows(strategy, 1)[10].detail
    if action == "advise":
        advice = InputAdvice.take(dict(grid.sent[0].content["config"]))
        assert (advice.num_probes, advice.max_steps) == (1, 3)


def test_noise_that_cannot_be_shaped_in_time_is_white():
    protection = protecting_by(InputAdvice(target_leakage=0.5, prior_std=1.0), seed=0, time_limit=1e-9)
    inputs, labels = batches_of(1)[0]
    with protection.active():
        moved = protected_inputs(new_model(), inputs, labels)
    noise = moved - inputs
    assert protection.leakage == 0.5
    assert abs(float(noise.std()) - 1.0) < 5 / math.sqrt(2 * noise.numel())
    assert any("time limit is over" in note for note in protection._notes)


def test_examples_of_several_shapes_keep_their_noise():
    state, model = RecordDict(), nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    batches = [(torch.rand(2, 1, size, size), torch.tensor([0, 1])) for size in (4, 5)]
    given = []
    for _ in range(2):
        protection = protecting_by(InputAdvice(target_leakage=0.5, prior_std=1.0), state)
        with protection.active():
            given.append([protected_inputs(model, *batch) for batch in batches])
    for first, second, (inputs, _) in zip(*given, batches, strict=True):
        torch.testing.assert_close(first, second)
        assert (first != inputs).any()


def test_a_prior_from_a_first_batch_of_few_examples_is_told_of():
    strategy = audit(Policy(action="advise", family="shaped"), prior_std=None)
    run(strategy, {10: shaped_app()})
    assert "the prior's width is that of a first batch of 4" in rows(strategy, 1)[10].detail


def test_a_client_audits_its_own_noise_and_only_scalars_leave():
    mod = InversionAuditMod(model=new_model(), loss=nn.CrossEntropyLoss())
    strategy = audit(Policy(action="advise", family="shaped"), source="client")
    run(strategy, {10: shaped_app(mod)}, rounds=2)
    for server_round in (1, 2):
        row = rows(strategy, server_round)[10]
        assert (row.source, row.status) == (Source.CLIENT, Status.AUDITED)
        assert (row.input_noise, row.input_noise_kept) == ("client", True)
        assert row.leakage.upper == pytest.approx(TARGET, rel=0.01)
        assert row.input_noise_rms > 0.5
        assert row.input_noise_change > 0


@pytest.mark.parametrize("unit", ["example", "batch"])
def test_the_server_shares_the_update_at_x_plus_a_where_it_has_the_batch(unit):
    policy = Policy(action="perturb", family="shaped", seed=5)
    strategy, plain = audit(policy, unit=unit), audit("report", unit=unit)
    for each in (strategy, plain):
        run(each, {node: audited_app(count=2) for node in NODES}, rounds=1)
    for node in NODES:
        row = rows(strategy, 1)[node]
        assert row.action == "perturbed"
        assert row.leakage.lower > 0.99  # of what arrived
        assert row.passed_leakage == TARGET
        assert row.applied_noise_std is None
        assert row.input_noise_leakage <= TARGET * (1 + 1e-6)
        # What is passed on is the update at inputs with the noise that the server keeps for this client.
        state = strategy._actions._shifting._states[row.client]
        sent = strategy.strategy.global_arrays[0]
        expected = trained_on(sent, shifted_batches(KeptNoise.read(state), node))
        np.testing.assert_allclose(change(strategy, 1, node), expected, atol=2e-6)
        moved = np.linalg.norm(change(strategy, 1, node) - change(plain, 1, node))
        assert row.input_noise_change == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("classes", [np.int32, np.int64])
def test_public_examples_of_the_server_shape_the_noise_that_it_puts_on(classes):
    inputs, labels = batches_of(99, count=3)[0]
    public = PublicExamples(inputs=inputs.numpy(), labels=labels.numpy().astype(classes))
    strategy = audit(Policy(action="perturb", family="shaped", covariance="public", seed=5), public=public)
    run(strategy, {10: audited_app(count=1)})
    row = rows(strategy, 1)[10]
    assert (row.action, row.input_noise, row.detail) == ("perturbed", "public", "")
    assert row.passed_leakage == TARGET
    kept = KeptNoise.read(strategy._actions._shifting._states[row.client])
    model, (private, targets) = new_model(), batches_of(10)[0]
    shaping, of_class = public.chosen(0, most=8)
    chosen = (shaping, of_class.astype(np.int64))
    model.load_state_dict({k: torch.from_numpy(v) for k, v in strategy.strategy.global_arrays[0].items()})
    expected = draw_for_examples(
        GradientUpdate(model, nn.CrossEntropyLoss()),
        {name: p.detach() for name, p in model.named_parameters()},
        private,
        targets,
        target_leakage=TARGET,
        prior_std=1.0,
        covariance="public",
        public=tuple(torch.from_numpy(part) for part in chosen),
        generator=np.random.default_rng([5, 1, zlib.crc32(row.client.encode())]),
    )
    drawn = np.stack([draw.noise for draw in kept.draws.values()])
    np.testing.assert_allclose(drawn, expected.noise.numpy(), rtol=1e-3, atol=1e-4)
    assert expected.shaped.all()


@pytest.mark.parametrize("bounds", [(-4.0, 4.0), (0.0, 1.0)])
def test_the_server_keeps_inputs_in_a_valid_range_and_says_so_where_they_are_none(bounds):
    policy = Policy(action="perturb", family="shaped", seed=5, bounds=bounds)
    strategy = audit(policy)
    run(strategy, {10: audited_app(count=2)}, rounds=1)
    row = rows(strategy, 1)[10]
    if bounds == (0.0, 1.0):  # which the inputs themselves leave
        assert row.input_noise == ""
        assert row.applied_noise_std > 0
        assert "the noise is isotropic, not shaped: InvalidInputError: expected inputs within" in row.detail
        return
    assert row.input_noise == "client"
    kept = KeptNoise.read(strategy._actions._shifting._states[row.client])
    moved = [(x.clamp(*bounds), labels) for x, labels in shifted_batches(kept, 10)]
    assert any((x != y).any() for (x, _), (y, _) in zip(moved, shifted_batches(kept, 10), strict=True))
    expected = trained_on(strategy.strategy.global_arrays[0], moved)
    np.testing.assert_allclose(change(strategy, 1, 10), expected, atol=2e-6)


def test_a_server_without_the_batch_perturbs_isotropically_and_says_so():
    mod = InversionAuditMod(model=new_model(), loss=nn.CrossEntropyLoss())
    strategy = audit(Policy(action="perturb", family="shaped"), source="client")
    run(strategy, {10: new_app(mod)})
    row = rows(strategy, 1)[10]
    assert row.action == "perturbed"
    assert row.applied_noise_std == row.required_noise_std
    assert row.input_noise == ""
    assert "isotropic, not shaped: it handed over no batch" in row.detail


def test_the_server_puts_nothing_on_what_a_client_protected_itself():
    """Noise on inputs is not taken for noise on the update, and what meets its target is left alone."""
    message = train_message(**InputAdvice(target_leakage=TARGET, prior_std=1.0).entries())

    def advising(outer, context, call_next):
        outer.content["config"] = ConfigRecord({**outer.content["config"], **message.content["config"]})
        return call_next(outer, context)

    mod = InversionAuditMod(hand_over_batches=True)
    for kind in ("isotropic", "shaped"):
        strategy = audit(Policy(action="perturb", family=kind))
        run(strategy, {10: new_app(advising, mod, train=protecting(), count=2)})
        row = rows(strategy, 1)[10]
        assert row.input_noise == "client"
        assert row.action == "passed"


def test_targets_of_unnamed_clients_are_the_strictest():
    strategy = audit(Policy(action="advise", family="shaped", targets={"20": 0.1}))
    run(strategy, {node: shaped_app() for node in NODES}, rounds=2)
    assert {row.advised_input_leakage for row in rows(strategy, 1).values()} == {0.1}
    assert rows(strategy, 2)[10].advised_input_leakage == TARGET
    assert rows(strategy, 2)[20].advised_input_leakage == 0.1
    assert rows(strategy, 2)[20].leakage.upper <= 0.1 * (1 + 1e-6)


def test_a_dry_run_puts_nothing_on():
    for action in ("advise", "perturb"):
        dry = audit(Policy(action=action, family="shaped", dry_run=True))
        run(dry, {10: shaped_app()}, rounds=2)
        assert {row.input_noise for row in dry.estimates} == {""}
        assert all(row.detail.startswith("dry run: noise on the inputs") for row in dry.estimates)


@pytest.mark.parametrize("most", [0.0, 2.0, math.inf])
def test_the_cheaper_family_is_advised_after_the_first_audit(most, monkeypatch):
    monkeypatch.setattr(family, "_MOST_PER_POWER", most)
    strategy = audit(Policy(action="advise", family="auto"))
    run(strategy, {node: shaped_app() for node in NODES}, rounds=2)
    first, second = strategy.strategy.global_arrays
    moved = np.linalg.norm(flat(second) - flat(first))
    for node in NODES:
        before, after = (rows(strategy, r)[node] for r in (1, 2))
        assert (before.advised_noise_std, before.advised_input_leakage) == (None, None)
        noise = before.required_noise_std * math.sqrt(before.update_dim / 2)  # on the average of two clients
        isotropic = noise / moved <= most * (1 / TARGET - 1)
        assert (after.advised_noise_std is not None) == isotropic
        assert (after.input_noise == "client") == (not isotropic)


@pytest.mark.parametrize("sure", [True, False])
def test_a_choice_of_which_the_rule_is_not_sure_is_said_once(sure, monkeypatch):
    monkeypatch.setattr(family, "_MOST_PER_POWER", 0.0)
    monkeypatch.setattr(family, "_SURE_PER_POWER", 0.0 if sure else math.inf)
    strategy = audit(Policy(action="advise", family="auto"))
    run(strategy, {10: shaped_app()}, rounds=3)
    what = "shaped noise was chosen by a rule that is not sure here"
    said = [what in rows(strategy, r)[10].detail for r in (1, 2, 3)]
    assert said == [False, not sure, False]


def test_a_client_that_cannot_put_noise_on_its_inputs_is_advised_the_other_kind(monkeypatch):
    monkeypatch.setattr(family, "_MOST_PER_POWER", 0.0)
    strategy = audit(Policy(action="advise", family="auto"))
    run(strategy, {10: audited_app()}, rounds=3)
    second, third = (rows(strategy, r)[10] for r in (2, 3))
    assert second.advised_input_leakage == TARGET
    assert "isotropic noise is advised from here on" in second.detail
    assert third.applied_noise_std == third.advised_noise_std > 0


@pytest.mark.parametrize(
    "entries",
    [
        {"target_leakage": 1.0},
        {"target_leakage": math.nan},
        {"covariance": "secret"},
        {"shares": 0},
        {"max_steps": 0},
        {"num_probes": 0},
        {"prior_std": -1.0},
        {"prior_std": "x"},
        {"relu_width": -0.1},
        {"relu_width": math.nan},
        {"relu_width": math.inf},
        {"relu_width": "x"},
    ],
)
def test_advice_that_makes_no_sense_is_none(entries):
    written = json.loads(InputAdvice(target_leakage=0.5).entries()[INPUT_ADVICE_KEY]) | entries
    reply = shaped_app()(train_message(**{INPUT_ADVICE_KEY: json.dumps(written)}), new_context())
    assert report_of(reply).shift is None


def test_advice_that_says_nothing_of_relus_and_effort_is_followed():
    written = json.loads(InputAdvice(target_leakage=0.5).entries()[INPUT_ADVICE_KEY])
    for name in ("relu_width", "num_probes", "max_steps"):
        del written[name]
    reply = shaped_app()(train_message(**{INPUT_ADVICE_KEY: json.dumps(written)}), new_context())
    assert report_of(reply).shift.leakage.max() <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "rank-one"}, "expected a policy's family to be one of isotropic, shaped, auto"),
        ({"action": "perturb", "family": "auto"}, "expected family isotropic or shaped for the action perturb"),
        ({"covariance": "own"}, "expected a policy's covariance to be one of client, public, white"),
        ({"action": "advise", "family": "shaped", "bounds": (0.0, 1.0)}, "give clients' bounds to protected_inputs"),
        ({"action": "perturb", "family": "shaped", "bounds": (1.0, 0.0)}, r"expected bounds \(lowest, highest\)"),
        ({"action": "perturb", "family": "shaped", "bounds": (0.0, math.nan)}, r"expected bounds \(lowest, highest\)"),
    ],
)
def test_policies_out_of_range_are_named(options, message):
    with pytest.raises(InvalidInputError, match=message):
        Policy(**options)


def test_targets_and_priors_out_of_range_are_named():
    model, (inputs, labels) = new_model(), batches_of(1)[0]
    update, params = GradientUpdate(model, nn.CrossEntropyLoss()), dict(model.named_parameters())
    for target, tau, message in ((0.0, 1.0, "target_leakage strictly"), (0.5, 0.0, "prior_std > 0")):
        with pytest.raises(InvalidInputError, match=message):
            draw_for_examples(
                update,
                params,
                inputs,
                labels,
                target_leakage=target,
                prior_std=tau,
                generator=np.random.default_rng(0),
            )
