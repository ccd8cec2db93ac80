"""`fl-privacy audit`: what a gradient that lies in a file gives away."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.audit.settings import AuditSettings
from fl_privacy.audit.wording import leakage_text, number_text, plain
from fl_privacy.commands.entry_points import load_entry
from fl_privacy.commands.progress import print_json, result_console, user_errors
from fl_privacy.errors import InvalidInputError

LEAKS = 1


def audit(
    entry: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            show_default=False,
            help="Called without arguments, returns the model, or (model, loss). Without a loss: cross-entropy.",
        ),
    ],
    batch: Annotated[
        Path, typer.Option(metavar="FILE", help="inputs [N, *shape] and labels [N] behind the gradient: .pt or .npz.")
    ],
    gradient: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What was shared, by parameter name or in their order. Default: undefended."),
    ] = None,
    clean: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The gradient before any defence, which must be reproduced.")
    ] = None,
    defended: Annotated[
        bool,
        typer.Option("--defended", help="The gradient was perturbed on purpose: credit the difference as protection."),
    ] = False,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="State dict of the model: .pt or .npz. Default: as it comes.")
    ] = None,
    unit: Annotated[str, typer.Option(help="example: one example is private; batch: all of it.")] = "example",
    target: Annotated[float, typer.Option(help="Leakage for which the noise needed is reported.")] = 0.5,
    prior_std: Annotated[
        float | None, typer.Option(help="Spread of inputs that the attacker assumes. Default: the batch's.")
    ] = None,
    max_examples: Annotated[int, typer.Option(help="Most examples to audit.")] = 8,
    precision: Annotated[str, typer.Option(help="auto, float32 or float64.")] = "auto",
    fail_above: Annotated[
        float | None,
        typer.Option(metavar="LEAKAGE", min=0.0, max=1.0, help="Exit with 1 if the leakage may be above this, 0 to 1."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON.")] = False,
) -> None:
    """Tell what a gradient gives away of the batch behind it, and which noise would bring that down.

    Files are read without running code from them; the entry point is your code, and is run.

    Example: fl-privacy audit models:lenet --batch batch.pt --gradient gradient.pt
    """
    with user_errors():
        if fail_above is not None and math.isnan(fail_above):
            raise InvalidInputError("expected --fail-above in [0, 1], got nan")
        settings = AuditSettings(
            unit=unit,  # type: ignore[arg-type]  # checked when built
            target_leakage=target,
            prior_std=prior_std,
            max_examples=max_examples,
            precision=precision,  # type: ignore[arg-type]
        )
        row = _audited(entry, batch, gradient, clean, defended, weights, settings)
        if row.leakage is None:
            raise InvalidInputError(f"{row.status}: {row.detail}")
    if as_json:
        print_json(row.to_dict())
    else:
        _print(row)
    if fail_above is not None and not row.leakage.upper <= fail_above:
        typer.echo(f"leakage may be {row.leakage.upper:.3g}, above {fail_above:g}", err=True)
        raise typer.Exit(LEAKS)


def _audited(
    entry: str,
    batch: Path,
    gradient: Path | None,
    clean: Path | None,
    defended: bool,
    weights: Path | None,
    settings: AuditSettings,
) -> LeakageEstimate:
    from fl_privacy.audit.files import load_batch, load_update, load_weights
    from fl_privacy.audit.offline import audit_gradient

    model, loss = load_entry(entry)
    if weights is not None:
        load_weights(weights, model)
    inputs, labels = load_batch(batch)
    return audit_gradient(
        model,
        loss,
        inputs,
        labels,
        shared=None if gradient is None else load_update(gradient, model),
        clean=None if clean is None else load_update(clean, model),
        defended=defended,
        settings=settings,
        name=batch.stem,
    )


def _print(row: LeakageEstimate) -> None:
    console = result_console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    private = "the whole batch" if row.unit == "batch" else f"the most exposed of {row.units_audited} examples"
    lines = [
        ("leakage", f"{leakage_text(row.leakage)}  share of {private} that the best attack recovers"),
        (
            "predicted error",
            f"{number_text(row.rmse)} per input element; nothing recovered: {number_text(row.prior_std)}",
        ),
        (
            "noise seen",
            f"{number_text(row.noise_std)} per parameter"
            if row.verified
            else "none that is explained, so none is credited",
        ),
        (
            "noise needed",
            f"{number_text(row.required_noise_std)} per parameter, to bring leakage to {row.target_leakage:g}",
        ),
        ("status", f"{row.status}{': ' + row.detail if row.detail else ''}"),
    ]
    if row.worst_example is not None:
        label = "" if row.worst_label is None else f", of class {row.worst_label}"
        lines.insert(1, ("most exposed", f"example {row.worst_example}{label}"))
    for name, text in lines:
        table.add_row(name, Text(plain(text)))
    console.print(table)
    if row.curve is not None and row.prior_std is not None:
        curve = Table(
            "noise per parameter", "leakage", "predicted error", title="With isotropic noise", title_justify="left"
        )
        errors = row.curve.rmse(row.prior_std)
        for sigma, value, error in list(zip(row.curve.noise_std, row.curve.value, errors, strict=True))[::2]:
            curve.add_row(f"{sigma:.3g}", f"{value:.2f}", f"{error:.3g}")
        console.print(curve)
