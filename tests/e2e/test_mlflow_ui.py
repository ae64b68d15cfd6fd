"""What a person sees: the report in the MLflow UI's artifact view, in a real browser."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.demo import Demo
from tests.browser import needs_browser, strangers

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

pytestmark = [*needs_browser, pytest.mark.slow]


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

    assert strangers(browser, server) == set()
