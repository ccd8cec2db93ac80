"""`fl-privacy study NAME`: the paper's experiments, each with options that come from its settings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup, TyperOption

from fl_privacy.commands.progress import print_json, progress_bar, result_console, user_errors
from fl_privacy.studies import STUDIES, conduct, load_study
from fl_privacy.studies.settings import Setting, settings_of

if TYPE_CHECKING:
    from fl_privacy.studies import Summary


_EXIT_CODES = "Exit codes: 0 done, 2 wrong usage or missing data."


class CommaSeparated(click.ParamType[tuple[Any, ...]]):
    """Several values of one kind, as in `1e-3,1e-2`.

    Args:
        kind: Of each value.
    """

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.name = f"{kind.__name__},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Returns the values; a tuple is what it is already."""
        if isinstance(value, tuple):
            return value
        kind = click.types.convert_type(self.kind)
        return tuple(kind.convert(part.strip(), param, ctx) for part in str(value).split(",") if part.strip())


class StudyCommand(TyperCommand):
    """The command of one study, which is imported when it is used: until then its name is all that is known."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Adds the options before they are parsed."""
        if not self.params:
            with user_errors():
                self.params = [
                    *map(_option, settings_of(load_study(str(self.name)).settings)),
                    _output(str(self.name)),
                    _AS_JSON,
                ]
        return super().make_context(info_name, args, parent, **extra)


class StudyGroup(TyperGroup):
    """All studies."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, question in STUDIES.items():
            self.add_command(StudyCommand(name, callback=_conducted(name), help=question, epilog=_EXIT_CODES))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Names the studies there are where an unknown one is asked for."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            ctx.fail(f"expected a study among {', '.join(self.commands)}, got {args[0]!r}")
        return super().resolve_command(ctx, args)


study = typer.Typer(
    cls=StudyGroup,
    no_args_is_help=True,
    help="Run one of the paper's experiments: results.csv, a summary and a figure in a folder.",
    epilog=_EXIT_CODES,
)


@study.callback()
def _group() -> None:
    """Run one of the paper's experiments, with its table and figure.

    Each writes settings.json, results.csv, summary.md and figure.png into a folder. One that was stopped goes on where
    it was; a folder of other settings is refused.
    """


def _option(setting: Setting) -> TyperOption:
    flag = f"--{setting.name.replace('_', '-')}"
    kind: Any = setting.kind
    if setting.choices:
        kind = click.Choice(setting.choices)
    default = setting.default
    if setting.several:
        kind = CommaSeparated(setting.kind)
        default = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in setting.default)
    if setting.kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    return TyperOption(
        param_decls=[setting.name, flag], type=kind, default=default, show_default=True, help=setting.help
    )


_AS_JSON = TyperOption(
    param_decls=["as_json", "--json"], is_flag=True, default=False, help="Print the summary as JSON."
)


def _output(name: str) -> TyperOption:
    return TyperOption(
        param_decls=["output", "--output", "-o"],
        type=click.Path(file_okay=False, path_type=Path),
        default=Path("studies") / name,
        show_default=True,
        help="Folder for results.csv, summary.md and figure.png.",
    )


def _conducted(name: str) -> Any:
    """Returns what runs a study."""

    def run(output: Path, as_json: bool, **options: Any) -> None:
        with user_errors():
            chosen = load_study(name)
            settings = chosen.settings(**options)
            with progress_bar(name) as progress:
                rows = conduct(chosen, settings, output, progress=progress)
            summary = chosen.summarize(settings, rows)
        if as_json:
            print_json({"output": str(output), **asdict(summary)})
        else:
            _print(summary, output)

    return run


def _print(summary: Summary, folder: Path) -> None:
    table = Table()
    for heading in summary.headings:
        table.add_column(Text(heading))
    for line in summary.lines:
        table.add_row(*map(Text, line))
    console = result_console()
    console.print(table)
    console.print(summary.sentence, markup=False)
    console.print(str(folder / "figure.png"), markup=False, soft_wrap=True)
