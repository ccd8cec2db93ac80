"""Clients and a strategy of the older API under Flower's simulation engine.

python -m flower.older_simulated LEDGER secure|advised

Under secure aggregation each client audits itself. Where they are advised, they hand over their batches, and there are
two runs: one for each family of noise.
"""

from __future__ import annotations

import sys

from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.simulation import run_simulation
from torch import nn

from fl_privacy.audit import AuditSettings, Policy
from fl_privacy.flower import AuditedClient
from fl_privacy.strategies import OlderInversionAudit

from .cases import new_model
from .test_older_api import TARGET, Trainer

NODES, ROUNDS = 3, 2
LEDGER, KIND = sys.argv[1:]
SECURE = KIND == "secure"
POLICIES = (
    {"secure": Policy(action="advise")}
    if SECURE
    else {family: Policy(action="advise", family=family) for family in ("isotropic", "shaped")}
)


def client_fn(context):
    client: NumPyClient = Trainer(int(context.node_config["partition-id"]))
    if SECURE:
        return AuditedClient(client, context, model=new_model(), loss=nn.CrossEntropyLoss())
    return AuditedClient(client, context, hand_over_batches=True)


def client_app() -> ClientApp:
    return ClientApp(client_fn=client_fn, mods=[secaggplus_mod] if SECURE else [])


def run(grid, context, name: str, policy: Policy) -> None:
    strategy = OlderInversionAudit(
        FedAvg(
            fraction_evaluate=0.0,
            min_fit_clients=NODES,
            min_available_clients=NODES,
            initial_parameters=ndarrays_to_parameters([v.numpy() for v in new_model().state_dict().values()]),
        ),
        model=new_model(),
        loss=nn.CrossEntropyLoss(),
        source="client" if SECURE else "trusted",
        policy=policy,
        settings=AuditSettings(max_examples=2, prior_std=1.0, data_range=4.0, target_leakage=TARGET),
        ledger=LEDGER,
        run_id=name,
    )
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=ROUNDS), strategy=strategy)
    workflow = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2) if SECURE else None
    DefaultWorkflow(fit_workflow=workflow)(grid, legacy) if workflow else DefaultWorkflow()(grid, legacy)
    strategy.close()


if __name__ == "__main__":
    server = ServerApp()

    @server.main()
    def main(grid, context) -> None:
        for name, policy in POLICIES.items():
            run(grid, context, name, policy)

    run_simulation(
        server_app=server,
        client_app=client_app(),
        num_supernodes=NODES,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2}},
    )
