"""What the page says, what it must not do with text from clients, and the command that writes it."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_privacy.audit.curve import ExampleLeakage
from fl_privacy.audit.estimate import Source, Status
from fl_privacy.audit.ledger import Ledger
from fl_privacy.cli import app
from fl_privacy.interval import Interval
from fl_privacy.report import read_checked_history, read_history
from fl_privacy.report.figures import classes_figure
from fl_privacy.report.page import _outcomes, _rounds, headline, rounds_text
from fl_privacy.report.pictures import find_pictures

from .cases import HOSTILE, audited, silent

PNG = b"\x89PNG\r\n\x1a\n" + bytes(32)
"""As much of a picture as is looked at."""


class Page(HTMLParser):
    """The text of a page, and what its tags carry."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._unread = ""
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._unread = tag if tag in ("script", "style") else self._unread

    def handle_endtag(self, tag):
        self._unread = "" if tag == self._unread else self._unread

    def handle_data(self, data):
        self.text += "" if self._unread else data


def report(path: Path, *arguments: object, code: int = 0) -> Page:
    output = path.parent / "out" / "report.html"
    result = CliRunner().invoke(app, ["report", str(path), "-o", str(output), *map(str, arguments)])
    assert result.exit_code == code, result.output
    return Page(output.read_text(encoding="utf-8"))


