"""`fl-privacy compare-inits`: how much a user's own model leaks under different initialisations."""

from __future__ import annotations

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
    from fl_privacy.studies.comparison import InitializationExposure


def compare_inits(
    model: FactoryArgument,
    data: Annotated[
        str,
        typer.Option(help="digits, mnist, fashion-mnist, cifar10, or an .npz file with arrays inputs and labels."),
    ] = "digits",
    data_root: DataRootOption = "data",
    noise_std: Annotated[float, typer.Option(help="Noise on the gradient, standard deviation per parameter.")] = 1e-3,
    target_leakage: Annotated[float, typer.Option(help="Leakage for which the noise is asked.")] = 0.5,
    num_examples: Annotated[int, typer.Option(help="Examples to audit, the first ones.")] = 10,
    num_draws: Annotated[int, typer.Option(help="Draws of each initialization.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the first draw.")] = 0,
    relu_width: ReluWidthOption = RELU_WIDTH,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Print how much the gradients of your model leak under each initialization, and the noise that would stop it.

    Classifiers with cross-entropy loss; one example per gradient. The last column compares what initializations give
    away whatever the size of their gradients is.
    """
    with user_errors():
        from fl_privacy.studies.comparison import ComparisonSettings, compare, load_examples

        settings = ComparisonSettings(
            noise_std=noise_std,
            target_leakage=target_leakage,
            num_examples=num_examples,
            num_draws=num_draws,
            seed=seed,
            relu_width=relu_width,
        )
        factory, examples = model_factory(model), load_examples(data, root=Path(data_root))
        with progress_bar("comparing") as progress:
            found = compare(factory, examples, settings, progress=progress)
    if as_json:
        print_json([asdict(exposure) for exposure in found])
    else:
        result_console().print(_table(model, settings.noise_std, settings.target_leakage, found))


def _table(model: str, noise_std: float, target: float, found: list[InitializationExposure]) -> Table:
    table = Table(
        title=Text(f"{model}, most exposed first"),
        caption=Text("median [least, most] over examples and draws; ‖g‖: norm of the gradient"),
    )
    for heading in (
        "initialization",
        "‖g‖",
        f"leakage at σ = {noise_std:g}",
        f"σ for leakage {target:g}",
        f"σ/‖g‖ for leakage {target:g}",
    ):
        table.add_column(heading, justify="left" if heading == "initialization" else "right")
    for exposure in found:
        table.add_row(
            exposure.initialization,
            *map(_spread, (exposure.gradient_norm, exposure.leakage, exposure.required, exposure.relative)),
        )
    return table


def _spread(values: tuple[float, float, float]) -> str:
    least, middle, most = values
    return f"{middle:.3g} [{least:.3g}, {most:.3g}]"
