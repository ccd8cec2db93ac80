"""A floor of clipping and constant noise: an ε per client over its rounds, beside its leakage."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord

from fl_privacy.audit import Policy, Status
from fl_privacy.audit.table import summary_table
from fl_privacy.differential_privacy import GaussianFloor
from fl_privacy.errors import InvalidInputError, RecordError
from fl_privacy.flower import InversionAuditMod
from fl_privacy.flower.advice import clipped
from fl_privacy.flower.records import REPORT_KEY

from .cases import audited_app, new_app, new_model
from .test_policies import NODES, PARAMETERS, assert_noise, audit, flat, rows, run

C, Z, DELTA = 0.02, 0.5, 1e-5
SIGMA = 2 * C * Z


def floor(action, **options):
    return Policy(action=action, clip_norm=C, noise_multiplier=Z, delta=DELTA, **options)


def change(strategy, server_round, node):
    sent = strategy.strategy.global_arrays[server_round - 1]
    shared = strategy.strategy.given[server_round - 1][node].content["arrays"]
    return flat({name: shared[name].numpy().astype(np.float64) - sent[name] for name in PARAMETERS})


@pytest.mark.parametrize("action", ["advise", "perturb"])
def test_every_update_is_clipped_and_noisy_from_the_first_round_and_epsilon_grows_with_the_rounds(action):
    pytest.importorskip("opacus")
    strategy, plain = audit(floor(action)), audit("report")
    run(strategy, {node: audited_app() for node in NODES}, rounds=3)
    run(plain, {node: audited_app() for node in NODES})
    for node in NODES:
        undefended = change(plain, 1, node)
        noise = change(strategy, 1, node) - undefended * min(1.0, C / np.linalg.norm(undefended))
        assert np.linalg.norm(undefended) > C
        assert_noise(noise, SIGMA)
        for server_round in (1, 2, 3):
            row = rows(strategy, server_round)[node]
            assert row.applied_noise_std == SIGMA
            assert row.delta == DELTA
            assert row.epsilon == GaussianFloor(noise_multiplier=Z, rounds=server_round).epsilon(DELTA)
            assert row.leakage is not None  # another number, which is there as ever
    headings = [column.header for column in summary_table(strategy.estimates).columns]
    assert "ε (δ 1e-05)" in headings


def test_a_round_without_the_floor_leaves_no_epsilon_whatever_becomes_of_the_update(monkeypatch):
    pytest.importorskip("opacus")
    strategy = audit(floor("advise"), on_audit_failure="exclude")
    apps = {10: audited_app(), 20: new_app(InversionAuditMod(hand_over_batches=False))}
    monkeypatch.setenv("FL_PRIVACY_FOLLOW_ADVICE", "no")
    run(strategy, apps)
    for node in NODES:
        row = rows(strategy, 1)[node]
        assert row.epsilon == math.inf
        assert "did not say that it clipped" in row.detail
    assert rows(strategy, 1)[20].status is Status.REFUSED
    assert rows(strategy, 1)[20].action == "excluded"


def test_an_update_that_cannot_be_clipped_is_not_shared():
    pytest.importorskip("opacus")

    def ruin(model, batches):
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)

    strategy = audit(floor("advise"))
    run(strategy, {10: audited_app(), 20: audited_app(train=ruin)})
    good, bad = (rows(strategy, 1)[node] for node in NODES)
    assert good.epsilon < math.inf
    assert (bad.status, bad.epsilon) == (Status.CLIENT_ERROR, None)
    assert "nothing is shared, as the floor could not be put on the update" in bad.detail


def test_noise_that_a_client_says_it_put_on_and_did_not_is_no_epsilon():
    pytest.importorskip("opacus")

    def lying(message, context, call_next):
        reply = call_next(message, context)
        head = json.loads(reply.content[REPORT_KEY]["head"])
        reply.content[REPORT_KEY] = ConfigRecord(
            {**reply.content[REPORT_KEY], "head": json.dumps({**head, "applied_noise_std": SIGMA})}
        )
        return reply

    strategy = audit(floor("advise"))
    refusing = InversionAuditMod(hand_over_batches=True, follow_advice=False)
    run(strategy, {10: audited_app(), 20: new_app(lying, refusing)})
    honest, liar = (rows(strategy, 1)[node] for node in NODES)
    assert (honest.claim_holds, honest.epsilon < math.inf) == (True, True)
    assert (liar.claim_holds, liar.epsilon) == (False, math.inf)
    assert "less than what it says that it put on" in liar.detail
    assert "no ε is counted for noise that is not there" in liar.detail


def test_clipping_shortens_long_updates_and_leaves_short_ones_and_buffers():
    sent = {"weight": np.zeros(4, np.float32), "counter": np.array(3)}
    for norm, left in ((4.0, 1.0), (0.5, 0.5)):
        arrays = ArrayRecord({"weight": torch.full((4,), norm / 2), "counter": torch.tensor(7)})
        after = clipped(arrays, sent, ("weight",), 1.0)
        assert np.linalg.norm(after["weight"].numpy()) == pytest.approx(left)
        assert after["counter"].numpy() == 7
    with pytest.raises(RecordError, match="finite update to clip"):
        clipped(ArrayRecord({"weight": torch.full((4,), math.nan)}), sent, ("weight",), 1.0)


def test_a_floor_that_is_none_is_refused():
    cases = [
        ({"clip_norm": 1.0}, "together"),
        ({"clip_norm": -1.0, "noise_multiplier": 1.0}, "clip_norm > 0"),
        ({"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1.0}, "delta strictly"),
        ({"clip_norm": 1.0, "noise_multiplier": 1.0, "family": "shaped"}, "family isotropic"),
    ]
    for options, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            Policy(action="advise", **options)
    pytest.importorskip("opacus")
    with pytest.raises(InvalidInputError, match="buffers that training changes"):
        audit(floor("advise"), model=lambda: new_model(batch_norm=True))
