"""What follows from a client's leakage: advice that clients follow, noise that the server adds, updates left out."""

from __future__ import annotations

import dataclasses
import json
import logging
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fl_privacy.audit import AuditSettings, Policy, Status
from fl_privacy.errors import InvalidInputError
from fl_privacy.flower import InversionAuditMod, record_batches
from fl_privacy.flower.advice import ADVICE_KEY, Advice
from fl_privacy.flower.records import REPORT_KEY
from fl_privacy.influence.jacobian import UpdateJacobian
from fl_privacy.influence.spectrum import dense_gram
from fl_privacy.influence.training import LocalTrainingUpdate
from fl_privacy.strategies import InversionAudit

from .cases import (
    LR,
    LocalGrid,
    audited_app,
    batches_of,
    change_of,
    new_app,
    new_context,
    new_model,
    report_of,
    train_message,
)

NODES = (10, 20)
TARGET = 0.4
PARAMETERS = tuple(name for name, _ in new_model().named_parameters())


class Recording(FedAvg):
    """FedAvg that keeps the replies it was given, round by round."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.given = []
        self.global_arrays = []

    def configure_train(self, server_round, arrays, config, grid):
        self.global_arrays.append({name: array.numpy() for name, array in arrays.items()})
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.given.append({r.metadata.src_node_id: r for r in replies})
        return super().aggregate_train(server_round, replies)


def audit(policy, *, model=new_model, targets=None, **options):
    return InversionAudit(
        Recording(),
        model=model(),
        loss=nn.CrossEntropyLoss(),
        policy=policy,
        settings=AuditSettings(max_examples=4, target_leakage=TARGET, prior_std=1.0),
        ledger=None,
        show=False,
        **options,
    )


def run(strategy, apps=None, *, rounds=1, model=new_model):
    grid = LocalGrid(apps or {node: audited_app() for node in NODES})
    strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=rounds)
    return grid


def rows(strategy, server_round):
    return {row.node_id: row for row in strategy.estimates if row.server_round == server_round}


def flat(arrays, names=PARAMETERS):
    return np.concatenate([np.asarray(arrays[name]).ravel() for name in names])


def assert_noise(values, std):
    """A sample has this standard deviation, to five of its standard errors."""
    assert abs(np.sqrt(np.mean(values**2)) / std - 1) < 5 / math.sqrt(2 * values.size)


def test_clients_follow_advice_from_the_second_round_and_leak_no_more_than_their_target():
    strategy = audit("advise")
    mod = InversionAuditMod(hand_over_batches=True, noise_seed=lambda _message, context: context.node_id)
    grid = run(strategy, {node: new_app(mod) for node in NODES}, rounds=3)
    first, third = rows(strategy, 1), rows(strategy, 3)
    for node in NODES:
        assert first[node].advised_noise_std is None
        assert first[node].leakage.lower > 0.99
        for row in (rows(strategy, 2)[node], third[node]):
            assert row.applied_noise_std == row.advised_noise_std > 0
            # The estimate itself wavers: 235 numbers tell the noise's size to 5 %, and the update's scale to 40 %.
            true = np.interp(math.log(row.applied_noise_std), np.log(row.curve.noise_std), row.curve.upper)
            assert true < TARGET + 0.02
            assert row.passed_leakage == row.leakage.upper
            assert row.detail == ""
            index = row.server_round - 1
            sent = {n: torch.from_numpy(a) for n, a in strategy.strategy.global_arrays[index].items()}
            undefended = audited_app()(train_message(sent), new_context(node)).content["arrays"]
            shared = strategy.strategy.given[index][node].content["arrays"]
            emitted = flat({n: shared[n].numpy() - undefended[n].numpy() for n in PARAMETERS})
            assert_noise(emitted, row.applied_noise_std)
        assert rows(strategy, 2)[node].advised_noise_std == pytest.approx(1.25 * first[node].required_noise_std)
    assert all(ADVICE_KEY not in m.content["config"] for m in grid.sent[: len(NODES)])


def test_advice_is_no_part_of_the_config_that_the_app_sees():
    seen = []
    strategy = audit("advise")
    run(strategy, {10: audited_app(seen=seen)}, rounds=2)
    assert [set(message.content["config"]) for message in seen] == [{"server-round"}] * 2


def test_noise_of_the_same_power_that_a_client_adds_itself_is_counted():
    policy = Policy(action="advise", margin=1.0)
    strategy = audit("report")
    run(strategy)
    bare = rows(strategy, 1)[10]
    required = bare.required_noise_std

    def with_noise(share, **changes):
        """The row of a client whose leakage shows noise of a share of what is required."""
        upper = np.interp(math.log(share * required), np.log(bare.curve.noise_std), bare.curve.upper)
        return dataclasses.replace(bare, leakage=bare.leakage._replace(upper=float(upper)), **changes)

    half, enough = with_noise(0.6), with_noise(1.1)
    doubtful = with_noise(1.1, verified=False)
    uneven = with_noise(1.1, even_noise=False)

    def missing(row, policy=policy):
        return policy.missing_noise_std(required, policy.own_noise_std(row))

    assert missing(bare) == pytest.approx(required)
    assert missing(half) == pytest.approx(0.8 * required)
    assert missing(uneven) == pytest.approx(required)
    assert missing(enough) == 0
    assert missing(doubtful) == pytest.approx(required)
    assert missing(bare, dataclasses.replace(policy, shares=9)) == pytest.approx(3 * required)
    assert missing(half, dataclasses.replace(policy, margin=2.0)) == pytest.approx(math.sqrt(4 - 0.6**2) * required)
    assert missing(half, dataclasses.replace(policy, action="perturb", margin=2.0)) == pytest.approx(0.8 * required)


def test_the_server_perturbs_by_the_noise_it_claims_before_the_inner_strategy_aggregates():
    strategy = audit(Policy(action="perturb", seed=3))
    run(strategy)
    reported = audit("report")
    run(reported)
    for node in NODES:
        row = rows(strategy, 1)[node]
        assert row.action == "perturbed"
        assert row.leakage.lower > 0.99  # of what arrived
        assert row.passed_leakage == TARGET
        assert row.applied_noise_std == row.required_noise_std
        ours, theirs = (
            {name: array.numpy() for name, array in s.strategy.given[0][node].content["arrays"].items()}
            for s in (strategy, reported)
        )
        assert_noise(flat(ours) - flat(theirs), row.applied_noise_std)


def test_what_the_server_passes_on_leaks_no_more_than_the_target_when_it_is_audited_again():
    strategy = audit(Policy(action="perturb", seed=3))
    run(strategy)
    passed = strategy.strategy.given[0]

    def resend(node):
        def mod(message, context, call_next):
            reply = call_next(message, context)
            reply.content["arrays"] = passed[node].content["arrays"]
            return reply

        return mod

    again = audit("report")
    run(again, {node: audited_app(resend(node)) for node in NODES})
    for node in NODES:
        assert rows(again, 1)[node].leakage.value < TARGET + 0.1
        assert rows(again, 1)[node].leakage.upper < 0.6


def test_what_the_server_passed_on_in_all_rounds_is_told_by_the_dense_sum_over_them():
    strategy = audit(Policy(action="perturb", seed=3))
    run(strategy, rounds=4)
    for node in NODES:
        (inputs, labels), model = batches_of(node)[0], new_model().double()
        total = torch.zeros(len(inputs), 16, 16, dtype=torch.float64)
        for server_round in range(1, 5):
            row = rows(strategy, server_round)[node]
            sent = strategy.strategy.global_arrays[server_round - 1]
            jacobian = UpdateJacobian(
                LocalTrainingUpdate(model, nn.CrossEntropyLoss(), lr=LR, steps=1),
                {name: torch.from_numpy(sent[name]).double() for name in PARAMETERS},
                inputs.double().expand(len(inputs), *inputs.shape),
                labels.expand(len(inputs), -1),
                private=torch.arange(len(inputs)),
            )
            grams = torch.stack([dense_gram(jacobian, unit) for unit in range(len(inputs))])
            total += grams / row.applied_noise_std**2
            eigenvalues = torch.linalg.eigvalsh(total)
            dense = float((eigenvalues / (eigenvalues + 1)).mean(-1).max())  # τ = 1
            told = row.rounds_passed_leakage
            assert told.lower - 1e-6 <= dense <= told.upper + 1e-6
            assert told.upper <= server_round * TARGET + 1e-6
            assert told.value == pytest.approx(dense, abs=0.03)
            assert row.rounds_leakage.lower > 0.99


def test_noise_on_a_clipped_update_has_the_update_s_scale():
    def halving(message, context, call_next):
        initial = {name: array.numpy() for name, array in message.content["arrays"].items()}
        reply = call_next(message, context)
        arrays = reply.content["arrays"].items()
        changed = {n: Array(initial[n] + np.float32(0.5) * (a.numpy() - initial[n])) for n, a in arrays}
        reply.content["arrays"] = ArrayRecord(changed)
        return reply

    arrived = audit("report")
    run(arrived, {10: audited_app(halving)})
    strategy = audit(Policy(action="perturb", seed=3))
    run(strategy, {10: audited_app(halving)})
    row = rows(strategy, 1)[10]
    assert row.scale == pytest.approx(0.5, rel=1e-3)
    ours, theirs = (
        flat({n: a.numpy() for n, a in s.strategy.given[0][10].content["arrays"].items()}) for s in (strategy, arrived)
    )
    assert_noise(ours - theirs, 0.5 * row.applied_noise_std)


def test_buffers_are_left_alone():
    def model():
        return new_model(batch_norm=True)

    strategy = audit(Policy(action="perturb", seed=1), model=model)
    run(strategy, {10: audited_app(model=model)}, model=model)
    reported = audit("report", model=model)
    run(reported, {10: audited_app(model=model)}, model=model)
    ours, theirs = (
        {n: a.numpy() for n, a in s.strategy.given[0][10].content["arrays"].items()} for s in (strategy, reported)
    )
    trained = {name for name, _ in model().named_parameters()}
    assert rows(strategy, 1)[10].action == "perturbed"
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert np.array_equal(ours[name], theirs[name]) == (name not in trained), name


def test_what_leaks_more_than_the_limit_is_left_out():
    strict, lenient = audit("exclude"), audit(Policy(action="exclude", limit=1.0))
    for strategy in (strict, lenient):
        run(strategy)
    assert {row.action for row in strict.estimates} == {"excluded"}
    assert {row.passed_leakage for row in strict.estimates} == {None}
    assert strict.strategy.given == [{}]
    assert {row.action for row in lenient.estimates} == {"passed"}
    assert set(lenient.strategy.given[0]) == set(NODES)


@pytest.mark.parametrize("action", ["advise", "perturb", "exclude"])
def test_a_dry_run_changes_nothing_and_says_what_it_would_do(action):
    dry, plain = audit(Policy(action=action, dry_run=True)), audit("report")
    run(dry, rounds=2)
    run(plain, rounds=2)
    for ours, theirs in zip(dry.strategy.global_arrays, plain.strategy.global_arrays, strict=True):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert all(row.detail.startswith("dry run: ") and row.action == "passed" for row in dry.estimates)
    assert all(row.applied_noise_std is None for row in dry.estimates)


def test_who_takes_a_name_first_does_not_take_its_owners_target():
    actions = audit(Policy(action="advise", targets={"10": 0.1, "11": 0.99}))._actions
    assert actions.target_of("10 (node 7)") == 0.1
    assert actions.target_of("11 (node 7)") == actions.target_of("8") < 0.99


def test_clients_have_targets_of_their_own():
    policy = Policy(action="perturb", targets={"10": 0.1}, seed=0)  # by the name that the client reports
    strategy = audit(policy)
    run(strategy)
    own, others = rows(strategy, 1)[10], rows(strategy, 1)[20]
    assert (own.target_leakage, others.target_leakage) == (0.1, TARGET)
    assert own.passed_leakage == 0.1
    plain = audit("report")
    run(plain)
    assert own.required_noise_std > 1.5 * rows(plain, 1)[10].required_noise_std
    assert others.required_noise_std == rows(plain, 1)[20].required_noise_std


def test_a_client_that_says_no_to_advice_shares_as_before_and_its_row_says_so(monkeypatch):
    monkeypatch.setenv("FL_PRIVACY_FOLLOW_ADVICE", "no")
    strategy = audit("advise")
    run(strategy, rounds=2)
    row = rows(strategy, 2)[10]
    assert row.advised_noise_std > 0
    assert row.applied_noise_std is None
    assert row.leakage.lower > 0.99
    assert "did not put the advised noise" in row.detail


def test_a_client_that_only_claims_noise_is_found_out():
    def forgetful(message, context, call_next):
        """Reports what the mod within did, and shares what was there before."""
        inner = []

        def keep(message, context):
            reply = call_next(message, context)
            inner.append(ArrayRecord(dict(reply.content["arrays"])))
            return reply

        reply = InversionAuditMod(hand_over_batches=True)(message, context, keep)
        reply.content["arrays"] = inner[0]
        return reply

    strategy = audit("advise")
    run(strategy, {10: new_app(forgetful)}, rounds=2)
    row = rows(strategy, 2)[10]
    assert row.applied_noise_std > 0
    assert row.leakage.lower > 0.99  # a claim protects nobody
    assert "says it put noise of" in row.detail


@pytest.mark.parametrize(
    "written",
    ["{", "[]", "null", '{"noise_std": 1}', json.dumps({"noise_std": -1, "target_leakage": 0.5, "parameters": []})],
)
def test_advice_that_cannot_be_read_costs_neither_training_nor_report(written):
    message = train_message(**{ADVICE_KEY: written})
    initial = new_model().state_dict()
    reply = audited_app()(message, new_context())
    assert report_of(reply).applied_noise_std is None
    plain = audited_app()(train_message(), new_context())
    for name, change in change_of(reply, initial).items():
        np.testing.assert_array_equal(change, change_of(plain, initial)[name])


def test_advice_for_another_model_is_not_followed():
    advice = Advice(noise_std=1.0, target_leakage=0.5, parameters=("head.weight",))
    reply = audited_app()(train_message(**advice.entries()), new_context())
    assert report_of(reply).applied_noise_std is None


def test_a_target_whose_client_never_came_is_told_of_at_the_end(caplog):
    strategy = audit(Policy(action="perturb", targets={"10": 0.9, "hospital-3": 0.1}))
    with caplog.at_level(logging.WARNING):
        run(strategy, {10: audited_app()})
    (line,) = [record.getMessage() for record in caplog.records if "targets for" in record.getMessage()]
    assert "hospital-3" in line
    assert line.endswith("clients: 10")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "warn"}, "expected a policy's action to be one of report, advise, perturb, exclude, got 'warn'"),
        ({"targets": {"7": 1.0}}, "expected the target of client 7 strictly between 0 and 1, got 1.0"),
        ({"limit": 0.0}, r"expected a limit in \(0, 1\], got 0.0"),
        ({"limit": "0.5"}, r"expected a limit in \(0, 1\], got '0.5'"),
        ({"shares": 0}, "expected a whole number shares >= 1, got 0"),
        ({"shares": math.nan}, "expected a whole number shares >= 1, got nan"),
        ({"shares": 2.5}, "expected a whole number shares >= 1, got 2.5"),
        ({"margin": 0.5}, "expected a finite margin >= 1, got 0.5"),
        ({"margin": "2"}, "expected a finite margin >= 1, got '2'"),
        ({"dry_run": "no"}, "expected dry_run to be True or False, got 'no'"),
        ({"targets": {7: 0.5}}, "expected targets by name of the client, a text, got 7"),
        ({"targets": {"7": "0.5"}}, "expected the target of client 7 strictly between 0 and 1, got '0.5'"),
        ({"family": "shaped"}, "expected the action advise or perturb for the family shaped, got report"),
    ],
)
def test_a_policy_out_of_range_is_named(options, message):
    with pytest.raises(InvalidInputError, match=message):
        Policy(**options)


def test_an_audited_round_can_be_examined_with_its_batches_and_what_that_raises_stops_nothing():
    seen = []

    def examine(audited):
        seen.append(audited)
        raise RuntimeError("no picture today")

    strategy = audit("report", examine=examine)
    run(strategy, rounds=2)
    assert [audited.server_round for audited in seen] == [1, 2]
    assert all(row.action == "passed" for row in strategy.estimates)
    for audited in seen:
        assert [task.client for task in audited.tasks] == [row.client for row in audited.rows]
        assert sorted(task.client for task in audited.tasks) == ["10", "20"]
        assert audited.tasks[0].inputs.shape == (4, 1, 4, 4)
        assert audited.context.settings.prior_std == 1.0
        assert set(audited.params) == set(new_model().state_dict())


def test_pictures_that_are_drawn_of_a_round_are_given_to_callbacks_that_take_them(tmp_path):
    given = []

    class Pictures:
        def on_round(self, server_round, rows):
            given.append(server_round)

        def on_pictures(self, server_round, pictures):
            given.append((server_round, pictures))

    def examine(audited):
        return {"10": tmp_path / "10.png"} if audited.server_round == 2 else {}

    run(audit("report", examine=examine, callbacks=[Pictures()]), rounds=2)
    assert given == [1, 2, (2, {"10": tmp_path / "10.png"})]


def clipping(message, context, call_next):
    """Scales every update to a norm of 0.05, as a client that clips does, and adds noise of its own."""
    initial = {name: array.numpy() for name, array in message.content["arrays"].items()}
    reply = call_next(message, context)
    change = {n: a.numpy() - initial[n] for n, a in reply.content["arrays"].items()}
    factor = min(1.0, 0.05 / np.linalg.norm(flat(change)))
    noise = np.random.default_rng(context.node_id)
    shared = {n: initial[n] + factor * c + 0.002 * noise.standard_normal(c.shape) for n, c in change.items()}
    reply.content["arrays"] = ArrayRecord({n: Array(a.astype(np.float32)) for n, a in shared.items()})
    return reply


def test_advice_is_not_withdrawn_because_a_clipping_client_s_own_noise_grows_with_it():
    strategy = audit("advise")
    run(strategy, {10: audited_app(clipping)}, rounds=5)
    advised = [rows(strategy, r)[10].advised_noise_std for r in range(2, 6)]
    assert all(std is not None for std in advised)
    assert advised == sorted(advised)  # what was needed once stays asked for


@pytest.mark.parametrize("action", ["report", "advise", "perturb", "exclude"])
@pytest.mark.parametrize("told", [-1.0, 1e200])
def test_a_client_that_reports_impossible_noise_is_a_row_and_not_the_end(action, told, monkeypatch):
    def lying(message, context, call_next):
        reply = call_next(message, context)
        head = json.loads(reply.content[REPORT_KEY]["head"])
        reply.content[REPORT_KEY]["head"] = json.dumps({**head, "applied_noise_std": told})
        return reply

    strategy = audit(action)
    run(strategy, {10: audited_app(lying), 20: audited_app()}, rounds=2)
    assert rows(strategy, 2)[10].status is Status.INVALID_REPORT
    assert "applied_noise_std" in rows(strategy, 2)[10].detail
    assert rows(strategy, 2)[20].status is Status.AUDITED


def test_noise_that_would_drown_an_update_leaves_it_out():
    strategy = audit(Policy(action="perturb", shares=10**12))
    run(strategy, {10: audited_app()})
    row = rows(strategy, 1)[10]
    assert row.action == "excluded"
    assert "would drown it" in row.detail
    assert strategy.strategy.given == [{}]


def test_what_was_not_reproduced_is_perturbed_and_not_said_to_meet_its_target():
    def adam(model, batches):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for inputs, labels in record_batches(batches):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    strategy = audit("perturb")
    run(strategy, {10: audited_app(train=adam)})
    row = rows(strategy, 1)[10]
    assert row.status is Status.UNVERIFIED
    assert row.action == "perturbed"
    assert row.passed_leakage == row.leakage.upper
    assert "not reproduced" in row.detail


@pytest.mark.parametrize("action", ["perturb", "exclude"])
def test_refusing_is_no_way_round_a_policy(action):
    silent = new_app(InversionAuditMod(hand_over_batches=False))
    strategy = audit(action)
    run(strategy, {10: silent})
    assert rows(strategy, 1)[10].action == "excluded"
    lenient = audit(action, on_audit_failure="continue")
    run(lenient, {10: silent})
    assert rows(lenient, 1)[10].action == "passed"


def test_a_client_cannot_take_another_s_name_for_its_target():
    def impostor(message, context, call_next):
        reply = call_next(message, context)
        head = json.loads(reply.content[REPORT_KEY]["head"])
        if message.content["config"]["server-round"] == 2:
            reply.content[REPORT_KEY]["head"] = json.dumps({**head, "client": "10"})
        return reply

    strategy = audit(Policy(action="perturb", targets={"10": 0.9}))
    run(strategy, {10: audited_app(), 20: audited_app(impostor)}, rounds=2)
    assert rows(strategy, 2)[10].target_leakage == 0.9
    assert rows(strategy, 2)[20].target_leakage == TARGET
    assert rows(strategy, 2)[20].client == "20"
