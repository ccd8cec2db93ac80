"""Every Python block of the README and of docs/ runs, page by page, each after those before it on its page."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import FedAvg
from torch import nn
from typer.testing import CliRunner

from fl_privacy.audit import AuditSettings
from fl_privacy.cli import app
from fl_privacy.strategies import InversionAudit

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def train_fn(model, loader, *_):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return 0.0


def app_context() -> Context:
    config = {"partition-id": 0, "num-partitions": 1}
    return Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})


LOADER = [(torch.ones(2, 1, 2, 2), torch.tensor([0, 1]))]
QUICKSTART = {
    "torch": torch,
    "ArrayRecord": ArrayRecord,
    "AuditSettings": AuditSettings,
    "ClientApp": ClientApp,
    "Context": Context,
    "FedAvg": FedAvg,
    "InversionAudit": InversionAudit,
    "LocalDpMod": LocalDpMod,
    "Message": Message,
    "Net": net,
    "context": app_context(),
    "device": "cpu",
    "epochs": 1,
    "grid": None,
    "images": LOADER[0][0].numpy(),
    "labels": LOADER[0][1].numpy(),
    "load_data": lambda *_: (LOADER, LOADER),
    "lr": 0.1,
    "model": net(),
    "msg": types.SimpleNamespace(content={"arrays": ArrayRecord(net().state_dict())}),
    "train_fn": train_fn,
    "trainloader": LOADER,
}
"""What an app in the shape of Flower's quickstart has around the fragments that README.md and deploy.md show of it."""


def noise_setup() -> dict[str, object]:
    """What the block of noise.md takes as given: the Jacobian of one image's gradient, and the names it calls."""
    import fl_privacy
    from fl_privacy import influence as engine

    model = net().double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    update = fl_privacy.GradientUpdate(model, nn.CrossEntropyLoss())
    names = ("estimate_spectrum", "recommend_noise", "sample_input_noise")
    found = {name: getattr(fl_privacy, name, None) or getattr(engine, name) for name in names}
    inputs = torch.rand(1, 1, 1, 2, 2, dtype=torch.float64)
    return {**found, "jacobian": fl_privacy.UpdateJacobian(update, params, inputs, torch.tensor([[1]]))}


COMPLETED = {
    "README.md": {"result = strategy.start(": "result = lambda **_: None\nresult("},
    "deploy.md": {
        "LocalDpMod(...)": "LocalDpMod(1.0, 1.0, 100.0, 1e-5)",
        "record_batches(trainloader), ...)": "record_batches(trainloader))",
        "postgresql+psycopg://audit@db.example/ledger": "ledger.db",
    },
    "live-metrics.md": {"port=9464": "port=0"},  # a port that is free wherever the tests run
}
"""What is put in the place of dots, of a database, and of a federation to start."""


def stand_in_for_wandb(logged: list) -> types.ModuleType:
    module = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None)
    module.init = lambda project: run
    return module


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logged = []
    monkeypatch.setitem(sys.modules, "wandb", stand_in_for_wandb(logged))
    namespace = {"__name__": page.stem, **(QUICKSTART if page.name in ("README.md", "deploy.md") else {})}
    if page.name == "noise.md":
        namespace |= noise_setup()
    text = page.read_text()
    for found in BLOCK.finditer(text):
        code, line = found.group(1), text[: found.start()].count("\n") + 1
        for shown, instead in COMPLETED.get(page.name, {}).items():
            code = code.replace(shown, instead)
        # Line numbers in a traceback are the page's.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
        if "def train(msg" in code:
            namespace["train"](namespace["msg"], namespace["context"])
    if page.name == "live-metrics.md":
        from fl_privacy import LeakageEstimate, Status
        from fl_privacy.monitoring.callback import close_all

        rows = [LeakageEstimate(server_round=1, client="a", status=Status.NO_REPLY)]
        for callback in namespace["callbacks"]:
            callback.on_round(1, rows)
        close_all(namespace["callbacks"])
        assert logged == [(1, {"above target": 0})]


def test_the_command_of_the_first_audit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "first-audit.md").read_text()
    first, second = (found.group(1) for found in list(BLOCK.finditer(text))[:2])
    (tmp_path / "models.py").write_text(first)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    namespace = {}
    exec(first + second, namespace)
    command = re.search(r"^    fl-privacy (audit models:.*)$", text, re.MULTILINE).group(1)
    outcome = CliRunner().invoke(app, command.split())
    assert outcome.exit_code == 0, outcome.output
    assert "leakage" in outcome.stdout
    assert "audited" in outcome.stdout
    sys.modules.pop("models", None)


def test_every_command_is_on_the_page_of_commands():
    from typer.main import get_command

    page = (ROOT / "docs" / "command-line.md").read_text()
    for name, command in get_command(app).commands.items():
        assert f"`fl-privacy {name}" in page, name
        assert name == "study" or any("--json" in parameter.opts for parameter in command.params), name


def test_the_site_builds_without_a_warning(tmp_path):
    commands = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    pytest.importorskip("mkdocstrings")
    commands.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))  # strict: warnings raise
    reference = (tmp_path / "site" / "reference.html").read_text()
    for name in ("LeakageEstimate", "InversionAudit", "estimate_spectrum", "PrometheusCallback"):
        assert f"{name}</span>" in reference or f"{name}</code>" in reference, name
