"""`fl-privacy init`: a minimal audited Flower app to start from."""

from __future__ import annotations

import json
import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from fl_privacy.commands.progress import user_errors
from fl_privacy.errors import InvalidInputError

_APP_FILES = ("client_app.py", "server_app.py", "task.py")
_TOP_FILES = ("pyproject.toml", "README.md")


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False, help="New or empty folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a minimal audited Flower app: a model, clients and a server that run with flwr run.

    The app trains on scikit-learn's digits; its package is called as the folder is.
    """
    with user_errors():
        written = write_app(folder)
    if as_json:
        typer.echo(json.dumps({"written": [str(path) for path in written]}))
        return
    for path in written:
        typer.echo(str(path))
    typer.echo(f'\nRun it:   flwr run {folder} --stream --federation-config "num-supernodes=4"')
    typer.echo("Then:     fl-privacy report audit.db -o report.html")


def write_app(folder: Path) -> list[Path]:
    """Writes the app and returns its files.

    Raises:
        InvalidInputError: The folder is not empty, or its name gives no name of a Flower app.
    """
    package = re.sub(r"[^0-9a-z]+", "_", folder.resolve().name.lower()).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", package) or keyword.iskeyword(package):
        raise InvalidInputError(
            f"expected a folder whose name can be an app's, such as my_app, of at most 32 letters, digits and _, "
            f"got {folder.name!r}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInputError(f"expected a new or empty folder, and {folder} holds something: nothing was written")
    templates = resources.files("fl_privacy.starter")
    targets = {name: folder / name for name in _TOP_FILES} | {name: folder / package / name for name in _APP_FILES}
    (folder / package).mkdir(parents=True, exist_ok=True)
    start = folder / package / "__init__.py"
    start.write_text(f'"""{package}: an audited Flower app."""\n', encoding="utf-8")
    for name, target in targets.items():
        text = templates.joinpath(f"{name}.txt").read_text(encoding="utf-8")
        target.write_text(Template(text).substitute(package=package, app=package.replace("_", "-")), encoding="utf-8")
    return sorted([start, *targets.values()])
