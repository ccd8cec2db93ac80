"""Audits without the batch, through real messages: at public examples, and at what an attack rebuilds."""

from __future__ import annotations

import io
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn

from fl_privacy.audit import (
    AuditSettings,
    Defence,
    Ledger,
    Policy,
    PublicExamples,
    RayExecutor,
    Source,
    Status,
)
from fl_privacy.audit.table import round_table, summary_table
from fl_privacy.errors import InvalidInputError
from fl_privacy.flower import InversionAuditMod, record_batches
from fl_privacy.flower.records import REPORT_KEY, REQUEST_KEY
from fl_privacy.strategies import InversionAudit

from . import cases
from .cases import CLASSES, SHAPE, LocalGrid, new_app, new_model
from .test_policies import Recording

RATE = cases.LR


def public(count=30, **options):
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(count, *SHAPE, generator=generator).numpy()
    return PublicExamples(inputs=inputs, labels=np.arange(count) % CLASSES, **options)


def audit(source, *, strategy=None, examples=None, model=None, **options):
    defaults = {"ledger": None, "show": False, "settings": AuditSettings(prior_std=1.0, data_range=4.0)}
    return InversionAudit(
        strategy or FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1),
        model=model or new_model(),
        loss=nn.CrossEntropyLoss(),
        source=source,
        public=examples or public(),
        **{**defaults, **options},
    )


def run(strategy, apps, *, model=new_model, config=None, rounds=1):
    random.seed(0)
    grid = LocalGrid(apps)
    strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=rounds, train_config=config)
    return grid, {row.node_id: row for row in strategy.estimates}


def of_size(size, *mods, **options):
    """An app that trains one step on `size` examples."""

    def train(model, batches):
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for batch in record_batches([(inputs[:size], labels[:size]) for inputs, labels in batches]):
            cases.step(model, optimizer, batch)

    def count(content):
        content["metrics"]["num-examples"] = size

    return new_app(*mods, train=train, edit=count, **options)


def noise_mod(std):
    def mod(message, context, call_next):
        reply = call_next(message, context)
        rng = np.random.default_rng(context.node_id)
        arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        noisy = {n: (a + std * rng.normal(size=a.shape)).astype(a.dtype) for n, a in arrays.items()}
        reply.content["arrays"] = ArrayRecord({n: cases.Array(a) for n, a in noisy.items()})
        return reply

    return mod


def test_workers_on_ray_give_the_rows_that_this_process_gives():
    apps = {10: of_size(1), 20: of_size(1), 30: of_size(1, noise_mod(0.05))}
    _, here = run(audit("proxy"), apps)
    _, there = run(audit("proxy", executor=RayExecutor(num_workers=2, address="local")), apps)
    assert sorted(there) == sorted(here) == [10, 20, 30]
    for node, row in here.items():
        other = there[node]
        assert (other.status, other.source, other.detail) == (row.status, row.source, row.detail)
        assert row.required_noise_std > 0
        assert other.required_noise_std == pytest.approx(row.required_noise_std, rel=1e-3)
        assert other.leakage.value == pytest.approx(row.leakage.value, rel=1e-3)


