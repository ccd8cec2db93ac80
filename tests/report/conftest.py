"""A ledger with two runs, the last of which is reported on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fl_privacy.audit.estimate import Status
from fl_privacy.audit.ledger import Ledger
from fl_privacy.audit.metrics import RoundMetrics

from .cases import HOSTILE, audited, silent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Round 1 to 2: client 2 rises above the target, 3 falls below, 4 is lost, 10 joins; 5 is hostile throughout."""
    path = tmp_path / "run.db"
    with Ledger(path) as ledger:
        ledger.append([audited(1, "a", 0.3)], run_id="earlier")
        hostile = silent(1, HOSTILE, status=Status.CLIENT_ERROR, detail=HOSTILE)
        first = [audited(1, "1", 0.97), audited(1, "2", 0.2), audited(1, "3", 0.8), audited(1, "4", 0.4), hostile]
        ledger.append(first, run_id="later")
        ledger.append([RoundMetrics(server_round=1, origin="server", metrics={"accuracy": 0.25})], run_id="later")
        second = [
            audited(2, "1", 0.97, needed=0.025),
            audited(2, "2", 0.7, defence=HOSTILE),
            audited(2, "3", 0.3),
            silent(2, "4"),
            audited(2, HOSTILE, 0.1),
            audited(2, "10", 0.6),
        ]
        ledger.append(second, run_id="later")
        ledger.append([RoundMetrics(server_round=2, origin="server", metrics={"accuracy": 0.75})], run_id="later")
    return path


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium in which pages have no network; skips where none is installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as opened:
        yield opened
