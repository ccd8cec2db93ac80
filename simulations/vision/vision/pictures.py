"""A picture for the reader: what an attacker rebuilds of the client that leaked most, before and after the noise."""

from __future__ import annotations

import re
from logging import INFO
from pathlib import Path

from flwr.supercore import log

from fl_privacy.attacks import GaussianPrior
from fl_privacy.audit.auditor import AuditedRound
from fl_privacy.pictures import draw_picture, rebuild_client
from fl_privacy.reference import ImageSet


class WorstClientPicture:
    """Draws, at the last round, one example of the client that leaked most in the first: raw and as it was shared.

    Args:
        examples: What the attacker's prior is taken from.
        last_round: When to draw.
        folder: Where to write; beside the ledger, as a report looks for it.
    """

    def __init__(self, examples: ImageSet, *, last_round: int, folder: Path) -> None:
        images, _ = examples.select(slice(0, 2000))
        self._prior = GaussianPrior.from_examples(images)
        self._last_round = last_round
        self._folder = folder
        self._worst: str | None = None

    def __call__(self, audited: AuditedRound) -> dict[str, Path]:
        """Remembers the worst client of the first round, draws it at the last, and returns what it drew, by client."""
        found = {task.client: (task, row) for task, row in zip(audited.tasks, audited.rows, strict=True)}
        leaking = {client: row.leakage.value for client, (_, row) in found.items() if row.leakage is not None}
        if self._worst is None and leaking:
            self._worst = max(leaking, key=leaking.__getitem__)
        if audited.server_round != self._last_round or self._worst not in leaking:
            return {}
        task, row = found[self._worst]
        noise = "" if task.applied_noise_std is None else f"noise {task.applied_noise_std:.2g}"
        name = noise if task.defence in ("", "none") else f"{task.defence} {noise}".strip()
        picture = rebuild_client(
            audited.context,
            audited.params,
            task,
            example=row.worst_example or 0,
            prior=self._prior,
            shared={name or "as shared": task.shared},
        )
        safe = re.sub(r"[^0-9A-Za-z-]", "_", self._worst)[:40]  # the client chose its name
        path = self._folder / f"client-{safe}-round-{audited.server_round}.png"
        draw_picture(picture, path, title=f"What an attacker rebuilds of client {self._worst}", bounds=(0.0, 1.0))
        log(INFO, "Picture of what an attacker rebuilds of client %s: %s", self._worst, path)
        return {self._worst: path}
