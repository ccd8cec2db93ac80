"""The page in a real browser: it draws, works from the keyboard, in both schemes, and when it is large."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from fl_privacy.audit.chain import Verification
from fl_privacy.audit.estimate import Source, Status
from fl_privacy.audit.ledger import Ledger
from fl_privacy.interval import Interval
from fl_privacy.report import ClientHistory, RunHistory, read_history, render_report
from fl_privacy.report.history import Cell, Outcome
from fl_privacy.report.pictures import find_pictures

from .cases import audited

UNTOUCHED = Verification(rows=14, head="0" * 64, anchored=None, problems=())


def page_of(history: RunHistory, path: Path, **options) -> Path:
    path.write_text(render_report(history, UNTOUCHED, ledger="run.db", version="0", **options), encoding="utf-8")
    return path


@pytest.fixture
def page(path, browser):
    with Ledger.open(path) as ledger:
        written = page_of(read_history(ledger), path.with_suffix(".html"))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    for log in ("browser", "performance"):
        browser.get_log(log)  # of pages before this one
    browser.get(written.as_uri())
    return browser


def screenshot(browser, name: str) -> None:
    """Keeps a picture of the whole page where somebody asked for it, to be looked at."""
    if folder := os.environ.get("FL_PRIVACY_SCREENSHOTS"):
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(1200, min(height + 200, 6000))
        Path(folder).mkdir(parents=True, exist_ok=True)  # into a folder that is not there the driver saves nothing
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def assert_fits(browser, script: str) -> None:
    """What a script says is needed comes to be no more than what it says is there: a busy browser lays out late."""
    deadline = time.monotonic() + 10
    needed, there = browser.execute_script(script)
    while needed > there and time.monotonic() < deadline:
        time.sleep(0.05)
        needed, there = browser.execute_script(script)
    assert needed <= there


def contrast(browser, selector: str) -> float:
    """WCAG contrast of an element's text with the page."""
    script = """
    const seen = (value) => {
      const pixel = document.createElement("canvas").getContext("2d");
      pixel.fillStyle = value; pixel.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const element = document.querySelector(arguments[0]);
    const style = getComputedStyle(element);
    const ink = seen(element instanceof SVGElement ? style.fill : style.color);
    const paper = seen(getComputedStyle(document.body).backgroundColor);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    """
    return browser.execute_script(script, selector)


def test_it_draws_without_an_error_or_a_request(page):
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:")) for url in urls)
    sizes = page.execute_script(
        "return [...document.querySelectorAll('details[open] svg, figure > svg')].filter(s => s.checkVisibility())"
        ".filter(s => !s.closest('.small'))"
        ".map(s => s.getBoundingClientRect().width)"
    )
    assert len(sizes) == 3
    assert min(sizes) > 600
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    screenshot(page, "report-light")


