"""What client and server agree on: the model, the data and who holds which part of it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset
from flwr.app import Context, Message
from flwr_datasets.partitioner import DirichletPartitioner
from torch import Tensor, nn

from fl_privacy.reference import ImageData, build_model, load_dataset
from vision.settings import Settings

MIN_PARTITION_SIZE = 10
"""Examples that every client has at least, where there are enough for everyone to have a few times as many."""


@lru_cache(maxsize=2)
def load_data(settings: Settings) -> ImageData:
    """Returns the data set of the run. A process serves many clients, so it keeps the set it has read."""
    return load_dataset(settings.dataset, root=settings.data_root, image_size=settings.image_size)


def new_model(settings: Settings, data: ImageData) -> nn.Module:
    """Returns the model of the run with the initial parameters that its seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return build_model(settings.model, input_shape=data.input_shape, num_classes=data.num_classes)


def partition_indices(settings: Settings, partition_id: int) -> Tensor:
    """Returns the indices `[k]` of the training examples that one client holds.

    Parts are non-IID: for each class, the share of every client is drawn from a Dirichlet distribution.
    """
    return torch.tensor(_partitions(settings)[partition_id])


@lru_cache(maxsize=2)
def _partitions(settings: Settings) -> tuple[tuple[int, ...], ...]:
    labels = load_data(settings).train.labels
    partitioner = DirichletPartitioner(
        num_partitions=settings.num_clients,
        partition_by="label",
        alpha=settings.dirichlet_alpha,
        min_partition_size=max(1, min(MIN_PARTITION_SIZE, len(labels) // (8 * settings.num_clients))),
        seed=settings.seed,
    )
    partitioner.dataset = Dataset.from_dict({"index": range(len(labels)), "label": labels.tolist()})
    return tuple(tuple(partitioner.load_partition(client)["index"]) for client in range(settings.num_clients))


def partition_id(context: Context, settings: Settings) -> int:
    """Returns which part of the data this client holds.

    Raises:
        ValueError: The federation has another number of clients than the run config says.
    """
    num_partitions = int(context.node_config["num-partitions"])
    if num_partitions != settings.num_clients:
        raise ValueError(
            f"the federation has {num_partitions} SuperNodes, and num-clients={settings.num_clients}: "
            f'make them equal, for example with --federation-config "num-supernodes={settings.num_clients}"'
        )
    return int(context.node_config["partition-id"])


def client_seed(settings: Settings, message: Message, client: int) -> int:
    """Returns the seed of all that is random at one client in the round that a message to it belongs to."""
    server_round = message.content.config_records["config"]["server-round"]
    if not isinstance(server_round, int):
        raise ValueError(f"expected server-round to be an integer, got {server_round!r}")
    return int(np.random.SeedSequence((settings.seed, server_round, client)).generate_state(1)[0])
