"""Noise on inputs that the server puts on: done where audits are, within their time limit, and never silently less."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import ray
import torch
from flwr.app import RecordDict

from fl_privacy.audit import AuditSettings, AuditTask, Policy, RayExecutor, SerialExecutor, Status, TrainingTrace
from fl_privacy.audit.deadline import DeadlineError
from fl_privacy.audit.input_noise import draw_for_examples
from fl_privacy.audit.replay import AuditContext
from fl_privacy.errors import InvalidInputError
from fl_privacy.flower.protection import InputAdvice, KeptNoise
from fl_privacy.influence.update import GradientUpdate
from fl_privacy.strategies.shifting import NotShifted, ShiftTask, _shift

from .cases import LR, audited_app, batches_of, new_model
from .test_input_noise import audit, change, shifted_batches, trained_on
from .test_policies import rows, run
from .unsettled import WIDEST, UnsettledModel

NODES = (10, 20)
TARGET = 0.05
LATE = "the noise is isotropic, not shaped: it was not computed within the time limit"


@pytest.fixture
def order(tmp_path):
    return tmp_path / "order"


class Rounds:
    """A federation whose server shapes noise; before each round, what becomes of noisy inputs and the time there is.

    Args:
        order: The model's file.
        plan: By round, the order (`None`: all is well) and the time limit in seconds.
    """

    def __init__(self, order, plan, **options):
        self.order, self.plan = order, plan
        policy = Policy(action="perturb", family="shaped", seed=5)
        self.strategy = audit(policy, model=self.model, target=TARGET, callbacks=[self], **options)
        self.on_round(0, [])
        run(self.strategy, {node: audited_app(model=self.model, count=2) for node in NODES}, rounds=len(plan))

    def model(self):
        return UnsettledModel(self.order)

    def on_round(self, server_round, _rows):
        if server_round < len(self.plan):
            order, limit = self.plan[server_round]
            self.strategy._auditor._time_limit = limit
            self.order.unlink(missing_ok=True)
            if order is not None:
                self.order.write_text(order)

    def kept(self, client):
        return KeptNoise.read(self.strategy._actions._shifting._states[client])


def assert_shaped(rounds, server_round):
    """What was passed on is the update at inputs with the noise that is kept."""
    for node in NODES:
        row = rows(rounds.strategy, server_round)[node]
        assert (row.action, row.input_noise, row.detail) == ("perturbed", "client", "")
        assert row.applied_noise_std is None
        assert row.passed_leakage == TARGET
        batches = shifted_batches(rounds.kept(row.client), node)
        assert max(float(inputs.abs().max()) for inputs, _ in batches) > WIDEST
        sent = rounds.strategy.strategy.global_arrays[server_round - 1]
        np.testing.assert_allclose(change(rounds.strategy, server_round, node), trained_on(sent, batches), atol=2e-6)


def passed_in_all(rounds, server_round):
    return [rows(rounds.strategy, server_round)[node].rounds_passed_leakage.upper for node in NODES]


def assert_isotropic(rounds, server_round, detail):
    for node in NODES:
        row = rows(rounds.strategy, server_round)[node]
        assert row.status is Status.AUDITED
        assert (row.action, row.input_noise, row.input_noise_leakage) == ("perturbed", "", None)
        assert detail in row.detail
        assert row.applied_noise_std == row.required_noise_std > 0
        assert row.passed_leakage == TARGET
        # The noise that the row tells of is there.
        sent = rounds.strategy.strategy.global_arrays[server_round - 1]
        noise = change(rounds.strategy, server_round, node) - trained_on(sent, batches_of(node, count=2))
        assert abs(np.sqrt(np.mean(noise**2)) / row.applied_noise_std - 1) < 5 / math.sqrt(2 * noise.size)


def test_what_is_late_is_isotropic_and_says_so_and_the_next_round_is_shaped(order):
    rounds = Rounds(order, [("3", 6.0), (None, 100.0)])
    assert_isotropic(rounds, 1, LATE)
    assert_shaped(rounds, 2)


def test_no_time_that_the_audit_left_is_no_time():
    class Slow(SerialExecutor):
        """Has audited everything at the very end of the time."""

        def run(self, *args, deadline):
            yield from super().run(*args, deadline=deadline)
            strategy._auditor._deadline = 0.0

    strategy = audit(Policy(action="perturb", family="shaped"), target=TARGET, executor=Slow())
    run(strategy, {10: audited_app(count=2)})
    row = rows(strategy, 1)[10]
    assert (row.action, row.detail) == ("perturbed", LATE)
    assert row.applied_noise_std == row.required_noise_std


def test_an_executor_that_fails_leaves_isotropic_noise():
    class Broken(SerialExecutor):
        def work(self, job, *args, **options):
            if job.do is _shift:
                raise RuntimeError("no workers")
            return super().work(job, *args, **options)

    strategy = audit(Policy(action="perturb", family="shaped"), target=TARGET, executor=Broken())
    run(strategy, {10: audited_app(count=2)})
    row = rows(strategy, 1)[10]
    assert row.action == "perturbed"
    assert row.detail == "the noise is isotropic, not shaped: RuntimeError: no workers"
    assert row.applied_noise_std == row.required_noise_std


def test_where_even_isotropic_noise_is_not_known_what_is_late_is_left_out():
    class Late(SerialExecutor):
        def run(self, *args, deadline):
            for chunk in super().run(*args, deadline=deadline):
                strategy._auditor._deadline = 0.0
                for row in chunk:
                    object.__setattr__(row, "required_noise_std", math.inf)
                yield chunk

    strategy = audit(Policy(action="perturb", family="shaped"), target=TARGET, executor=Late())
    run(strategy, {10: audited_app(count=2)})
    row = rows(strategy, 1)[10]
    assert row.action == "excluded"
    assert row.detail == f"{LATE}; no noise is known to bring it to its target"
    assert strategy.strategy.given == [{}]


def a_shift_task(state=None):
    (inputs, labels), *_ = batches_of(10)
    model = new_model()
    client = AuditTask(
        server_round=1,
        client="10",
        node_id=10,
        shared={name: p.detach().numpy() for name, p in model.named_parameters()},
        inputs=inputs.numpy(),
        labels=labels.numpy(),
        trace=TrainingTrace(optimizer="SGD", batches=((0, 1, 2, 3),), lr=(LR,)),
    )
    advice = InputAdvice(target_leakage=TARGET, prior_std=1.0)
    task = ShiftTask(client=client, advice=advice, state=state or RecordDict(), generator=np.random.default_rng(0))
    context = AuditContext(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        settings=AuditSettings(prior_std=1.0, data_range=2.0),
        versions={},
    )
    return context, {name: array.numpy() for name, array in model.state_dict().items()}, task


def test_a_draw_that_is_cut_short_keeps_nothing():
    """The state of a client changes only with an update that is passed on."""
    context, params, task = a_shift_task()
    (done,) = _shift(context, params, [task], "cpu", math.inf)
    assert len(KeptNoise.read(done.state).draws) == 4
    assert not task.state
    (late,) = _shift(context, params, [task], "cpu", 0.0)
    assert late == NotShifted(node_id=10, reason="it was not computed within the time limit")
    assert not task.state


def test_the_time_is_looked_at_between_products():
    model, (inputs, labels) = new_model(), batches_of(1)[0]
    passes = []

    def stop():
        passes.append(None)
        if len(passes) == 7:
            raise DeadlineError

    with pytest.raises(DeadlineError):
        draw_for_examples(
            GradientUpdate(model, torch.nn.CrossEntropyLoss()),
            {name: p.detach() for name, p in model.named_parameters()},
            inputs,
            labels,
            target_leakage=0.25,
            prior_std=1.0,
            generator=np.random.default_rng(0),
            before_pass=stop,
        )
    assert len(passes) == 7


def test_what_goes_wrong_at_one_client_is_its_reason_alone():
    context, params, task = a_shift_task()
    bad = ShiftTask(
        client=task.client,
        advice=InputAdvice(target_leakage=2.0, prior_std=1.0),
        state=RecordDict(),
        generator=np.random.default_rng(0),
    )
    failed, done = _shift(context, params, [bad, task], "cpu", math.inf)
    assert failed.reason.startswith(InvalidInputError.__name__)
    assert done.leakage <= TARGET * (1 + 1e-6)


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_workers_give_what_this_process_gives_and_may_hang_or_die(order):
    """Round 2 hangs in the workers and round 3 ends them; rounds 1 and 4 are as if nothing had been."""
    plan = [(None, 200.0), ("600", 10.0), ("die", 200.0), (None, 200.0)]
    rounds = Rounds(order, plan, executor=RayExecutor(num_workers=2))
    assert_shaped(rounds, 1)
    assert_isotropic(rounds, 2, LATE)
    assert_isotropic(rounds, 3, "3 workers died while working on it")
    assert_shaped(rounds, 4)
    # Isotropic noise leaks anew; what is shaped is kept, and counts once.
    for server_round, shares in enumerate((1, 2, 3, 3), start=1):
        assert passed_in_all(rounds, server_round) == pytest.approx([shares * TARGET] * len(NODES), rel=1e-5)
    serial = Rounds(order, [(None, 200.0)])
    for node in NODES:
        ours, theirs = rows(rounds.strategy, 1)[node], rows(serial.strategy, 1)[node]
        assert ours.input_noise_rms == pytest.approx(theirs.input_noise_rms, rel=1e-6)
        np.testing.assert_allclose(change(rounds.strategy, 1, node), change(serial.strategy, 1, node), atol=1e-6)
        for key, draw in serial.kept(theirs.client).draws.items():
            np.testing.assert_allclose(rounds.kept(ours.client).draws[key].noise, draw.noise, rtol=1e-5, atol=1e-6)