class TestHeadline:
    def test_who_how_much_since_when_and_what_changed(self, path):
        with Ledger.open(path) as ledger:
            found = headline(read_history(ledger))
        assert found == {
            "run": "later",
            "round": 2,
            "target": 0.5,
            "clients": 6,
            "targets": [0.5],
            "above_target": 3,
            "not_known": 1,
            "worst_client": "1",
            "worst_leakage": [0.95, 0.97, 0.99],
            "worst_above_since": 1,
            "what_to_do": {
                "client": "1",
                "target": 0.5,
                "target_met": False,
                "observed_noise_std": pytest.approx(0.0044, rel=0.01),
                "total_noise_std": 0.025,
                "noise_to_add_std": 0.025,
            },
            "change": {"rose": ["2"], "fell": ["3"], "lost": ["4"], "joined": ["10"]},
        }

    def test_the_page_says_so(self, path):
        text = report(path).text
        assert "client 1 leakage 0.97 [0.95, 0.99], above target since round 1" in text
        assert "3 of 6 50 %; of 1 more nothing is known" in text
        assert "1 up, 1 down now above target: 2. now below: 3. no longer known: 4." in text
        assert "σ = 0.025 in all" in text
        assert "σ = 0.0044 was observed, but unevenly or unexplained: it does not count" in text
        assert "Untouched: 14 rows" in text

    def test_a_client_within_its_target_is_told_to_do_nothing(self, tmp_path):
        path = tmp_path / "l.db"
        with Ledger(path) as ledger:
            ledger.append([audited(1, "a", 0.3)], run_id="r")  # with noise of 0.0153, of which the target needs 0.01
        page = report(path)
        assert "What to do about client a nothing the target of 0.5 is met, with the noise that is on it" in page.text
        assert (
            "Nothing is recommended: the target of 0.5 is met, with the noise that is on it (σ = 0.0153)" in page.text
        )
        assert "in all (norm" not in page.text

    def test_noise_that_is_credited_is_not_added_again(self, tmp_path):
        with Ledger(tmp_path / "l.db") as ledger:
            ledger.append([audited(1, "a", 0.7, verified=True, even_noise=True)], run_id="r")
            found = headline(read_history(ledger))["what_to_do"]
        own = audited(1, "a", 0.7).curve.noise_std_at(0.72)
        assert 0.004 < own < found["total_noise_std"] == 0.01
        assert found["noise_to_add_std"] ** 2 + own**2 == pytest.approx(0.01**2)

    def test_who_may_be_above_counts_as_above_and_comes_first(self, tmp_path):
        path = tmp_path / "l.db"
        with Ledger(path) as ledger:
            doubtful = replace(audited(1, "doubtful", 0.4), leakage=Interval(0.3, 0.4, 0.6))
            ledger.append([audited(1, "sure", 0.45), doubtful], run_id="r")
            found = headline(read_history(ledger))
        assert (found["worst_client"], found["above_target"], found["what_to_do"]["client"]) == (
            "doubtful",
            1,
            "doubtful",
        )
        assert "It counts who may be above: the upper end of the interval is." in report(path).text

    def test_whom_to_protect_is_above_its_own_target(self, tmp_path):
        path = tmp_path / "l.db"
        with Ledger(path) as ledger:
            ledger.append(
                [audited(1, "a", 0.8, target_leakage=0.9), audited(1, "b", 0.3, target_leakage=0.1)], run_id="r"
            )
            found = headline(read_history(ledger))
        assert (found["worst_client"], found["what_to_do"]["client"]) == ("a", "b")
        assert "each its own (0.1 to 0.9) 1 of 2" in report(path).text

    def test_the_median_of_two_is_between_them(self, tmp_path):
        with Ledger(tmp_path / "l.db") as ledger:
            ledger.append([audited(1, "a", 0.8), audited(1, "b", 0.3)], run_id="r")
            history = read_history(ledger)
        assert _rounds(history)[0]["median"] == pytest.approx(0.55)

    def test_an_equal_leak_that_needs_more_noise_is_worse(self, tmp_path):
        with Ledger(tmp_path / "l.db") as ledger:
            rows = [
                audited(1, "a", 1.0, needed=0.01),
                audited(1, "b", 1.0, needed=0.03),
                audited(1, "c", 0.9, needed=1),
            ]
            ledger.append(rows, run_id="r")
            history = read_history(ledger)
        assert [client.name for client in history.clients] == ["b", "a", "c"]
        assert history.worst().name == "b"
        assert history.change() is None

    def test_a_silent_round_does_not_end_a_stretch_above_target(self, tmp_path):
        with Ledger(tmp_path / "l.db") as ledger:
            for number, leakage in enumerate((0.9, 0.1, 0.8, None, 0.7), start=1):
                ledger.append([silent(number, "a") if leakage is None else audited(number, "a", leakage)], run_id="r")
            (client,) = read_history(ledger).clients
        assert [client.above_since(number) for number in range(1, 6)] == [1, None, 3, 3, 3]

    def test_a_run_of_which_nothing_is_known(self, tmp_path):
        path = tmp_path / "l.db"
        with Ledger(path) as ledger:
            ledger.append([silent(1, "a", status=Status.UNPROTECTED, detail="no mod")], run_id="r")
        page = report(path)
        assert "not known no client has an estimate" in page.text
        assert "of 1 more nothing is known" in page.text
        assert "unprotected" in page.text

    def test_rows_of_an_older_version_without_curves_and_examples(self, tmp_path):
        path = tmp_path / "l.db"
        with Ledger(path) as ledger:
            ledger.append([audited(1, "a", 0.9, curve=None, examples=(), required_noise_norm=None)], run_id="r")
        page = report(path)
        assert "This row holds no curve" in page.text
        assert "No row lists examples with a class" in page.text
        assert "holds no accuracy" in page.text