class TestProxy:
    def test_every_client_that_shares_an_update_has_an_approximate_row_with_or_without_the_mod(self, tmp_path):
        strategy = audit("proxy", ledger=tmp_path / "ledger.db")
        grid, rows = run(strategy, {10: of_size(1), 20: of_size(1, InversionAuditMod()), 30: of_size(4)})
        for row in rows.values():
            assert (row.status, row.source, row.verified) == (Status.APPROXIMATE, Source.PROXY, None)
            assert "not at the client's own" in row.detail
            assert "after several, up to a quarter more noise is needed" in row.detail
            assert "batch normalisation" not in row.detail
            needed = row.required_noise_interval
            assert 0 < needed.lower <= row.required_noise_std <= needed.upper
            assert 0.9 < row.leakage.lower <= row.leakage.value <= row.leakage.upper <= 1
        assert "public batches of 4" in rows[30].detail
        assert "labels of a batch are not recovered without the learning rate" in rows[30].detail
        with Ledger.open(tmp_path / "ledger.db") as ledger:
            assert ledger.verify().ok
            stored = {entry.estimate.node_id: entry.estimate for entry in ledger.rows()}
        assert stored[10].required_noise_interval == rows[10].required_noise_interval
        assert all(message.content["config"][REQUEST_KEY] == "claim" for message in grid.sent)

    def test_a_model_with_batch_normalisation_is_told_that_its_intervals_hold_less_often(self):
        normalised = partial(new_model, batch_norm=True)
        strategy = audit("proxy", model=normalised())
        _, rows = run(strategy, {10: of_size(1, model=normalised)}, model=normalised)
        assert "with batch normalisation the intervals held for 58 to 75 % of clients only" in rows[10].detail

    def test_nothing_but_a_claim_leaves_a_client_that_would_hand_over_its_batch(self):
        replies = []

        def watching(message, context, call_next):
            reply = call_next(message, context)
            replies.append(reply)
            return reply

        mod = InversionAuditMod(hand_over_batches=True, defence=Defence(kind="dp", noise_std=0.01))
        strategy = audit("proxy")
        _, rows = run(strategy, {10: of_size(1, watching, mod)})
        (reply,) = replies
        assert set(reply.content[REPORT_KEY]) == {"head"}
        assert len(reply.content[REPORT_KEY]["head"]) < 400
        assert rows[10].claim_holds is False  # no such noise is on it
        assert "noise of 0.01 was to be there" in rows[10].detail

    def test_noise_that_the_update_shows_is_credited_no_further_than_it_is_claimed(self):
        std = 0.05
        honest = of_size(1, noise_mod(std), InversionAuditMod(defence=Defence(kind="dp", noise_std=std)))
        modest = of_size(1, noise_mod(std), InversionAuditMod(defence=Defence(kind="dp", noise_std=std / 10)))
        _, rows = run(audit("proxy"), {10: of_size(1), 20: honest, 30: modest, 40: of_size(1, noise_mod(std))})
        assert rows[20].noise_std <= std
        assert rows[20].noise_std == pytest.approx(std, rel=0.35)
        assert rows[30].noise_std == pytest.approx(std / 10)
        assert rows[40].noise_std == pytest.approx(std, rel=0.35)
        assert rows[10].noise_std < 1e-6
        assert rows[20].leakage.value < rows[30].leakage.value < rows[10].leakage.value

    def test_where_it_is_known_to_fail_the_row_is_unverified_and_says_why(self):
        apps = {10: of_size(1, noise_mod(30.0)), 20: of_size(4), 30: of_size(4, pruning_mod(0.1))}
        _, rows = run(audit("proxy", examples=public(6)), apps)
        assert all(row.status is Status.UNVERIFIED for row in rows.values())
        assert "noise drowns the update" in rows[10].detail
        assert "4 examples behind the update, too many for 6 public ones" in rows[20].detail
        _, rows = run(audit("proxy"), apps)
        assert rows[20].status is Status.APPROXIMATE
        assert "90% of the update is zero" in rows[30].detail
        assert rows[30].leakage.value > 0.9  # its sums are no noise

    def test_a_client_that_does_not_say_on_how_much_it_trained_fails_alone(self):
        def none(content):
            content["metrics"]["num-examples"] = 0

        silent = new_app(edit=none)
        strategy = audit("proxy", on_audit_failure="continue")
        random.seed(0)
        strategy.start(LocalGrid({10: of_size(1), 20: silent}), ArrayRecord(new_model().state_dict()), num_rounds=1)
        rows = {row.node_id: row for row in strategy.estimates}
        assert rows[10].status is Status.APPROXIMATE
        assert rows[20].leakage is None

    def test_tables_show_that_numbers_are_not_exact(self):
        _, rows = run(audit("proxy"), {10: of_size(1)})
        out = io.StringIO()
        for table in (round_table(rows.values()), summary_table(rows.values())):
            Console(file=out, width=120).print(table)
        assert out.getvalue().count("≈ ") == 5  # leakage and noise, in the summary two leakages
        assert "approximate" in out.getvalue()


