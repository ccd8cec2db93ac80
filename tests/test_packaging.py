"""Wheel and source distribution: built, installed where nothing of the checkout is, imported and run there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib, sys
from importlib import metadata, resources
import fl_privacy, fl_privacy.strategies
assert fl_privacy.__file__.startswith(sys.prefix), fl_privacy.__file__
assert fl_privacy.strategies.__file__.startswith(sys.prefix), fl_privacy.strategies.__file__
for name in fl_privacy.__all__:
    getattr(fl_privacy, name)
for package in ("attacks", "audit", "commands", "flower", "influence", "monitoring", "report", "strategies"):
    importlib.import_module(f"fl_privacy.{package}")
for package, name in (("report", "report.css"), ("report", "report.html.jinja"), ("starter", "task.py.txt")):
    assert resources.files(f"fl_privacy.{package}").joinpath(name).is_file(), name
assert (resources.files("fl_privacy") / "py.typed").is_file()
extras = set(metadata.metadata("fl-privacy").get_all("Provides-Extra"))
assert {"ray", "simulation", "report", "tensorboard", "prometheus"} <= extras, extras
"""

MODEL = """
import torch
from torch import nn
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), nn.CrossEntropyLoss()
"""
BATCH = """
import torch
torch.save({"inputs": torch.rand(4, 1, 4, 4), "labels": torch.tensor([0, 1, 2, 3])}, "batch.pt")
"""
LEDGER = """
from fl_privacy import LeakageEstimate, Status
from fl_privacy.audit import Ledger
with Ledger("audit.db") as ledger:
    ledger.append([LeakageEstimate(server_round=1, client="a", status=Status.NO_REPLY)], run_id="1")
"""


def run(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from the files of the checkout, in a copy of them: a build leaves folders behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    names = ["pyproject.toml", "README.md", "LICENSE", "fl_privacy", "strategies"]
    run("cp", "-r", *(ROOT / name for name in names), source)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(built)!r})"
    run(sys.executable, "-c", build, cwd=source)
    (archive,) = built.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source distribution, which so proves to be complete."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, sdist)
    (archive,) = folder.glob("*.whl")
    return archive


def test_the_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    run(*(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel))
    # What we depend on is taken from where the tests run; of us, only what the wheel holds.
    (site,) = environment.glob("lib/python*/site-packages")
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(borrowed + "\n")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run(python, "-c", PROGRAM, cwd=tmp_path, env=clean)
    assert run(environment / "bin" / "fl-privacy", "--version", cwd=tmp_path, env=clean) == "fl-privacy 0.1.0\n"
    written = run(environment / "bin" / "fl-privacy", "init", "first_app", cwd=tmp_path, env=clean)
    assert "first_app/pyproject.toml" in written


def third_party(source: bytes, name: str) -> set[str]:
    """Returns the top-level modules of others that a module imports, by statement or by `require("...")`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source, name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            found |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    tops = {module.partition(".")[0] for module in found}
    return tops - set(sys.stdlib_module_names) - {"fl_privacy"}


def test_every_import_of_another_package_is_declared(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        required = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
        declared = {normalized(re.match(r"[\w.-]+", line).group()) for line in required}
        imported = {}
        for name in archive.namelist():
            if name.endswith(".py"):
                for module in third_party(archive.read(name), name):
                    imported.setdefault(module, name)
    distributions = packages_distributions()
    assert {"torch", "flwr", "matplotlib", "jinja2"} <= imported.keys()
    for module, where in imported.items():
        owners = {normalized(owner) for owner in distributions.get(module, [module])}
        assert owners & declared, f"{where} imports {module} of {', '.join(owners)}, which pyproject.toml does not name"


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.skipif(
    "FL_PRIVACY_DOWNLOADS" not in os.environ, reason="downloads all dependencies: FL_PRIVACY_DOWNLOADS=1 turns it on"
)
@pytest.mark.timeout(3600)
def test_the_wheel_and_what_pip_finds_for_it_run_in_a_new_environment(wheel, tmp_path):
    """As a stranger would: nothing is borrowed."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    here = {"cwd": tmp_path, "env": clean}
    python, command = environment / "bin" / "python", environment / "bin" / "fl-privacy"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[simulation]", **here)
    run(python, "-m", "pip", "check", **here)
    run(python, "-c", PROGRAM, **here)
    assert run(command, "--version", **here) == "fl-privacy 0.1.0\n"
    (tmp_path / "models.py").write_text(MODEL)
    run(python, "-c", BATCH, **here)
    assert "audited" in run(command, "audit", "models:small", "--batch", "batch.pt", **here)
    run(python, "-c", LEDGER, **here)
    assert "0 of 1 clients above target" in run(command, "report", "audit.db", "-o", "report.html", **here)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fl_privacy"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fl_privacy").rglob("*.py")}
    modules |= {f"fl_privacy/{path.relative_to(ROOT)}" for path in (ROOT / "strategies").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_the_source_distribution_holds_licence_and_readme(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "strategies/inversion_audit.py"} <= names
