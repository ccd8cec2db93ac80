"""How much memory the graph of a loss takes, known before it is built."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from fl_privacy.influence.update import UpdateMap

_PROBED = 4
"""Most examples of a model that has to be run to know."""


def graph_bytes(update: UpdateMap, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> int:
    """Returns the bytes that an update's largest graph of second derivatives keeps, before there is one.

    The model is run on torch's meta device, which computes nothing and holds nothing. One that cannot be run there (it
    looks at values, or has tensors that are neither parameters nor buffers) is run at two and at four of its examples,
    and the others are taken to add in proportion.

    Args:
        update: The update map.
        params: Parameters by name.
        inputs: `[1, N, *shape]`; several lanes in one vectorised pass can keep more than as much each.
        labels: `[1, N, ...]`.
    """
    x, y = (update.largest_batch(tensor.to("meta")) for tensor in (inputs, labels))
    try:
        on_meta = {name: tensor.to("meta") for name, tensor in params.items()}
        # A copy, of the model too: what either remembers of a pass there is of no use elsewhere.
        probe = copy.copy(update)
        probe.model = copy.deepcopy(update.model)
        return saved_bytes(probe, on_meta, x, y)
    except Exception:  # whatever a user's model raises where it finds no values
        count = x.shape[1]
        most = min(count, _PROBED, inputs.shape[1])
        few = max(1, most // 2)
        lower, upper = (saved_bytes(update, params, inputs[:, :size], labels[:, :size]) for size in (few, most))
        return upper + (upper - lower) * (count - most) // max(1, most - few)


def saved_bytes(update: UpdateMap, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> int:
    """Returns the bytes that one graph of second derivatives keeps, of all lanes, by building it."""
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage
        return tensor.detach()  # the tensor itself would keep its graph alive, which would keep the tensor

    theta = update.layout.flatten(params).expand(len(inputs), -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        update.graph(params, theta, inputs, labels)
    return sum(storage.nbytes() for storage in held.values())
