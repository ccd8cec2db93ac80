"""Scalars and pictures of every client for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fl_privacy.audit.estimate import LeakageEstimate
from fl_privacy.extras import require
from fl_privacy.monitoring.callback import client_name, client_numbers, most_exposed, summarize


class TensorBoardCallback:
    """Writes event files: `round/...` for the federation, `leakage/CLIENT` and the like for each client.

    Pictures that the run draws of a client are `pictures/CLIENT`, at their round.

    Args:
        folder: Where event files go.
        pictures: Folder of PNG files to show as they appear there, such as the one beside the ledger
            (`runs/vision.pictures` for `runs/vision.db`).
        max_clients: Most clients of a round to write, the most exposed first.

    Raises:
        ImportError: TensorBoard is not installed; it comes with the extra `tensorboard`.
    """

    def __init__(self, folder: str | Path, *, pictures: str | Path | None = None, max_clients: int = 100) -> None:
        writers: Any = require("torch.utils.tensorboard", extra="tensorboard")
        self._writer = writers.SummaryWriter(str(folder))
        self._pictures = None if pictures is None else Path(pictures)
        self._shown: dict[Path, float] = {}
        self._max_clients = max_clients

    def on_round(self, server_round: int, rows: Sequence[LeakageEstimate]) -> None:
        """Writes a round, so that it can be seen at once."""
        for name, value in asdict(summarize(rows)).items():
            if value is not None:
                self._writer.add_scalar(f"round/{name}", value, server_round)
        for row in most_exposed(rows, self._max_clients):
            for name, value in client_numbers(row).items():
                self._writer.add_scalar(f"{name}/{client_name(row.client)}", value, server_round)
        self._add_pictures(server_round)
        self._writer.flush()

    def on_pictures(self, server_round: int, pictures: Mapping[str, Path]) -> None:
        """Writes the pictures of a round, each under its client's name."""
        for client, path in pictures.items():
            self._add_picture(client_name(client), path, server_round)
            self._shown[path] = path.stat().st_mtime  # it may lie in the folder that is looked through, too
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left and closes the event file."""
        self._writer.close()

    def _add_pictures(self, server_round: int) -> None:
        """Adds pictures that are new, or have changed."""
        if self._pictures is None or not self._pictures.is_dir():
            return
        for path in sorted(self._pictures.glob("*.png")):
            changed = path.stat().st_mtime
            if self._shown.get(path) != changed:
                self._add_picture(path.stem, path, server_round)
                self._shown[path] = changed

    def _add_picture(self, name: str, path: Path, server_round: int) -> None:
        numpy, images = require("numpy"), require("PIL.Image", extra="tensorboard")
        with images.open(path) as image:
            pixels = numpy.asarray(image.convert("RGB"))
        self._writer.add_image(f"pictures/{name}", pixels, server_round, dataformats="HWC")
