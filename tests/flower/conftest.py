"""Every test of this folder makes messages outside of a run, and its models are too small for threads."""

from __future__ import annotations

import pytest
import torch
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


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