def test_text_is_readable_in_both_schemes(page):
    papers = set()
    for _ in range(2):
        papers.add(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
        for selector in ("body", ".soft", ".bad", ".good", "nav a", "figure svg text"):
            assert contrast(page, selector) >= 4.5, selector
        page.find_element("id", "theme").click()
    assert len(papers) == 2
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    page.refresh()
    screenshot(page, "report-dark")


def test_everything_can_be_reached_and_used_from_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(60):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        if active.tag_name == "body":
            break
        reached.append(active.get_attribute("id") or active.get_attribute("aria-label") or active.tag_name)
    assert reached[0] == "a"  # the link that skips to the findings
    assert {"theme", "filter", "Small curves", "Heat map of leakage", "Rows"} <= set(reached)
    assert reached.count("summary") == 1 + 6  # the numbers, and each client
    closed = page.find_elements("css selector", "details:not([open]) > summary")[1]
    closed.send_keys(Keys.ENTER)
    assert page.execute_script("return arguments[0].parentElement.open", closed)


def test_rows_can_be_filtered(page):
    page.find_element("id", "filter").send_keys("no-reply")
    visible = page.execute_script(
        "return [...document.querySelectorAll('#rows tbody tr')].filter(r => !r.hidden).length"
    )
    assert visible == 1
    assert page.find_element("id", "shown").text == "1 of 11 rows shown"


def test_a_wide_picture_fills_the_page_and_opens_to_its_own_size(browser, path, tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    folder.mkdir()
    image.effect_noise((2400, 400), 60).resize((2400, 400)).save(folder / "client-1-round-2.jpg", quality=20)
    with Ledger.open(path) as ledger:
        written = page_of(read_history(ledger), tmp_path / "p.html", pictures=find_pictures(folder, required=True)[0])
    browser.get(written.as_uri())
    assert browser.get_log("browser") == []
    width = "return document.querySelector('.pictures img').getBoundingClientRect().width"
    fitted, main = browser.execute_script(width), browser.execute_script("return document.body.clientWidth")
    assert fitted > 0.85 * main
    screenshot(browser, "report-pictures")
    browser.find_element("css selector", ".zoom").click()
    assert browser.execute_script(width) > 2300
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    browser.find_element("css selector", ".zoom").click()
    assert browser.execute_script(width) == fitted


def test_the_table_of_rows_is_not_cut_off_with_all_that_a_run_with_advice_has(browser, tmp_path):
    more = {
        "rounds_leakage": Interval(0.2, 0.3, 0.4),
        "advised_noise_std": 0.0123,
        "applied_noise_std": 0.0123,
        "action": "perturbed",
        "passed_leakage": 0.31,
        "defence": "dp local 0.01 noise 0.0123",
        "detail": "the client says it put noise of 0.0123 per parameter on its update, and 0.0119 is there",
    }
    with Ledger(tmp_path / "advised.db") as ledger:
        ledger.append([audited(1, str(client), 0.3, **more) for client in range(8)], run_id="advised")
        page = page_of(read_history(ledger), tmp_path / "advised.html")
    browser.set_window_size(1200, 900)
    browser.get(page.as_uri())
    box = "const box = document.querySelector('#rows').parentElement; return [box.scrollWidth, box.clientWidth]"
    page_wide = "return [document.documentElement.scrollWidth, innerWidth]"
    for script in (box, page_wide):
        assert_fits(browser, script)
    screenshot(browser, "report-advised")


def test_a_thousand_clients_in_a_hundred_rounds(browser, tmp_path):
    rounds = range(1, 101)
    clients = []
    for number in range(1000):
        client = ClientHistory(f"hospital-{number}")
        client.last = client.measured = audited(100, client.name, 1 - number / 1000)
        row = client.last
        client.outcomes = {
            Outcome.of(row): list(range(1, 101, 2)),
            Outcome(Status.NO_REPLY, Source.NONE, "excluded", claim_fails=False): list(range(2, 101, 2)),
        }
        client.cells = {r: Cell(row.status, row.leakage, row.required_noise_std, 0.5) for r in rounds}
        clients.append(client)
    history = RunHistory(
        run_id="large",
        rounds=tuple(rounds),
        clients=tuple(clients),
        metrics=(),
        sources=Counter({Source.TRUSTED: 100_000}),
        statuses=Counter({Status.AUDITED: 100_000}),
        rows=100_000,
        written=("", ""),
    )
    page = page_of(history, tmp_path / "large.html")
    assert page.stat().st_size < 10e6
    browser.set_page_load_timeout(60)
    browser.get_log("browser")
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert len(browser.find_elements("css selector", "#rows tbody tr")) == 1000
    assert len(browser.find_elements("css selector", "#outcomes tbody tr")) == 1000
    assert len(browser.find_elements("css selector", ".small polyline")) == 1000
    assert (
        browser.execute_script("return document.querySelector('figure svg image').getBoundingClientRect().width") > 400
    )
    screenshot(browser, "report-large")
