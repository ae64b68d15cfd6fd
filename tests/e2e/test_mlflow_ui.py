"""What a person sees: the report in the MLflow UI's artifact view, in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from pipelines.demo import Demo

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
LOCAL_SCHEMES = ("data", "blob", "about", "chrome", "chrome-extension", "devtools")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="Chromium and its driver are missing (Debian: chromium chromium-driver)"
    ),
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[WebDriver]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is missing (pip install '.[dev]')")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--window-size=1600,1400",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def requested(browser: WebDriver) -> list[str]:
    """Addresses of all requests of the page and its frames so far."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def report_page(server: str, backdoored_run: subprocess.CompletedProcess[str]) -> str:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server)
    run_id = client.get_model_version("digits-backdoored", "1").tags["audit.run_id"]
    return f"{server}/#/experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}/artifacts/report.html"


def test_verdict_is_readable_in_the_artifact_view_and_nothing_is_fetched_elsewhere(
    server: str, demo: Demo, backdoored_run: subprocess.CompletedProcess[str], browser: WebDriver, tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(report_page(server, backdoored_run))
    frame = WebDriverWait(browser, 60).until(lambda page: page.find_element(By.CSS_SELECTOR, "iframe[sandbox]"))
    assert "allow-same-origin" not in frame.get_attribute("sandbox")
    browser.switch_to.frame(frame)
    heading = WebDriverWait(browser, 30).until(lambda page: page.find_element(By.CSS_SELECTOR, "h1"))
    body = browser.find_element(By.TAG_NAME, "body")
    assert heading.is_displayed()
    assert "fail" in body.text.lower()
    assert "class 7" in body.text.lower()
    drawn = [picture for picture in browser.find_elements(By.CSS_SELECTOR, "img, svg") if picture.is_displayed()]
    assert len(drawn) > 5
    pictures = browser.find_elements(By.TAG_NAME, "img")
    assert all(browser.execute_script("return arguments[0].naturalWidth", picture) > 0 for picture in pictures)
    browser.switch_to.default_content()
    screenshot = Path(os.environ.get("SCREENSHOT_FOLDER", tmp_path)) / "report-in-mlflow.png"
    assert browser.save_screenshot(str(screenshot))

    host = urlsplit(server).netloc
    strangers = {url for url in requested(browser) if urlsplit(url).scheme not in LOCAL_SCHEMES and urlsplit(url).netloc != host}
    assert strangers == set()
