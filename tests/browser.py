"""A real headless Chromium, for the tests of pages."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
LOCAL_SCHEMES = ("data", "blob", "about", "chrome", "chrome-extension", "devtools")

needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="Chromium and its driver are missing (Debian: chromium chromium-driver)"
    ),
]


def strangers(browser: WebDriver, server: str) -> set[str]:
    """Addresses elsewhere than on the server that the page and its frames have asked for since this was last called."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    here = urlsplit(server).netloc
    return {url for url in requested if urlsplit(url).scheme not in LOCAL_SCHEMES and urlsplit(url).netloc != here}
