"""A model that noise on its inputs unsettles; importable in Ray's workers, as tests are not."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor, nn

from .cases import new_model

WIDEST = 6.0
"""Beyond any input element that clients have by chance, and well within what noise for a low target adds."""


class UnsettledModel(nn.Sequential):
    """The small model of the other tests; what it does with inputs beyond `WIDEST` is written in a file.

    Args:
        order: A number of seconds to wait in every pass, or `die`; where there is no such file, all is well.
    """

    def __init__(self, order: Path) -> None:
        super().__init__(*new_model().children())
        self.order = order

    def forward(self, inputs: Tensor) -> Tensor:
        if self.order.exists() and _is_wide(inputs):
            order = self.order.read_text()
            if order == "die":
                os._exit(1)
            time.sleep(float(order))
        outputs: Tensor = super().forward(inputs)
        return outputs


def _is_wide(inputs: Tensor) -> bool:
    try:
        return bool((inputs.detach().abs() > WIDEST).any())
    except RuntimeError:  # inside vmap a tensor has no single value; the engine runs plain batches, too
        return False