def pruning_mod(keep):
    def mod(message, context, call_next):
        sent = {n: a.numpy() for n, a in message.content["arrays"].items()}
        reply = call_next(message, context)
        after = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        changes = np.concatenate([np.abs(after[n] - sent[n]).ravel() for n in sent])
        least = np.quantile(changes, 1 - keep)
        arrays = {n: np.where(np.abs(after[n] - sent[n]) > least, after[n], sent[n]) for n in sent}
        reply.content["arrays"] = ArrayRecord({n: cases.Array(a) for n, a in arrays.items()})
        return reply

    return mod


class TestReconstructed:
    def test_one_example_is_rebuilt_and_audited_as_if_it_had_been_handed_over(self):
        settings = AuditSettings(prior_std=1.0, data_range=4.0, max_examples=1)
        _, rows = run(audit("reconstructed", settings=settings), {10: of_size(1)}, config=ConfigRecord({"lr": RATE}))
        trusted = InversionAudit(
            FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1),
            model=new_model(),
            loss=nn.CrossEntropyLoss(),
            ledger=None,
            show=False,
            settings=settings,
        )
        _, true = run(trusted, {10: of_size(1, InversionAuditMod(hand_over_batches=True))})
        row = rows[10]
        assert (row.status, row.source, row.verified) == (Status.APPROXIMATE, Source.RECONSTRUCTED, None)
        assert "misfit" in row.detail
        assert row.leakage.value > 0.99
        assert row.required_noise_std == pytest.approx(true[10].required_noise_std, rel=1e-2)

    def test_an_attack_that_fails_is_a_failure_and_never_safe(self):
        # The labels of the update are those of a batch that it does not come from: nothing explains it.
        def odd(message, context, call_next):
            reply = call_next(message, context)
            rng = np.random.default_rng(0)
            arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
            changed = {n: (a + 0.1 * rng.normal(size=a.shape) * ("0." in n)).astype(a.dtype) for n, a in arrays.items()}
            reply.content["arrays"] = ArrayRecord({n: cases.Array(a) for n, a in changed.items()})
            return reply

        examples = public(lr=RATE, attack_steps=10)
        _, rows = run(audit("reconstructed", examples=examples), {10: of_size(1, odd)})
        assert rows[10].status is Status.AUDIT_FAILED
        assert rows[10].leakage is None
        assert "the attack failed" in rows[10].detail
        assert "nothing is known" in rows[10].detail

    def test_its_time_limit_is_kept(self):
        strategy = audit("reconstructed", examples=public(lr=RATE), time_limit=1e-3)
        _, rows = run(strategy, {10: of_size(4)})
        assert rows[10].status is Status.LATE

    @pytest.mark.parametrize(
        ("examples", "message"),
        [({}, "the learning rate is not known"), ({"lr": RATE, "max_rebuilt": 2}, "1 to 2 examples")],
    )
    def test_what_cannot_be_attacked_says_so(self, examples, message):
        _, rows = run(audit("reconstructed", examples=public(**examples)), {10: of_size(4)})
        assert rows[10].status is Status.AUDIT_FAILED
        assert message in rows[10].detail