class TestRows:
    def test_every_row_of_a_small_run_is_shown_with_what_was_done(self, path):
        page = report(path)
        assert "Every row of the run" in page.text
        assert [tag for tag, _ in page.tags].count("polyline") == 6
        assert "noise advised" not in page.text  # where no row has any
        with Ledger(path) as ledger:
            advised = audited(3, "1", 0.3, advised_noise_std=0.02, applied_noise_std=0.0125, claim_holds=False)
            ledger.append([advised], run_id="later")
        html = re.sub(r"\s+", " ", report(path).text)
        assert "noise advised noise put on defence claimed claim action" not in html  # cells have nothing between them
        assert "noise advisednoise put on" in html
        assert "0.020.0125fails" in html

    def test_all_rounds_together_noise_on_inputs_and_differential_privacy(self, path):
        with Ledger(path) as ledger:
            row = audited(
                3,
                "1",
                0.3,
                rounds_leakage=Interval(0.4, 0.5, 0.6),
                rounds_passed_leakage=Interval(0.1, 0.2, 0.25),
                input_noise="public",
                input_noise_leakage=0.35,
                epsilon=math.inf,
                delta=1e-5,
            )
            same = dict.fromkeys(("rounds_leakage", "rounds_passed_leakage"), Interval(0.2, 0.2, 0.2))
            ledger.append([row, audited(3, "2", 0.2, **same)], run_id="later")
        html = re.sub(r"\s+", " ", report(path).text)
        passed = "passed on in all rounds so far"
        assert f"all rounds so farnoise on inputsleakage behind it, at most{passed}differential privacy, ε" in html
        assert "≤ 0.60public0.35≤ 0.25∞ at δ = 1e-05" in html
        assert "≤ 0.20----" in html  # of what was passed on as it arrived there is nothing more to say
        assert "what a client's rounds up to this one tell together" in html
        assert "noise advised" not in html  # of which no row of this run says anything

    def test_a_run_of_many_rows_keeps_status_and_source_of_each(self, tmp_path):
        path = tmp_path / "l.db"
        with Ledger(path) as ledger:
            for number in range(1, 42):
                lost = silent(number, "c-0") if number in (7, 8, 40) else audited(number, "c-0", 0.7)
                rows = [audited(number, f"c-{c}", 0.9 - c / 100, source=Source.CLIENT) for c in range(1, 25)]
                ledger.append([lost, *rows], run_id="r")
            history, verification = read_checked_history(ledger)
        assert verification.ok
        assert (history.rows, verification.rows, history.every_row) == (1025, 1025, ())
        first = next(client for client in history.clients if client.name == "c-0")
        assert first.last.examples == ()
        assert len(first.measured.examples) == 4
        assert sum(len(rounds) for client in history.clients for rounds in client.outcomes.values()) == 1025
        lines = dict(_outcomes(history))
        assert [(e["status"], e["source"], e["rounds"]) for e in lines["c-0"]] == [
            (Status.AUDITED, Source.TRUSTED, "1-6, 9-39, 41"),
            (Status.NO_REPLY, Source.NONE, "7-8, 40"),
        ]
        assert [(e["source"], e["rounds"]) for e in lines["c-24"]] == [(Source.CLIENT, "1-41")]
        page = report(path)
        assert "All 1025 rows" in page.text
        assert [tag for tag, _ in page.tags].count("polyline") == 25
        # Per client at most a row, a small curve and its outcomes: 1,000 of them stay under 10 MB.
        html = (path.parent / "out" / "report.html").read_text(encoding="utf-8")
        growing = html[html.index('id="curves"') : html.index('id="spread"')] + html[html.index('id="rows"') :]
        assert len(growing.encode()) / 25 * 1000 < 5e6

    def test_rounds_in_words(self):
        assert rounds_text([3, 1, 2, 7, 7]) == "1-3, 7, 7"


class TestUntrustedText:
    def test_it_is_text_and_never_markup(self, path):
        page = report(path)
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert not any(tag == "img" for tag, _ in page.tags)
        assert "<script>alert('owned')</script>" in page.text  # shown as it came
        assert "\u202e" not in page.text

    def test_figures_are_well_formed_and_hold_none_of_it(self, path):
        report(path)
        html = (path.parent / "out" / "report.html").read_text(encoding="utf-8")
        figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
        small = [figure for figure in figures if "<polyline" in figure]
        assert len(figures) == 1 + 6 + 6 + 1  # over rounds, six clients' curves, the same in small, classes
        assert len(small) == 6
        for figure in figures:
            ET.fromstring(figure)
            assert "alert" not in figure

    def test_ids_are_unique(self, path):
        ids = [attributes["id"] for _, attributes in report(path).tags if "id" in attributes]
        own = [name for name in ids if not re.fullmatch(r"[pm][0-9a-f]{10}|.*_[0-9a-f]{10}", name)]
        assert sorted(own) == sorted(set(own))

    def test_nothing_is_loaded(self, path):
        for tag, attributes in report(path).tags:
            for name in ("src", "href", "xlink:href", "action"):
                target = attributes.get(name) or "#"
                assert target.startswith(("#", "data:image/")), (tag, target)
        html = (path.parent / "out" / "report.html").read_text(encoding="utf-8")
        assert "default-src 'none'" in html
        assert "@import" not in html


