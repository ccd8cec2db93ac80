"""The server: federated averaging, wrapped so that every client is audited in every round."""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import INFO
from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result
from flwr.supercore import log
from torch import nn

from fl_privacy.audit import AuditSettings, Executor, PublicExamples, RayExecutor, SerialExecutor
from fl_privacy.audit.policy import FamilyChoice, Policy, PolicyAction
from fl_privacy.audit.settings import Unit
from fl_privacy.monitoring import RoundCallback, TensorBoardCallback
from fl_privacy.reference import ImageData
from fl_privacy.strategies import InversionAudit
from fl_privacy.strategies.inversion_audit import OnAuditFailure
from vision.pictures import WorstClientPicture
from vision.settings import BLIND_SOURCES, Settings
from vision.task import load_data, new_model
from vision.training import evaluate

CONNECT_SECONDS = 60.0
"""How long the server waits for all clients before it gives up."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation. Any error here fails the run.

    Raises:
        RuntimeError: The clients are not there, or not one of them shared an update.
    """
    settings = Settings.from_run_config(context.run_config)
    data = load_data(settings)
    wait_for_clients(grid, settings.num_clients)
    reference = reference_accuracies(grid, settings, data) if settings.reference_run else []
    strategy = InversionAudit(
        new_inner_strategy(settings),
        model=new_model(settings, data),
        loss=nn.CrossEntropyLoss(),
        source=settings.audit_source,
        public=new_public_examples(settings, data),
        settings=AuditSettings(
            unit=cast(Unit, settings.audit_unit),
            target_leakage=settings.audit_target_leakage,
            max_examples=settings.audit_max_examples,
            prior_std=settings.audit_prior_std or None,
            seed=settings.seed,
        ),
        policy=new_policy(settings),
        executor=new_executor(settings),
        ledger=settings.ledger,
        on_audit_failure=cast(OnAuditFailure, settings.audit_on_failure),
        time_limit=settings.audit_time_limit,
        examine=new_picture(settings, data),
        callbacks=new_callbacks(settings),
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(new_model(settings, data).state_dict()),
        num_rounds=settings.num_server_rounds,
        evaluate_fn=central_evaluation(settings, data),
    )
    if not result.train_metrics_clientapp:
        raise RuntimeError("no client shared an update in any round; the log above has the clients' errors")
    log(INFO, "Test accuracy, before training and after each round: %s", " → ".join(accuracies_of(result)))
    if reference:
        log(INFO, "The same federation without audit and policy:        %s", " → ".join(reference))


def new_policy(settings: Settings) -> Policy:
    """Returns what follows from a leakage."""
    white = settings.audit_noise_family == "white"
    return Policy(
        action=cast(PolicyAction, settings.audit_policy),
        family="shaped" if white else cast(FamilyChoice, settings.audit_noise_family),
        covariance="white" if white else "client",
        shares=settings.audit_shares,
        dry_run=settings.audit_dry_run,
        seed=settings.seed,
    )


def new_public_examples(settings: Settings, data: ImageData) -> PublicExamples | None:
    """Returns test examples in place of the clients' own, for a source that needs them."""
    if settings.audit_source not in BLIND_SOURCES:
        return None
    images, labels = data.test.select(slice(None))
    # Over several steps the learning rate does not make a gradient of an update.
    lr = settings.learning_rate if settings.local_steps == 1 else None
    return PublicExamples(inputs=images.numpy(), labels=labels.numpy(), lr=lr)


def new_picture(settings: Settings, data: ImageData) -> WorstClientPicture | None:
    """Returns what draws the picture, for a run that is to have one; it needs the batches."""
    if not settings.picture or settings.audit_source != "trusted":
        return None
    beside = Path(settings.ledger) if "://" not in settings.ledger else Path("runs/vision")
    return WorstClientPicture(data.train, last_round=settings.num_server_rounds, folder=beside.with_suffix(".pictures"))


def new_callbacks(settings: Settings) -> list[RoundCallback]:
    """Returns who is told of every round: TensorBoard, for a run that names a folder for it."""
    return [TensorBoardCallback(settings.tensorboard)] if settings.tensorboard else []


def new_inner_strategy(settings: Settings) -> FedAvg:
    """Returns the strategy that is audited."""
    return FedAvg(fraction_evaluate=0.0, min_train_nodes=settings.num_clients, min_available_nodes=settings.num_clients)


def reference_accuracies(grid: Grid, settings: Settings, data: ImageData) -> list[str]:
    """Trains the same federation without the wrapper, and returns its accuracies."""
    log(INFO, "First the reference: the same federation without audit and policy")
    result = new_inner_strategy(settings).start(
        grid=grid,
        initial_arrays=ArrayRecord(new_model(settings, data).state_dict()),
        num_rounds=settings.num_server_rounds,
        evaluate_fn=central_evaluation(settings, data),
    )
    return accuracies_of(result)


def accuracies_of(result: Result) -> list[str]:
    """Returns the test accuracies before training and after each round."""
    return [str(metrics["accuracy"]) for metrics in result.evaluate_metrics_serverapp.values()]


def wait_for_clients(grid: Grid, num_clients: int) -> None:
    """Returns once all clients are connected.

    Raises:
        RuntimeError: After `CONNECT_SECONDS` there are fewer, or there are more than expected.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    while (connected := len(list(grid.get_node_ids()))) < num_clients and time.monotonic() < deadline:
        time.sleep(0.5)
    if connected != num_clients:
        raise RuntimeError(
            f"expected the {num_clients} SuperNodes of num-clients={num_clients}, and {connected} are connected: "
            f'start the run with --federation-config "num-supernodes={num_clients}"'
        )


def new_executor(settings: Settings) -> Executor:
    """Returns what runs the audits: Ray actors, or the server's own process for no workers."""
    if settings.audit_workers == 0:
        return SerialExecutor()
    return RayExecutor(num_workers=settings.audit_workers, num_gpus=settings.audit_gpus)


def central_evaluation(settings: Settings, data: ImageData) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Returns the function that measures the global model on the test examples after each round."""
    model = new_model(settings, data)

    def evaluate_round(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = evaluate(model, data.test)
        return MetricRecord({"accuracy": round(accuracy, 4), "loss": round(loss, 4)})

    return evaluate_round
