"""A server that audits on one Ray worker, and goes on with whoever is left."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from faulty.task import GatedLoss, new_model
from fl_privacy.audit import AuditSettings, RayExecutor
from fl_privacy.strategies import InversionAudit

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    strategy = InversionAudit(
        FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1),
        model=new_model(),
        loss=GatedLoss(str(config["gates"])),
        settings=AuditSettings(max_examples=1, prior_std=1.0, data_range=4.0),
        executor=RayExecutor(num_workers=1),
        ledger=str(config["ledger"]),
    )
    initial = ArrayRecord(new_model().state_dict())
    strategy.start(grid, initial, num_rounds=int(config["num-server-rounds"]))
