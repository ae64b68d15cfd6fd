"""The audit page in a real MLflow server: in a real browser."""

from __future__ import annotations

import dataclasses
import os
import re

import mlflow
import pytest

from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS
from audit_plugin.publishing import publish
from audit_plugin.registry import pin
from tests.audited_registry import AuditedRegistry
from tests.browser import needs_browser, strangers
from tests.unit.report.conftest import failing

HOSTILE = "<img src=x onerror=alert(1)>\"'& \u202egpj.exe\u202c?a=b#c"

pytestmark = needs_browser


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    filled = AuditedRegistry(tmp_path_factory.mktemp("audited"))
    filled.add("signs", "pass", age=33, aliases=("champion",))
    filled.add("signs", "fail", age=5, suspected="Stop")
    filled.add("scans", "pass", age=12)
    filled.add("scans", "inconclusive", age=3, facts={"policy_digest": "sha256:old"})
    filled.add("faces", "pass", age=40, waived_by="Ada Lovelace", aliases=("champion",))
    filled.add("parcels", tags={"audit.verdict": "pass"})
    filled.add(HOSTILE, "fail", age=2, suspected="</td><script>alert(2)</script>")
    for model in range(60):
        filled.add(f"many-{model:02d}", with_run=False)
    return filled


@pytest.fixture(scope="module")
def server(start_server, registry):
    """The address of an MLflow server with the page and the gate."""
    options = ["--app-name", "backdoor-audit", "--registry-store-uri", f"audited+{registry.database}"]
    with start_server(registry.folder, *options, **registry.environment) as address:
        yield address


@pytest.fixture
def open_page(browser, server):
    """``open_page("?sort=name", width=..., scheme="dark")``."""

    def show(path="", width=1400, scheme="light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(f"{server}/backdoor-audit/{path}")
        return browser

    return show


def select(browser, selector):
    return browser.find_elements("css selector", selector)


def shown(browser):
    """The versions that the table lists; read anew if the page is replaced meanwhile."""
    (listed,) = wait_for(
        browser, lambda: ([" ".join(header.text.split()[:2]) for header in select(browser, ".versions tbody th")],)
    )
    return listed


def wait_for(browser, condition):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 30, ignored_exceptions=(StaleElementReferenceException,))
    return wait.until(lambda _: condition())


def test_page_renders_without_errors_and_asks_nobody_else(open_page, server):
    browser = open_page()
    assert browser.title == "Model versions (backdoor audit)"
    assert shown(browser)[:2] == ["signs v1", "faces v1"]
    images = select(browser, "img")
    assert len(images) == 2
    for image in images:
        browser.execute_script("arguments[0].scrollIntoView()", image)
        wait_for(browser, lambda image=image: browser.execute_script("return arguments[0].naturalWidth", image) == 28)
    assert browser.execute_script("return getComputedStyle(document.querySelector('.tile')).borderRadius") == "12px"
    assert browser.get_log("browser") == []
    assert strangers(browser, server) == set()


def test_filter_sort_and_pages(open_page):
    browser = open_page()
    select(browser, "input[name=text]")[0].send_keys("s v")
    select(browser, "select[name=verdict] option[value=pass]")[0].click()
    select(browser, "button.primary")[0].click()
    assert shown(browser) == ["signs v1", "faces v1", "scans v1"]
    heading = "//thead//a[starts-with(., 'Model version')]"
    browser.find_element("xpath", heading).click()
    assert shown(browser) == ["faces v1", "scans v1", "signs v1"]
    browser.find_element("xpath", heading).click()
    assert shown(browser) == ["signs v1", "scans v1", "faces v1"]
    browser.find_element("link text", "Reset").click()
    assert len(shown(browser)) == 50
    browser.find_element("link text", "Next").click()
    assert len(shown(browser)) == 17
    assert browser.get_log("browser") == []


def test_tile_leads_to_what_it_counts(open_page):
    browser = open_page()
    (tile,) = [tile for tile in select(browser, ".tile") if "Promoted, but refused" in tile.text]
    assert tile.text.split()[0] == "1"
    tile.click()
    assert shown(browser) == ["signs v1"]
    assert select(browser, ".tile[aria-current]")[0].text.split()[0] == "1"


def test_compare_answers_in_place(open_page):
    browser = open_page("?text=scans+v1")
    select(browser, "form.compare button")[0].click()
    output = select(browser, "output")[0]
    wait_for(browser, lambda: output.text == "The files are the ones that were audited.")
    assert output.get_attribute("class") == "same"
    assert browser.current_url.endswith("?text=scans+v1")
    assert browser.get_log("browser") == []


