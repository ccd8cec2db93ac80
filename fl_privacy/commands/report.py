"""`fl-privacy report`: a page on what a run gave away."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from fl_privacy.audit.database import locate
from fl_privacy.audit.ledger import Ledger
from fl_privacy.commands.options import LedgerArgument
from fl_privacy.commands.progress import print_json, progress_bar, user_errors

OK, TAMPERED = 0, 1


def report(
    ledger: LedgerArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    run: Annotated[str | None, typer.Option(metavar="ID", help="Which run. Default: the last one that began.")] = None,
    head: Annotated[
        str | None, typer.Option(metavar="HASH", help="A head kept elsewhere, which the ledger must still hold.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="PNG and JPEG files to show. Default: LEDGER's name with .pictures."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the headline as JSON.")] = False,
) -> None:
    """Write one self-contained HTML page: who leaks, how much, since when, and what to do.

    The page opens offline in any browser. A ledger that was tampered with is reported as such, on the page, too.
    """
    with user_errors():
        outcome = _write(ledger, output, run, head, pictures)
    if as_json:
        print_json(outcome)
    else:
        typer.echo(f"{output}: {_sentence(outcome)}")
        if not outcome["ok"]:
            typer.echo(
                f"TAMPERED: {_counted(outcome['problems'])}; the page and fl-privacy verify list what was found",
                err=True,
            )
    raise typer.Exit(OK if outcome["ok"] else TAMPERED)


def _write(ledger: str, output: Path, run: str | None, head: str | None, pictures: Path | None) -> dict[str, object]:
    from fl_privacy.report import find_pictures, read_checked_history, render_report
    from fl_privacy.report.page import headline
    from fl_privacy.report.pictures import pictures_folder

    url = locate(ledger)
    name = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite":
        name = Path(str(url.database)).name
        beside = pictures_folder(Path(str(url.database)))
    else:
        beside = None
    folder = pictures or beside
    found, skipped = find_pictures(folder, required=pictures is not None) if folder else ([], 0)
    with Ledger.open(ledger) as opened, progress_bar("rows of the ledger") as progress:
        history, verification = read_checked_history(opened, run_id=run, expected_head=head, progress=progress)
        others = len(opened.runs()) - 1
    page = render_report(
        history,
        verification,
        ledger=name,
        version=version("fl-privacy"),
        pictures=found,
        pictures_skipped=skipped,
        other_runs=others,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return {
        "output": str(output),
        "ok": verification.ok,
        "head": verification.head,
        "problems": [str(problem) for problem in verification.problems],
        **headline(history),
    }


def _counted(problems: object) -> str:
    """Returns one problem in words, or how many there are."""
    found = problems if isinstance(problems, list) else []
    return str(found[0]) if len(found) == 1 else f"{len(found)} problems"


def _sentence(outcome: dict[str, object]) -> str:
    unknown = f", {outcome['not_known']} not known" if outcome["not_known"] else ""
    return (
        f"{outcome['above_target']} of {outcome['clients']} clients above target in round {outcome['round']}{unknown}"
    )
