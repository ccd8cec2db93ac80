"""`fl-privacy rehearse`: which noise costs a user's own model least, by training it on public examples."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.commands.entry_points import model_factory
from fl_privacy.commands.options import DataRootOption, FactoryArgument, ReluWidthOption
from fl_privacy.commands.progress import print_json, progress_bar, result_console, user_errors

if TYPE_CHECKING:
    from fl_privacy.rehearsal import Lead, Rehearsal, RehearsedFamily

_NAMES: dict[RehearsedFamily, str] = {
    "isotropic": "isotropic noise on the update",
    "shaped": "shaped noise kept on the inputs",
    "white": "white noise kept on the inputs",
}


def rehearse(
    model: FactoryArgument,
    num_clients: Annotated[int, typer.Option(help="Clients of a round.", show_default=False)],
    batch_size: Annotated[int, typer.Option(help="Examples of a client.", show_default=False)],
    rounds: Annotated[int, typer.Option(help="Rounds of the run.", show_default=False)],
    lr: Annotated[float, typer.Option(help="Learning rate.", show_default=False)],
    momentum: Annotated[float, typer.Option(help="Momentum.")] = 0.0,
    target_leakage: Annotated[float, typer.Option(help="Leakage of an example over the whole run.")] = 0.3,
    data: Annotated[
        str,
        typer.Option(
            help="Public examples: digits, mnist, fashion-mnist, cifar10, or an .npz file with arrays inputs and "
            "labels; of a data set the first 2,000 images to train on."
        ),
    ] = "digits",
    data_root: DataRootOption = "data",
    num_public: Annotated[int, typer.Option(help="Examples of them that shape noise on inputs.")] = 8,
    held_out: Annotated[float, typer.Option(help="Share of the others on which accuracy is told.")] = 0.25,
    num_audited: Annotated[int, typer.Option(help="Examples whose leakage is followed over the run.")] = 4,
    checkpoints: Annotated[int, typer.Option(help="Rounds at which it is followed.")] = 10,
    num_seeds: Annotated[
        int,
        typer.Option(help="Repetitions, each with a split of the examples, an initialization and noise of its own."),
    ] = 3,
    relu_width: ReluWidthOption = RELU_WIDTH,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Train your model on public examples under each family of noise, and print which costs it least accuracy.

    Every family leaks the target over the whole run. Classifiers with cross-entropy loss, whose clients share the
    gradient of all their examples in every round. Says by how much the recommended family is ahead of each other one,
    and whether that is more than chance.
    """
    with user_errors():
        from fl_privacy.rehearsal import RehearsalSettings
        from fl_privacy.rehearsal import rehearse as rehearsed
        from fl_privacy.studies.comparison import load_examples

        settings = RehearsalSettings(
            target_leakage=target_leakage,
            num_clients=num_clients,
            batch_size=batch_size,
            num_rounds=rounds,
            lr=lr,
            momentum=momentum,
            num_public=num_public,
            num_audited=num_audited,
            checkpoints=checkpoints,
            held_out=held_out,
            num_seeds=num_seeds,
            relu_width=relu_width,
        )
        examples = load_examples(data, root=Path(data_root), public=True)
        with progress_bar("rehearsing") as progress:
            found = rehearsed(
                model_factory(model),
                examples.inputs,
                examples.labels,
                settings,
                prior=examples.prior,
                progress=progress,
            )
    if as_json:
        outcomes = {family: [asdict(outcome) for outcome in of] for family, of in found.outcomes.items()}
        print_json(
            {
                "settings": asdict(settings),
                "unprotected": list(found.unprotected),
                "outcomes": outcomes,
                "recommended": found.family,
                "leads": {family: asdict(lead) for family, lead in found.leads.items()},
                "is_clear": found.is_clear,
                "policy": _policy(found),
            }
        )
    else:
        result_console().print(_table(model, found))
        written = ", ".join(f"{name}={value!r}" for name, value in _policy(found).items())
        typer.echo(f"Recommended: {_NAMES[found.family]}. On the server: Policy({written})")
        leads = found.leads
        for family, lead in leads.items():
            typer.echo(_lead(family, lead))
        if not leads:
            typer.echo("No other family meets the target in every repetition.")


def _lead(other: RehearsedFamily, lead: Lead) -> str:
    """How far ahead of another family the recommended one is, and how sure that is."""
    told = f"{100 * lead.mean:.1f} points of accuracy ahead of {_NAMES[other]}"
    if lead.standard_error is None:
        return f"{told}, by one seed: whether that is more than chance takes --num-seeds 5 or more."
    verdict = "clear." if lead.is_clear else "not clear, either may be named; more --num-seeds may decide."
    return f"{told}, standard error {100 * lead.standard_error:.1f}: {verdict}"


def _policy(found: Rehearsal) -> dict[str, object]:
    policy = found.policy()
    told: dict[str, object] = {"action": policy.action, "family": policy.family}
    return told | ({"shares": policy.shares} if found.family == "isotropic" else {"covariance": policy.covariance})


def _table(model: str, found: Rehearsal) -> Table:
    settings = found.settings
    table = Table(
        title=Text(f"{model}: {settings.num_clients} clients of {settings.batch_size}, {settings.num_rounds} rounds"),
        caption=Text(
            f"mean [least, most] of {settings.num_seeds} seeds; standard error of one seed's accuracy, on "
            f"{found.num_test} examples held out: {found.standard_error:.3f}"
        ),
    )
    for heading in ("noise", "accuracy", f"leakage, target {settings.target_leakage:g}", "meets it"):
        table.add_column(heading, justify="left" if heading == "noise" else "right")
    table.add_row("none", _spread(found.unprotected), "", "")
    for family, outcomes in found.outcomes.items():
        leakages = [outcome.leakage for outcome in outcomes]
        met = f"in {found.seeds_met(family)} of {settings.num_seeds}"
        table.add_row(_NAMES[family], _spread([o.accuracy for o in outcomes]), _spread(leakages), met)
    return table


def _spread(values: list[float] | tuple[float, ...]) -> str:
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
