"""A plain quickstart-shaped app under Flower's simulation engine, run twice: as it is, and audited.

python -m flower.simulated LEDGER OUTPUT
"""

from __future__ import annotations

import random
import sys

import numpy as np
import ray
from flwr.app import ArrayRecord, Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from fl_privacy.audit import AuditSettings, RayExecutor
from fl_privacy.strategies import InversionAudit

from .cases import audited_app, new_model

NODES, ROUNDS = 3, 2


def run_both(grid: Grid, ledger: str, output: str) -> None:
    """Writes both runs' arrays, and whether the auditor used the simulation's own cluster."""

    def fed_avg() -> FedAvg:
        random.seed(0)
        return FedAvg(fraction_evaluate=0.0, min_train_nodes=NODES, min_available_nodes=NODES)

    initial = ArrayRecord(new_model().state_dict())
    plain = fed_avg().start(grid, initial, num_rounds=ROUNDS).arrays
    executor = RayExecutor(num_workers=1)
    audited = InversionAudit(
        fed_avg(),
        model=new_model(),
        loss=nn.CrossEntropyLoss(),
        settings=AuditSettings(max_examples=2),
        executor=executor,
        ledger=ledger,
        run_id="simulated",
    )
    arrays = audited.start(grid, initial, num_rounds=ROUNDS).arrays
    np.savez(
        output,
        attached=np.array(ray.is_initialized() and executor.workers == []),
        **{f"plain/{name}": array.numpy() for name, array in plain.items()},
        **{f"audited/{name}": array.numpy() for name, array in arrays.items()},
    )


def client_app() -> ClientApp:
    return audited_app(count=2)


if __name__ == "__main__":
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        run_both(grid, sys.argv[1], sys.argv[2])

    run_simulation(
        server_app=server,
        client_app=client_app(),
        num_supernodes=NODES,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2}},
    )