class TestPictures:
    def test_those_beside_the_ledger_are_embedded_before_ahead_of_after(self, path):
        folder = path.parent / "run.pictures"
        folder.mkdir()
        for name in ("client-10-after.png", "client-10-before.png", "client-9-after.png", "client-9-before.png"):
            (folder / name).write_bytes(PNG)
        (folder / "fake.png").write_text("<svg onload='alert(1)'>")
        (folder / "notes.txt").write_text("no picture")
        page = report(path)
        pictures = [attributes for tag, attributes in page.tags if tag == "img"]
        assert [picture["alt"] for picture in pictures] == [
            f"client-{number}-{when}" for number in (9, 10) for when in ("before", "after")
        ]
        assert {picture["src"][:22] for picture in pictures} == {"data:image/png;base64,"}
        assert "1 more file found no room or are no pictures" in page.text

    def test_there_is_a_limit(self, tmp_path):
        for number in range(30):
            (tmp_path / f"{number}.png").write_bytes(PNG)
        (tmp_path / "0-large.png").write_bytes(PNG + bytes(4 * 1024**2))
        pictures, skipped = find_pictures(tmp_path)
        assert (len(pictures), skipped) == (24, 7)
        assert find_pictures(tmp_path / "none") == ([], 0)


class TestCommand:
    def test_another_run(self, path):
        assert "client a leakage 0.30" in report(path, "--run", "earlier").text

    def test_json(self, path):
        result = CliRunner().invoke(app, ["report", str(path), "-o", str(path.parent / "r.html"), "--json"])
        outcome = json.loads(result.stdout)
        assert (outcome["ok"], outcome["worst_client"], outcome["above_target"]) == (True, "1", 3)

    def test_a_ledger_that_was_tampered_with(self, path):
        raw = sqlite3.connect(path)
        with raw:
            raw.execute("UPDATE fl_privacy_ledger SET payload = replace(payload, '0.97', '0.17') WHERE sequence = 8")
        raw.close()
        text = report(path, code=1).text
        assert "The ledger fails its check." in text
        assert "row 8: was changed" in text

    def test_a_head_that_the_ledger_has_and_one_that_it_has_not(self, path):
        with Ledger.open(path) as ledger:
            head = ledger.head()
        assert "up to row 14 as they were" in report(path, "--head", head).text
        arguments = ["report", str(path), "-o", str(path.parent / "r.html"), "--head", "ab" * 32]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        assert "TAMPERED: no row has the expected head abab" in result.stderr
        assert "no row has the expected head abab" in Page((path.parent / "r.html").read_text()).text

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["none.db"], "there is no ledger"),
            (["run.db", "--pictures", "none"], "there is no such folder"),
            (["run.db", "--pictures", "."], "there are none"),
            (["run.db", "--run", "x"], "holds no run 'x', but earlier, later"),
        ],
    )
    def test_what_cannot_be_reported(self, path, monkeypatch, arguments, words):
        monkeypatch.chdir(path.parent)
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.exit_code == 2
        assert words in result.stderr
        assert not Path("report.html").exists()

    def test_needs_neither_torch_nor_flower(self, path):
        program = (
            "import sys; from fl_privacy.cli import app\n"
            f"try: app(['report', {str(path)!r}, '-o', {str(path.parent / 'r.html')!r}])\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "assert not {'torch', 'flwr', 'ray'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def test_hostile_text_is_hostile():
    assert "<" in HOSTILE
    assert not HOSTILE.isprintable()


@pytest.mark.parametrize(
    "needs",
    [(0.02, 0.03, 0.07), (0.051, 0.052, 0.053), (0.055, 0.08, 0.11), (0.01, 0.012, 0.014), (1e-6, 1.0, 100.0)],
)
def test_the_axis_of_noise_has_numbers_over_however_few_or_many_decades(needs):
    examples = (
        ExampleLeakage(index=i, label=i, leakage=0.9, required_noise_std=needed) for i, needed in enumerate(needs)
    )
    svg = classes_figure([audited(1, "a", 0.9, examples=tuple(examples))])
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    numbers = [float(text) for text in texts if re.fullmatch(r"[\d.e-]+", text) and text not in ("0", "1", "2")]
    assert sum(0.9 * needs[0] < number < 1.1 * needs[-1] for number in numbers) >= 2