@pytest.mark.parametrize("source", ["proxy", "reconstructed"])
def test_the_server_puts_noise_on_updates_whose_batch_it_does_not_see(source):
    shared = {}
    for policy in (Policy(), Policy(action="perturb", seed=3)):
        strategy = audit(source, strategy=Recording(), examples=public(lr=RATE), policy=policy)
        _, rows = run(strategy, {10: of_size(1)})
        (given,) = strategy.strategy.given
        arrays = [given[10].content["arrays"][name].numpy().ravel() for name in new_model().state_dict()]
        shared[policy.action] = np.concatenate(arrays)
    row = rows[10]
    assert (row.source, row.status, row.action) == (Source(source), Status.APPROXIMATE, "perturbed")
    assert row.applied_noise_std >= row.required_noise_std > 0
    noise = shared["perturb"] - shared["report"]
    assert abs(np.sqrt(np.mean(noise**2)) / row.applied_noise_std - 1) < 5 / math.sqrt(2 * noise.size)


class TestOptions:
    @pytest.mark.parametrize("source", ["proxy", "reconstructed"])
    def test_public_examples_are_asked_for(self, source):
        with pytest.raises(InvalidInputError, match=f"public examples for .* got source {source} and public=None"):
            InversionAudit(FedAvg(), model=new_model(), loss=nn.CrossEntropyLoss(), source=source, ledger=None)

    @pytest.mark.parametrize("source", ["trusted", "client"])
    def test_and_not_where_they_are_of_no_use(self, source):
        with pytest.raises(InvalidInputError, match="and for no other"):
            audit(source)

    def test_they_must_fit_the_model(self):
        wrong = PublicExamples(inputs=np.zeros((4, 1, 5, 5), np.float32), labels=np.arange(4) % CLASSES)
        with pytest.raises(InvalidInputError, match=r"that the model takes, got inputs \[1, 5, 5\]"):
            audit("proxy", examples=wrong)

    @pytest.mark.parametrize("options", [{"unit": "batch"}, {"batch_norm": "train"}])
    def test_what_public_examples_cannot_stand_in_for(self, options):
        with pytest.raises(InvalidInputError, match="public examples stand in one by one"):
            audit("proxy", settings=AuditSettings(**options))


def digits_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 10))


def test_on_digits_proxy_rows_say_what_trusted_rows_do():
    """A trained model, twelve clients of one image each, which differ in the noise that they need by far."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    model = digits_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        chosen = torch.randint(1000, (32,), generator=generator)
        optimizer.zero_grad()
        outputs = model(torch.from_numpy(images[chosen]))
        nn.functional.cross_entropy(outputs, torch.from_numpy(digits.target[chosen])).backward()
        optimizer.step()

    def app(client):
        def train(net, _):
            batch = torch.from_numpy(images[client : client + 1]), torch.from_numpy(digits.target[client : client + 1])
            for drawn in record_batches([batch]):
                cases.step(net, torch.optim.SGD(net.parameters(), lr=0.1), drawn)

        def count(content):
            content["metrics"]["num-examples"] = 1

        return new_app(InversionAuditMod(hand_over_batches=True), train=train, edit=count, model=digits_model)

    apps = {100 + client: app(client) for client in range(12)}
    settings = AuditSettings(prior_std=0.3, data_range=1.0, max_examples=1)
    examples = PublicExamples(inputs=images[1200:1500], labels=digits.target[1200:1500])
    _, says = run(audit("proxy", model=model, examples=examples, settings=settings), apps, model=lambda: model)
    trusted = InversionAudit(
        FedAvg(fraction_evaluate=0.0),
        model=model,
        loss=nn.CrossEntropyLoss(),
        settings=settings,
        ledger=None,
        show=False,
    )
    _, true = run(trusted, apps, model=lambda: model)
    needed = np.array([true[node].required_noise_std for node in apps])
    predicted = np.array([says[node].required_noise_std for node in apps])
    ranks = np.corrcoef(needed.argsort().argsort(), predicted.argsort().argsort())[0, 1]
    assert math.log10(needed.max() / needed.min()) > 1
    assert ranks > 0.9
    assert np.median(np.abs(predicted / needed - 1)) < 0.25
    assert {row.status for row in says.values()} == {Status.APPROXIMATE}
    assert {row.status for row in true.values()} == {Status.AUDITED}
