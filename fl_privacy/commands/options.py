"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

LedgerArgument = Annotated[
    str, typer.Argument(metavar="LEDGER", show_default=False, help="Path of a SQLite ledger, or a database URL.")
]
FactoryArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        show_default=False,
        help="What returns a new model when it is called without arguments; modules of this folder are found, too.",
    ),
]
DatasetOption = Annotated[str, typer.Option(help="digits, mnist, fashion-mnist, cifar10 or folder.")]
DataRootOption = Annotated[str, typer.Option(help="Where the data set's files are.")]
ModelOption = Annotated[str, typer.Option(help="linear, mlp, lenet, digitsnet, resnet8, resnet18 or vit.")]
InitializationOption = Annotated[
    str,
    typer.Option(help="uniform: U(-0.5, 0.5), as in the paper; default: the model's own; normal, xavier, kaiming."),
]
NoiseOption = Annotated[
    list[float] | None, typer.Option(help="Noise level, standard deviation per parameter; give it several times.")
]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 or whatever torch can use here.")]
ReluWidthOption = Annotated[
    float, typer.Option(help="Width of rounded ReLUs in predictions, as audits have it; 0: the network's own J.")
]
SeedOption = Annotated[int, typer.Option(help="Of initialization and noise.")]
