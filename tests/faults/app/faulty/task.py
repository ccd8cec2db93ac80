"""What both sides share: a small model, and gates at which a process waits to be killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def pass_gate(folder: str, name: str) -> None:
    """Waits as long as the test holds the gate, and first says which process it is that waits there."""
    gate = Path(folder) / name
    if gate.exists():
        written = gate.with_suffix(f".{os.getpid()}")
        written.write_text(str(os.getpid()))
        written.rename(gate.with_suffix(".pid"))
    while gate.exists():
        time.sleep(0.05)


class GatedLoss(nn.CrossEntropyLoss):
    """Cross entropy behind a gate."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        pass_gate(self.folder, "audit")
        return super().forward(input, target)
