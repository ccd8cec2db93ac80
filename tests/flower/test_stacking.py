"""The wrapper together with Flower's differential-privacy strategies, in both orders, with the mods they need."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from torch import nn

from fl_privacy.audit import AuditSettings, Status
from fl_privacy.flower import InversionAuditMod
from fl_privacy.strategies import InversionAudit

from .cases import LocalGrid, audited_app, new_app, new_model

NODES = (10, 20, 30)
CLIP = 1e-3
"""Far below the norm of any client's update."""


def audit(inner):
    return InversionAudit(
        inner,
        model=new_model(),
        loss=nn.CrossEntropyLoss(),
        settings=AuditSettings(max_examples=2),
        ledger=None,
        show=False,
    )


def fed_avg():
    return FedAvg(fraction_evaluate=0.0)


def server_side(inner, noise=0.0):
    return DifferentialPrivacyServerSideFixedClipping(inner, noise, CLIP, len(NODES))


def client_side(inner, noise=0.0):
    return DifferentialPrivacyClientSideFixedClipping(inner, noise, CLIP, len(NODES))


def run(strategy, app, *, rounds=1):
    random.seed(0)
    np.random.seed(0)
    grid = LocalGrid(dict.fromkeys(NODES, app))
    return strategy.start(grid, ArrayRecord(new_model().state_dict()), num_rounds=rounds).arrays


def change(arrays):
    initial = new_model().state_dict()
    return torch.cat([(torch.from_numpy(arrays[n].numpy()) - initial[n]).flatten() for n in initial])


def assert_same_arrays(ours, theirs):
    assert ours is not None
    for name in ours:
        np.testing.assert_array_equal(ours[name].numpy(), theirs[name].numpy())


CASES = {
    "server side": (server_side, audited_app()),
    "client side, our mod inside": (client_side, new_app(fixedclipping_mod, InversionAuditMod(hand_over_batches=True))),
    "client side, our mod outside": (
        client_side,
        new_app(InversionAuditMod(hand_over_batches=True), fixedclipping_mod),
    ),
}


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_model_is_the_one_without_an_audit_and_every_client_has_its_row(name, outside, noise):
    protect, app = CASES[name]
    if outside:
        strategy = inner = audit(fed_avg())
        strategy = protect(inner, noise)
    else:
        strategy = inner = audit(protect(fed_avg(), noise))
    arrays = run(strategy, app)
    if outside:
        inner.close()
    assert_same_arrays(arrays, run(protect(fed_avg(), noise), app))
    assert {(row.status, row.action) for row in inner.estimates} == {(Status.AUDITED, "passed")}
    assert len(inner.estimates) == len(NODES)
    sees_clipped = outside or protect is client_side
    for row in inner.estimates:
        assert row.update_norm > 50 * CLIP
        # A common factor hides nothing: the attacker divides it out, so no more than rounding may be credited.
        assert row.scale == pytest.approx(CLIP / row.update_norm if sees_clipped else 1.0, rel=1e-3)
        assert row.leakage.value > 0.9


def test_clipping_that_adapts_reports_its_bit_beside_our_report():
    protect = DifferentialPrivacyClientSideAdaptiveClipping
    app = new_app(adaptiveclipping_mod, InversionAuditMod(hand_over_batches=True))
    options = {"noise_multiplier": 0.1, "num_sampled_clients": len(NODES), "initial_clipping_norm": CLIP}
    strategy = audit(fed_avg())
    outer = protect(strategy, **options)
    arrays = run(outer, app, rounds=2)
    strategy.close()
    plain = protect(fed_avg(), **options)
    assert_same_arrays(arrays, run(plain, app, rounds=2))
    assert outer.clipping_norm == plain.clipping_norm != CLIP
    assert [row.status for row in strategy.estimates] == [Status.AUDITED] * 6


def test_noise_that_the_server_adds_is_not_credited_to_clients_whose_updates_it_was_added_to():
    strategy = audit(server_side(fed_avg(), noise=100.0))
    arrays = run(strategy, audited_app())
    noise = 100.0 * CLIP / len(NODES)
    assert change(arrays).std() == pytest.approx(noise, rel=0.2)
    assert max(row.noise_std for row in strategy.estimates) < noise / 100
