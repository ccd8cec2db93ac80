"""Every Python block of the README and of docs/ runs, page by page, each after those before it on its page."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import types
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import FedAvg
from torch import nn
from typer.testing import CliRunner

from fl_privacy import LeakageEstimate, Status
from fl_privacy.audit import AuditSettings, Ledger
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


def stand_in_for_mlflow(logged: list) -> types.ModuleType:
    module = types.ModuleType("mlflow")
    module.set_experiment = lambda experiment: logged.append(experiment)
    module.start_run = lambda: logged.append("started")
    module.log_metrics = lambda numbers, step: logged.append((step, numbers))
    module.end_run = lambda: logged.append("ended")
    return module


def stand_in_for_wandb(logged: list) -> types.ModuleType:
    module = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None)
    module.init = lambda project: run
    return module


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logged, of_mlflow = [], []
    monkeypatch.setitem(sys.modules, "wandb", stand_in_for_wandb(logged))
    monkeypatch.setitem(sys.modules, "mlflow", stand_in_for_mlflow(of_mlflow))
    namespace = {"__name__": page.stem, **(QUICKSTART if page.name in ("README.md", "deploy.md") else {})}
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
        from fl_privacy.monitoring.callback import close_all

        rows = [LeakageEstimate(server_round=1, client="a", status=Status.NO_REPLY)]
        for callback in namespace["callbacks"]:
            callback.on_round(1, rows)
        close_all(namespace["callbacks"])
        assert logged == [(1, {"above target": 0})]
        assert of_mlflow == ["my federation", "started", (1, {"above_target": 0}), "ended"]


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


def commands_of(page: Path) -> list[list[str]]:
    """Returns the fl-privacy commands of a page's indented blocks, each as its words."""
    joined = page.read_text().replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (fl-privacy .*)$", joined, re.MULTILINE)]


@pytest.mark.parametrize("page", [p for p in PAGES if commands_of(p)], ids=lambda page: page.name)
def test_commands_on_a_page_are_there_with_their_options(page):
    from typer.main import get_command

    for words in commands_of(page):
        command, rest = get_command(app), list(words)
        while hasattr(command, "commands") and rest:
            name = rest.pop(0)
            assert name in command.commands, words
            command = command.commands[name]
        with command.make_context(words[0], [], resilient_parsing=True):  # a study's options are made here
            parameters = command.params
        known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
        options = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert options <= known | {"--help"}, words


def test_commands_that_read_the_ledger_of_a_tutorial_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Ledger("audit.db") as ledger:
        ledger.append([LeakageEstimate(server_round=1, client="a", status=Status.NO_REPLY)], run_id="1")
    pages = [*PAGES, ROOT / "fl_privacy" / "starter" / "README.md.txt"]
    run = [words for page in pages for words in commands_of(page) if "audit.db" in words]
    assert {"show", "report"} <= {words[0] for words in run}
    for words in run:
        outcome = CliRunner().invoke(app, words)
        assert outcome.exit_code == 0, (words, outcome.output)
    assert (tmp_path / "report.html").is_file()


PACKAGES = ("", ".influence", ".audit", ".flower", ".strategies", ".report", ".monitoring", ".attacks", ".pictures")


def test_every_public_name_is_in_the_reference():
    pages = (ROOT / "docs" / "reference.md").read_text()
    shown = {
        name.replace("strategies.", "fl_privacy.strategies.", 1) if name.startswith("strategies.") else name
        for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    }
    found = {}
    for name in shown - {"fl_privacy.errors"}:
        module, _, attribute = name.rpartition(".")
        found[name] = getattr(importlib.import_module(module), attribute)  # what is shown is there
    for package in (
        "",
        ".influence",
        ".audit",
        ".flower",
        ".strategies",
        ".report",
        ".monitoring",
        ".attacks",
        ".pictures",
        ".rehearsal",
    ):
        module = importlib.import_module(f"fl_privacy{package}")
        for name in set(module.__all__) - {"__version__"}:
            public = getattr(module, name)
            public = importlib.import_module("fl_privacy.influence.i2f").influence if name == "influence" else public
            assert any(full.endswith(f".{name}") and one is public for full, one in found.items()), (package, name)


class Links(HTMLParser):
    """What a page of the site links to, and what can be linked to in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        self.targets += [attributes[name] for name in ("href", "src") if attributes.get(name)]


def test_the_site_builds_without_a_warning(tmp_path):
    commands = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    pytest.importorskip("mkdocstrings")
    commands.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))  # strict: warnings raise
    reference = (tmp_path / "site" / "reference.html").read_text()
    for name in ("LeakageEstimate", "InversionAudit", "estimate_spectrum", "PrometheusCallback"):
        assert f"{name}</span>" in reference or f"{name}</code>" in reference, name
    site = tmp_path / "site"
    pages = {page: Links(page.read_text()) for page in site.rglob("*.html") if page.name != "404.html"}
    figures = 0
    for page, links in pages.items():
        for target in links.targets:
            parts = urllib.parse.urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            assert path.is_file(), f"{page.name} links to {target}"
            figures += path.suffix == ".png"
            if parts.fragment and path in pages:
                assert urllib.parse.unquote(parts.fragment) in pages[path].ids, f"{page.name} links to {target}"
    assert figures >= 13
