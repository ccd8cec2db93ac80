"""`fl-privacy validate`: attacks that really run, beside what was predicted for them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fl_privacy.audit.settings import RELU_WIDTH
from fl_privacy.commands.options import (
    DataRootOption,
    DatasetOption,
    DeviceOption,
    InitializationOption,
    ModelOption,
    NoiseOption,
    ReluWidthOption,
    SeedOption,
)
from fl_privacy.commands.progress import print_json, progress_bar, result_console, user_errors
from fl_privacy.interval import Interval

if TYPE_CHECKING:
    from fl_privacy.validation import Agreement, ValidationSettings


_CAPTION = (
    "below: an attack is below the prediction, as about half the draws are where it is right; beaten: an attack is "
    "more than 20 % below the prediction's lower end; bound: the lower bound over the reached error, median; failed: "
    "what was rebuilt does not explain the gradient"
)


def validate(
    dataset: DatasetOption = "digits",
    data_root: DataRootOption = "data",
    model: ModelOption = "lenet",
    initialization: InitializationOption = "uniform",
    noise: NoiseOption = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="Attack by name; give it several times. Default: gauss-newton.")
    ] = None,
    attack_steps: Annotated[int, typer.Option(help="Steps of the first-order attacks; 0: as is usual for each.")] = 0,
    prior: Annotated[
        str,
        typer.Option(
            help="What prediction and attacks know of images. white: mean and spread; images: how pixels vary together."
        ),
    ] = "white",
    public_images: Annotated[int, typer.Option(help="Training images that the prior is made from.")] = 2000,
    num_images: Annotated[int, typer.Option(help="Images of the test set.")] = 50,
    precision: Annotated[
        str, typer.Option(help="float64, or float32: faster, and enough for noise above 1e-3 of the update's size.")
    ] = "float64",
    images_at_once: Annotated[int, typer.Option(help="Images that are attacked side by side.")] = 10,
    hops: Annotated[int, typer.Option(help="Most restarts of gauss-newton where it has not converged.")] = 4,
    seed: SeedOption = 0,
    relu_width: ReluWidthOption = RELU_WIDTH,
    device: DeviceOption = "cpu",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the CSV and the figure.")] = Path(
        "runs/validation"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Attack noisy gradients of single images and compare the error with the prediction.

    Prints a table, and writes results.csv and agreement.png. A study that was stopped goes on where it was; delete
    the output folder, or name another, to begin anew or with other settings.
    """
    with user_errors():
        from fl_privacy.validation import ValidationSettings

        settings = ValidationSettings(
            dataset=dataset,
            data_root=data_root,
            model=model,
            initialization=initialization,  # type: ignore[arg-type]  # checked when built
            num_images=num_images,
            attacks=tuple(attack or ["gauss-newton"]),
            attack_steps=attack_steps,
            prior=prior,  # type: ignore[arg-type]  # checked when built
            public_images=public_images,
            precision=precision,  # type: ignore[arg-type]  # checked when built
            images_at_once=images_at_once,
            hops=hops,
            seed=seed,
            relu_width=relu_width,
            device=device,
            **({"noise_stds": tuple(noise)} if noise else {}),  # type: ignore[arg-type]
        )
        _validate(settings, output, as_json=as_json)


def _validate(settings: ValidationSettings, output: Path, *, as_json: bool) -> None:
    from fl_privacy.studies.settings import claim_folder
    from fl_privacy.validation import attacks_of, run_validation, summarize, summarize_attacks
    from fl_privacy.validation.figure import draw_agreement
    from fl_privacy.validation.summary import inapplicable

    claim_folder(output, "validate", settings)
    with progress_bar("attacking") as progress:
        rows = run_validation(settings, attacks_of(settings), output / "results.csv", progress=progress)
    console = result_console()
    overall, levels = summarize(rows)
    attacks, unable = summarize_attacks(rows), inapplicable(rows)
    title = f"{settings.model} on {settings.dataset}: reached error over predicted error"
    draw_agreement(rows, output / "agreement.png", title=f"{settings.model}, {settings.dataset}")
    if as_json:
        found = {"overall": _plain(overall), "levels": _levels(levels), "inapplicable": unable}
        by_attack = {name: _plain(agreement) for name, agreement in attacks.items()}
        print_json({"output": str(output), **found, "attacks": by_attack})
        return
    console.print(_table(title, overall, levels))
    if len(attacks) > 1:
        console.print(_attack_table(attacks))
    for name, reason in unable.items():
        console.print(f"{name} cannot be run on these gradients: {reason}", markup=False)
    console.print(f"{output / 'results.csv'}, {output / 'agreement.png'}")


def _levels(levels: dict[float, Agreement]) -> list[dict[str, Any]]:
    return [{"noise_std": level, **_plain(agreement)} for level, agreement in levels.items()]


def _plain(agreement: Agreement) -> dict[str, Any]:
    return {**asdict(agreement), "spearman": list(agreement.spearman)}


def _table(title: str, overall: Agreement, levels: dict[float, Agreement]) -> Table:
    table = Table(title=title, caption=_CAPTION)
    headings = (
        "noise std",
        "runs",
        "Spearman [95 %]",
        "median ratio",
        "median |ratio - 1|",
        "below",
        "beaten",
        "bound",
        "failed",
    )
    for heading in (*headings, "converged", "psnr, dB", "ssim"):
        table.add_column(heading, justify="right")
    for name, agreement in [*((f"{level:g}", a) for level, a in levels.items()), ("all", overall)]:
        table.add_row(
            name,
            str(agreement.runs),
            _interval(agreement.spearman),
            f"{agreement.median_ratio:.3f}",
            f"{agreement.median_deviation:.3f}",
            f"{agreement.below:.1%}",
            f"{agreement.beaten:.1%}",
            f"{agreement.bound:.2g}",
            f"{agreement.failed:.1%}",
            f"{agreement.converged:.1%}",
            f"{agreement.psnr:.1f}",
            f"{agreement.ssim:.2f}",
        )
    return table


def _attack_table(attacks: dict[str, Agreement]) -> Table:
    caption = "a failed attack shows nothing of what leaks; own: predicted for the very image, not for the prior's mean"
    table = Table(title="each attack alone", caption=caption)
    headings = ("attack", "runs", "median error", "median ratio", "beaten", "own ratio", "own beaten", "failed")
    for heading in (*headings, "psnr, dB", "ssim"):
        table.add_column(heading, justify="right")
    for name, agreement in attacks.items():
        table.add_row(
            name,
            str(agreement.runs),
            f"{agreement.error:.3g}",
            f"{agreement.median_ratio:.3f}",
            f"{agreement.beaten:.1%}",
            f"{agreement.own_ratio:.3f}",
            f"{agreement.own_beaten:.1%}",
            f"{agreement.failed:.1%}",
            f"{agreement.psnr:.1f}",
            f"{agreement.ssim:.2f}",
        )
    return table


def _interval(value: Interval[float]) -> str:
    return f"{value.value:.3f} [{value.lower:.3f}, {value.upper:.3f}]"
