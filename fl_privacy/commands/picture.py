"""`fl-privacy picture`: what an attacker rebuilds of one image, from its gradient as it is and after each defence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.commands.options import (
    DataRootOption,
    DatasetOption,
    InitializationOption,
    ModelOption,
    NoiseOption,
    ReluWidthOption,
    SeedOption,
)
from fl_privacy.commands.progress import print_json, progress_bar, result_console, user_errors

if TYPE_CHECKING:
    from fl_privacy.pictures import Picture


def picture(
    dataset: DatasetOption = "digits",
    data_root: DataRootOption = "data",
    model: ModelOption = "lenet",
    initialization: InitializationOption = "uniform",
    image: Annotated[int, typer.Option(help="Index of the image in the test set.")] = 0,
    noise: NoiseOption = None,
    laplace: Annotated[
        list[float] | None,
        typer.Option(help="Laplace noise, standard deviation per parameter; give it several times. Default: 0.03."),
    ] = None,
    noise_multiplier: Annotated[
        list[float] | None,
        typer.Option(
            help="Noise per parameter after clipping, over the norm clipped to; give it several times. Default: 0.001."
        ),
    ] = None,
    bits: Annotated[
        list[float] | None,
        typer.Option(help="Bits that an entry is rounded to, one scale for all; give it several times. Default: 8."),
    ] = None,
    half_precision: Annotated[bool, typer.Option(help="Show rounding to float16.")] = True,
    prune: Annotated[
        list[float] | None, typer.Option(help="Share of entries to prune away; give it several times. Default: 0.9.")
    ] = None,
    target_leakage: Annotated[float, typer.Option(help="Leakage that the recommended noise is to leave.")] = 0.5,
    seed: SeedOption = 0,
    relu_width: ReluWidthOption = RELU_WIDTH,
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Where to write the picture.")] = Path(
        "picture.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Draw what an attacker rebuilds of an image: from its raw gradient, and after each defence.

    Side by side: the image, what the attacker believes before any update, the raw gradient, Gaussian noise, Laplace
    noise, clipping with noise, pruning, rounding to few bits and to float16, and the recommended noise for a target,
    isotropic and shaped; each with the predicted error and the one reached.
    """
    with user_errors():
        from fl_privacy.pictures import draw_picture
        from fl_privacy.pictures.defended import PictureSettings, defended_picture
        from fl_privacy.pictures.drawing import check_format

        check_format(output)
        chosen = {
            "noise_stds": noise,
            "laplace_stds": laplace,
            "noise_multipliers": noise_multiplier,
            "bits": bits,
            "prune": prune,
        }
        settings = PictureSettings(
            dataset=dataset,
            data_root=data_root,
            model=model,
            initialization=initialization,  # type: ignore[arg-type]  # checked when built
            image=image,
            target_leakage=target_leakage,
            seed=seed,
            relu_width=relu_width,
            half_precision=half_precision,
            **{name: tuple(given) for name, given in chosen.items() if given},
        )
        with progress_bar("attacking") as progress:
            drawn = defended_picture(settings, progress=progress)
        title = f"What an attacker rebuilds of image {image} ({dataset}, {model})"
        draw_picture(drawn, output, title=title, bounds=(0.0, 1.0))
    if as_json:
        print_json(_plain(drawn, output))
        return
    console = result_console()
    console.print(_table(drawn))
    console.print(str(output), markup=False, soft_wrap=True)


def _plain(drawn: Picture, output: Path) -> dict[str, object]:
    panels = [
        {
            "name": panel.name,
            "leakage": panel.leakage.value,
            "leakage_interval": [panel.leakage.lower, panel.leakage.upper],
            "predicted": panel.predicted.value,
            "predicted_interval": [panel.predicted.lower, panel.predicted.upper],
            "reached": panel.reached,
            "explained": panel.explained,
        }
        for panel in drawn.panels
    ]
    return {"output": str(output), "prior_std": drawn.prior_std, "panels": panels}


def _table(drawn: Picture) -> Table:
    from fl_privacy.pictures.drawing import span_text

    table = Table(caption="errors: root mean square per pixel; failed: what was rebuilt does not explain the update")
    for heading in ("shared", "leakage", "predicted error", "reached error"):
        table.add_column(heading, justify="left" if heading == "shared" else "right")
    for panel in drawn.panels:
        reached = f"{panel.reached:.3g}" + ("" if panel.explained else " (failed)")
        leakage, error = span_text(panel.leakage, "{:.1%}"), span_text(panel.predicted, "{:.3g}")
        table.add_row(Text(panel.name), Text(leakage), Text(error), reached)
    return table
