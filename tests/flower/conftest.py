"""Every test of this folder makes messages outside of a run."""

from __future__ import annotations

import pytest
from flwr.supercore.task_identity import TaskIdentity


@pytest.fixture(autouse=True)
def _task_identity(monkeypatch):
    """Lets messages be made, as Flower does in the processes that it starts."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(autouse=True)
def _no_vote(monkeypatch):
    """Leaves it to each test what the environment says of handing batches over."""
    monkeypatch.delenv("FL_PRIVACY_HAND_OVER_BATCHES", raising=False)
