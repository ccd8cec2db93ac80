"""Wheel and source distribution: built, installed where nothing of the checkout is, imported and run there."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
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
