"""The page itself: a run's history, its ledger's check and its pictures, put into the template."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any, NamedTuple

from fl_privacy.audit.chain import Verification
from fl_privacy.audit.curve import LeakageCurve
from fl_privacy.audit.estimate import LeakageEstimate, Status
from fl_privacy.audit.policy import Policy
from fl_privacy.audit.wording import (
    ABSENT,
    about_text,
    at_most_text,
    leakage_text,
    natural_key,
    number_text,
    plain,
    shortened,
)
from fl_privacy.extras import require
from fl_privacy.interval import Interval
from fl_privacy.report import figures
from fl_privacy.report.history import DEFAULT_TARGET, MAX_ROWS, Cell, ClientHistory, RunHistory
from fl_privacy.report.pictures import Picture

HEAT_CLIENTS, HEAT_ROUNDS = 40, 24
"""Most rows and columns of the heat map with numbers; what has no room is in the map of everyone."""
CARDS = 12
"""Most clients that are shown one by one."""
_SMALL = (120, 60)
"""Width and height of a small curve, in the units of its drawing."""
_NAMES, _NAME_LENGTH, _DETAIL_LENGTH, _PROBLEMS = 6, 60, 300, 20


class _Column(NamedTuple):
    """A column of the table of rows that is shown only where a row has something in it."""

    heading: str
    text: Callable[[LeakageEstimate], str]
    meaning: str = ""

    def known(self, row: LeakageEstimate) -> bool:
        return self.text(row) != ABSENT


def _epsilon(row: LeakageEstimate) -> str:
    if row.epsilon is None or row.delta is None:
        return ABSENT
    return f"{'∞' if math.isinf(row.epsilon) else number_text(row.epsilon)} at δ = {row.delta:g}"


def _passed_in_all(row: LeakageEstimate) -> str:
    """Nothing where it is what arrived: the column is for servers that did something about it."""
    passed = row.rounds_passed_leakage
    return ABSENT if passed == row.rounds_leakage else at_most_text(passed)


_COLUMNS = (
    _Column(
        "all rounds so far",
        lambda row: at_most_text(row.rounds_leakage),
        "All rounds so far: what a client's rounds up to this one tell together, at most.",
    ),
    _Column("noise advised", lambda row: number_text(row.advised_noise_std)),
    _Column("noise put on", lambda row: number_text(row.applied_noise_std)),
    _Column("noise on inputs", lambda row: row.input_noise or ABSENT),
    _Column("leakage behind it, at most", lambda row: number_text(row.input_noise_leakage)),
    _Column("leakage passed on, at most", lambda row: number_text(row.passed_leakage)),
    _Column(
        "passed on in all rounds so far",
        _passed_in_all,
        "Passed on in all rounds so far: what the server's noise, and what it left out, leave of that, at most.",
    ),
    _Column("differential privacy, ε", _epsilon, "Differential privacy is another number than leakage."),
)


def render_report(
    history: RunHistory,
    verification: Verification,
    *,
    ledger: str,
    version: str,
    pictures: Sequence[Picture] = (),
    pictures_skipped: int = 0,
    other_runs: int = 0,
) -> str:
    """Returns the page as HTML. It loads nothing: what it shows is in it, and its policy forbids the rest.

    Whatever came from a client (its name, its claims, errors it answered with) is text and never markup.

    Args:
        history: The run.
        verification: Of the whole ledger.
        ledger: Its name, to be shown.
        version: Of the program, to be shown.
        pictures: To be embedded.
        pictures_skipped: How many there was no room for.
        other_runs: How many more runs the ledger holds.

    Raises:
        ImportError: Jinja2 or Matplotlib is not installed; they come with the extra `report`.
    """
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        name=_name,
        names=_names,
        leakage=leakage_text,
        number=number_text,
        plain=_detail,
        met=_met,
        needs=_needs,
        about=about_text,
    )
    files = resources.files("fl_privacy.report")
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    style = files.joinpath("report.css").read_text(encoding="utf-8")
    template = environment.from_string(files.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    heat = _heat(history)
    page: str = template.render(
        history=history,
        headline={**headline(history), "worst_leakage_text": _worst_text(history)},
        change=history.change(),
        verification=verification,
        problems=[str(problem) for problem in verification.problems[:_PROBLEMS]],
        ledger=ledger,
        version=version,
        other_runs=other_runs,
        heat=heat,
        overview=None if heat["complete"] else figures.overview_figure(history),
        rounds_figure=figures.rounds_figure(history),
        rounds=_rounds(history),
        accuracy=history.accuracy(),
        cards=[_card(client, history) for client in history.clients[:CARDS]],
        classes_figure=figures.classes_figure([c.measured for c in history.clients if c.measured is not None]),
        small=_small_curves(history),
        rows=_rows(history),
        outcomes=_outcomes(history),
        pictures=pictures,
        pictures_skipped=pictures_skipped,
        settings=_settings(history),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
    )
    return page


def headline(history: RunHistory) -> dict[str, Any]:
    """Returns what there is to know in a minute, as plain values: who leaks, how much, since when, and what to do."""
    cells = history.cells_of(history.last_round)
    worst, neediest = history.worst(), history.neediest()
    row = None if worst is None else worst.cells[history.last_round]
    change = history.change()
    return {
        "run": history.run_id,
        "round": history.last_round,
        "target": history.target,
        "clients": len(cells),
        "targets": sorted({cell.target for cell in cells.values() if cell.leakage}) or [history.target],
        "above_target": sum(bool(cell.above) for cell in cells.values()),
        "not_known": sum(cell.leakage is None for cell in cells.values()),
        "worst_client": None if worst is None else worst.name,
        "worst_leakage": None if row is None or row.leakage is None else list(row.leakage),
        "worst_above_since": None if worst is None else worst.above_since(history.last_round),
        "what_to_do": None if neediest is None or neediest.measured is None else _remedy(neediest.measured),
        "change": None if change is None else {name: list(clients) for name, clients in change._asdict().items()},
    }


def _remedy(row: LeakageEstimate) -> dict[str, Any]:
    """Returns what a client's row says is to be done, every σ per parameter and in units of its undefended update.

    With `target_met`, the upper end of the leakage is at most the target, and there is nothing to do. Otherwise
    `total_noise_std` is what has to be on the update in all, and `noise_to_add_std` what is missing of it beside the
    noise that the client is credited with, √(σ_r² − σ_o²); both are `None` where no finite noise is known to do.
    """
    target = DEFAULT_TARGET if row.target_leakage is None else row.target_leakage
    met = row.leakage is not None and row.leakage.upper <= target
    required = row.required_noise_std
    finite = not met and required is not None and math.isfinite(required) and required > 0
    policy = Policy()
    return {
        "client": row.client,
        "target": target,
        "target_met": met,
        "observed_noise_std": row.noise_std if row.noise_std is not None and math.isfinite(row.noise_std) else None,
        "total_noise_std": required if finite else None,
        "noise_to_add_std": policy.missing_noise_std(required, policy.own_noise_std(row))
        if finite and required is not None
        else None,
    }


def _met(remedy: dict[str, Any]) -> str:
    """Returns in words why there is nothing to do."""
    observed = remedy["observed_noise_std"]
    there = f"with the noise that is on it (σ = {number_text(observed)})" if observed else "without noise"
    return f"the target of {remedy['target']:g} is met, {there}"


def _needs(remedy: dict[str, Any]) -> str:
    """Returns in words what total noise does, and what of it is to be added."""
    observed, missing, total = (remedy[name] for name in ("observed_noise_std", "noise_to_add_std", "total_noise_std"))
    brings = f"brings its leakage to {remedy['target']:g}"
    if not observed:
        return f"noise on each parameter of its update, what is there included, that {brings}; there is none yet"
    there = f"σ = {number_text(observed)} was observed"
    if missing < total:
        to_add = f"σ = {number_text(missing)} is to be added"
        return f"noise on each parameter of its update, what is there included, that {brings}; {there}; {to_add}"
    return (
        f"noise on each parameter of its update that {brings}; {there}, but unevenly or unexplained: it does not count"
    )


def _worst_text(history: RunHistory) -> str:
    worst = history.worst()
    return ABSENT if worst is None else leakage_text(worst.cells[history.last_round].leakage)


def _heat(history: RunHistory) -> dict[str, Any]:
    rounds = history.rounds[-HEAT_ROUNDS:]
    lines = []
    for client in history.clients[:HEAT_CLIENTS]:
        lines.append((client.name, [_heat_cell(client.cells.get(server_round)) for server_round in rounds]))
    complete = len(history.clients) <= HEAT_CLIENTS and len(history.rounds) <= HEAT_ROUNDS
    scale = [_colours(step / 10)[0] for step in range(11)]
    return {"rounds": rounds, "lines": lines, "complete": complete, "scale": scale}


def _heat_cell(cell: Cell | None) -> dict[str, str]:
    if cell is None:
        return {"kind": "absent", "text": "", "title": "not asked", "style": ""}
    if cell.leakage is None:
        return {"kind": "unknown", "text": "?", "title": f"{cell.status}: nothing is known", "style": ""}
    background, ink = _colours(cell.leakage.value)
    return {
        "kind": "above" if cell.above else "below",
        "text": f"{'≈' if cell.status is Status.APPROXIMATE else ''}{cell.leakage.value:.2f}",
        "title": f"{leakage_text(cell.leakage)}, {cell.status}",
        "style": f"background:{background};color:{ink}",
    }


def _colours(leakage: float) -> tuple[str, str]:
    """Returns the colour of a leakage, and the one of black and white that is read better on it."""
    matplotlib = require("matplotlib", extra="report")
    red, green, blue, _ = matplotlib.colormaps[figures.HEAT_COLOURS](min(1.0, max(0.0, leakage)))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # WCAG: contrast with white is 1.05/(L + 0.05), with black (L + 0.05)/0.05; they are equal at L = 0.179.
    ink = "#000" if luminance > 0.179 else "#fff"
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}", ink


def _rounds(history: RunHistory) -> list[dict[str, Any]]:
    """Returns the numbers behind the figure over rounds."""
    accuracy = history.accuracy()
    lines = []
    for server_round in history.rounds:
        cells = history.cells_of(server_round)
        known = [cell.leakage for cell in cells.values() if cell.leakage is not None]
        highest = Interval(*(max(parts) for parts in zip(*known, strict=True))) if known else None
        lines.append(
            {
                "round": server_round,
                "clients": len(cells),
                "highest": highest,
                "median": statistics.median(leakage.value for leakage in known) if known else None,
                "above": sum(bool(cell.above) for cell in cells.values()),
                "unknown": sum(cell.leakage is None for cell in cells.values()),
                "accuracy": {origin: values.get(server_round) for origin, values in accuracy.items()},
            }
        )
    return lines


def _card(client: ClientHistory, history: RunHistory) -> dict[str, Any]:
    row = client.measured
    return {
        "name": client.name,
        "row": row,
        "last": client.last,
        "cell": client.cells[max(client.cells)],
        "since": client.above_since(max(client.cells)),
        "remedy": None if row is None else _remedy(row),
        "figure": None if row is None else figures.noise_figure(row),
        "statuses": _counts(client.statuses),
        "examples": [] if row is None else row.examples,
        "at_target": None if row is None else _at_target(row),
    }


def _at_target(row: LeakageEstimate) -> float | None:
    """Returns the predicted error per element at the target leakage L, τ·√(1 − L)."""
    if row.target_leakage is None or row.prior_std is None:
        return None
    return row.prior_std * math.sqrt(1 - row.target_leakage)


def _rows(history: RunHistory) -> dict[str, Any]:
    """Returns every row of a run where they are few, else each client's last; and counts.

    Rows of the last round come first, and of a round those of which nothing is known, then the most exposed.
    """
    rank = {client.name: place for place, client in enumerate(history.clients)}
    every = len(history.every_row) == history.rows
    found = history.every_row if every else [client.last for client in history.clients if client.last]
    order = sorted(
        found, key=lambda row: (-row.server_round if every else 0, row.leakage is not None, rank[row.client])
    )
    shown = order[:MAX_ROWS]
    return {
        "shown": shown,
        "every": every,
        "clients": len(history.clients),
        "columns": [column for column in _COLUMNS if any(column.known(row) for row in shown)],
        "claims": any(row.claim_holds is not None for row in shown),
        "statuses": _counts(history.statuses),
        "sources": _counts(history.sources),
    }


def _outcomes(history: RunHistory) -> list[tuple[str, list[dict[str, Any]]]]:
    """Returns for every client, in natural order, what became of it and in which rounds: all of its rows."""
    lines = []
    for client in sorted(history.clients, key=lambda client: natural_key(client.name)):
        entries = sorted(client.outcomes.items(), key=lambda entry: min(entry[1]))
        lines.append((client.name, [{**o._asdict(), "rounds": rounds_text(rounds)} for o, rounds in entries]))
    return lines


def rounds_text(rounds: Iterable[int]) -> str:
    """Returns `1-3, 7`; a round that comes twice is named twice."""
    parts: list[list[int]] = []
    for number in sorted(rounds):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)


def _small_curves(history: RunHistory) -> dict[str, Any]:
    """Returns the predicted error against noise of every client with a curve, as points of small drawings.

    All have one scale: log σ from the least to the largest noise of any curve, and the error as a share √(1 − leakage)
    of the prior's width.
    """
    rows = [c.measured for c in history.clients if c.measured is not None]
    drawn = [(row, row.curve) for row in rows if row.curve is not None and min(row.curve.noise_std, default=0) > 0]
    least = min((curve.noise_std[0] for _, curve in drawn), default=1.0)
    most = max((curve.noise_std[-1] for _, curve in drawn), default=1.0)
    width, height = _SMALL
    span = math.log(most / least) or 1.0

    def place(noise: float, error: float) -> tuple[float, float]:
        return round(width * math.log(noise / least) / span, 1), round(height * (1 - error), 1)

    def on(noise: float | None, curve: LeakageCurve) -> tuple[float, float] | None:
        if noise is None or not curve.noise_std[0] <= noise <= curve.noise_std[-1]:
            return None
        return place(noise, figures.interpolated(curve.noise_std, curve.rmse(1.0), noise))

    lines = [
        {
            "name": row.client,
            "points": " ".join(f"{x:g},{y:g}" for x, y in map(place, curve.noise_std, curve.rmse(1.0))),
            "needed": on(row.required_noise_std, curve),
            "seen": on(row.noise_std, curve),
            "total": row.required_noise_std,
            "target": row.target_leakage,
        }
        for row, curve in drawn
    ]
    missing = len(history.clients) - len(lines)
    return {"lines": lines, "least": least, "most": most, "width": width, "height": height, "missing": missing}


def _settings(history: RunHistory) -> list[tuple[str, str]]:
    """Returns settings and versions of the run's last measured row."""
    row = max((c.measured for c in history.clients if c.measured), key=lambda r: r.server_round, default=None)
    if row is None:
        return []
    found: list[tuple[str, object]] = [("unit", row.unit), ("device", row.device), ("dtype", row.dtype)]
    found += [(name, value) for name, value in row.settings.items() if name != "unit"]
    found += [(f"version of {name}", value) for name, value in row.versions.items()]
    return [(plain(name), _value(value)) for name, value in found if value not in ("", None)]


def _value(value: object) -> str:
    if isinstance(value, str | int | float):
        return plain(str(value))
    return shortened(plain(json.dumps(value, default=str)), _DETAIL_LENGTH)


def _counts(counts: Counter[Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or ABSENT


def _name(text: str) -> str:
    return shortened(plain(text), _NAME_LENGTH) or ABSENT


def _names(names: Iterable[str]) -> str:
    listed = [_name(name) for name in names]
    more = f" and {len(listed) - _NAMES} more" if len(listed) > _NAMES else ""
    return ", ".join(listed[:_NAMES]) + more


def _detail(text: str) -> str:
    return shortened(plain(text), _DETAIL_LENGTH)