def test_everything_works_without_scripts(open_page, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    open_page("?text=scans+v1")
    select(browser, "form.compare button")[0].click()
    wait_for(browser, lambda: "The files are the ones that were audited." in select(browser, "main")[0].text)
    browser.find_element("link text", "All versions of this model").click()
    assert shown(browser) == ["v2 registered", "v1 registered"]


CONTRAST = """
const channel = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const parse = text => text.match(/[0-9.]+/g).map(Number);
const light = color => {
  const [r, g, b] = color.map(value => channel(value / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = element => {
  for (let at = element; at; at = at.parentElement) {
    const color = parse(getComputedStyle(at).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
  return [255, 255, 255];
};
const low = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility() || element.closest("option, .unseen, .skip, :disabled")) continue;
  const [a, b] = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(ground(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${element.outerHTML.slice(0, 120)}`);
}
return low;
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["", "model?name=signs", "?verdict=x"])
def test_text_has_enough_contrast_in_both_schemes(open_page, scheme, path):
    browser = open_page(path, scheme=scheme)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(int(value) for value in re.findall(r"\d+", paper)) < 200) == (scheme == "dark")
    assert browser.execute_script(CONTRAST) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 800, 1024, 1100, 1400])
@pytest.mark.parametrize("path", ["", "model?name=signs"])
def test_nothing_is_wider_than_the_window(open_page, width, path):
    browser = open_page(path, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_keyboard_reaches_everything_and_focus_is_seen(open_page):
    from selenium.webdriver import ActionChains, Keys

    browser = open_page()
    reached = []
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        active = browser.switch_to.active_element
        outline = browser.execute_script(
            "const style = getComputedStyle(arguments[0]); return [style.outlineStyle, parseFloat(style.outlineWidth)]", active
        )
        assert outline[0] != "none", active.get_attribute("outerHTML")
        assert outline[1] >= 2, active.get_attribute("outerHTML")
        reached.append(f"{active.tag_name} {active.get_attribute('name') or active.text}".strip())
    assert reached[0] == "a Skip to the content"
    for target in ("input text", "select verdict", "select promotion", "select sort", "input promoted", "button Apply"):
        assert target in reached
    assert "button Compare" in "\n".join(reached)
    select(browser, "input[name=text]")[0].send_keys("scans", Keys.ENTER)
    assert set(shown(browser)) == {"scans v1", "scans v2"}


def test_hostile_model_is_only_text_and_leads_to_its_own_pages(open_page, server):
    browser = open_page("?text=onerror")
    assert len(select(browser, ".versions tbody tr")) == 1
    select(browser, ".versions tbody th a")[0].click()
    assert select(browser, "h1")[0].text.startswith("<img src=x")
    assert not select(browser, "img[src=x], script:not([src])")
    assert browser.get_log("browser") == []
    next(link for link in select(browser, ".links a") if link.text.startswith("Version")).click()
    wait_for(browser, lambda: "Version 1" in select(browser, "body")[0].text)
    assert strangers(browser, server) == set()


def test_mlflow_is_still_there(browser, server):
    browser.get(f"{server}/#/models/signs")
    wait_for(browser, lambda: "signs" in select(browser, "body")[0].text and "Version 2" in select(browser, "body")[0].text)
    client = mlflow.MlflowClient(server, server)
    assert client.get_model_version_by_alias("signs", "champion").version in (1, "1")


def test_published_audit_shows_with_its_picture_and_report(open_page, server, registry, keeping_state, tmp_path):
    """What the audit logs is what the page reads: statement, picture, report, figures."""
    version = registry.add("published", registered=1)
    with keeping_state():
        mlflow.set_tracking_uri(server)
        os.environ |= {SIGNING_KEY: str(registry.signing), VERIFYING_KEYS: str(registry.verifying)}
        model = pin(f"models:/published/{version.version}", tmp_path).reference
        logged = publish(dataclasses.replace(failing(), model=model))
    assert logged.signed
    browser = open_page("?text=published")
    browser.refresh()
    (row,) = select(browser, ".versions tbody tr")
    assert "Fail" in row.text
    assert "ship" in row.text
    (image,) = select(browser, ".versions img")
    wait_for(browser, lambda: browser.execute_script("return arguments[0].naturalWidth", image) > 0)
    browser.get(f"{server}/backdoor-audit/model?name=published")
    assert "Trigger outlier score" in select(browser, "dl.figures")[0].text
    next(link for link in select(browser, ".links a") if link.text.startswith("Report")).click()
    frame = wait_for(browser, lambda: select(browser, "iframe[sandbox]"))[0]
    browser.switch_to.frame(frame)
    wait_for(browser, lambda: select(browser, "h1") and select(browser, "h1")[0].text == "Fail")
