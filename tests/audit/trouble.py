"""A model that makes trouble inside a worker, and what is asked of workers; importable there, as tests are not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import ray
import torch
from torch import Tensor, nn

HANGS, DIES = 11.0, 12.0
"""Input elements that no client has by chance: the worker that audits one hangs the first time, or always dies."""


class TroubledModel(nn.Module):
    """A small model that is fine where it was made, and minds marked inputs elsewhere.

    Args:
        hung: A file that is written when a worker hangs, with its process id. Where it exists, none hangs.
    """

    def __init__(self, hung: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
        self.home = os.getpid()
        self.hung = hung

    def forward(self, inputs: Tensor) -> Tensor:
        if os.getpid() != self.home:
            if _has(inputs, DIES):
                os._exit(1)
            if _has(inputs, HANGS) and not self.hung.exists():
                self.hung.write_text(str(os.getpid()))
                time.sleep(600)
        outputs: Tensor = self.body(inputs)
        return outputs


def _has(inputs: Tensor, mark: float) -> bool:
    try:
        return bool((inputs.detach() == mark).any())
    except RuntimeError:  # inside vmap a tensor has no single value; the engine runs plain batches, too
        return False


def place_of(_worker: object) -> tuple[str, int]:
    """Returns the node and the process id of the actor that runs it."""
    return ray.get_runtime_context().get_node_id(), os.getpid()
