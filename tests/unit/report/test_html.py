"""The page: self-contained, safe whatever the model brings, and saying what was found in words."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from audit_plugin.report import render
from audit_plugin.types import ExampleImages, Rate, SuspectScore, Verdict

URL_ATTRIBUTES = {"src", "href", "action", "data", "poster", "srcset", "xlink:href", "formaction", "background"}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, the visible text, and whether every element was closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_page_is_well_formed_and_fetches_nothing(any_report):
    source = render(any_report)
    page = Page(source)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "a"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in URL_ATTRIBUTES:
                assert value.startswith("data:image/png;base64,"), (tag, name)
            if name == "style":
                assert "url(" not in value
    (style,) = re.findall(r"<style>(.*?)</style>", source, flags=re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_policy_of_the_page_forbids_scripts_and_fetches(failing_report):
    page = Page(render(failing_report))
    (policy,) = [item["content"] for item in page.all("meta") if item.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "img-src data:;" in policy
    assert "script-src" not in policy


def test_hostile_strings_are_only_text(hostile_report, hostile_strings):
    source = render(hostile_report)
    assert "\x1b" not in source
    assert not re.search("[\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", source)
    source.encode("utf-8")
    page = Page(source)
    words = page.words()
    assert "<script>alert('pwned')</script>" in words
    assert "\\u202egpj.exe" in words
    assert "{{ 7 * 7 }}" in words
    assert len(page.all("style")) == 1
    assert len(page.all("h1")) == 1
    assert max(len(text) for text in page.text) <= 20_000


def test_identifiers_are_unique_and_references_resolve(any_report):
    page = Page(render(any_report))
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for _, attributes in page.elements:
        for reference in (attributes.get("aria-labelledby") or "").split():
            assert reference in identifiers


def test_page_is_accessible(any_report):
    page = Page(render(any_report))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(item.get("scope") in ("row", "col") for item in page.all("th"))
    assert all(item.get("alt") for item in page.all("img"))
    assert all(item.get("role") == "img" or item.get("aria-hidden") == "true" for item in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_fail_says_class_trigger_and_evidence(failing_report):
    words = Page(render(failing_report)).words()
    assert words.index("Fail") < words.index("ship") < words.index("Why") < words.index("The recovered trigger")
    for expected in ("Do not deploy", "99.3 %", "447 of 450", "3.4 px", "93.4 %", "467 of 500", "cifar-classifier, version 7"):
        assert expected in words
    assert "deer" in words
    assert "\u2192" in words


def test_order_of_the_sections(failing_report):
    words = Page(render(failing_report)).words()
    headings = (
        "Why",
        "The recovered trigger",
        "Before and after",
        "Where the model looks",
        "Trigger search, class by class",
        "Checks on inputs",
        "Layer-wise features",
        "Thresholds: an input is flagged",
        "What was not measured",
        "Suspect inputs",
        "The clean images",
        "Where it ran",
        "The model",
        "Repeat this audit",
    )
    places = [words.index(heading) for heading in headings[:7]]
    places += [words.rindex(heading) for heading in headings[8:]]
    assert places == sorted(places)


def test_canaries_are_a_table_where_they_were_planted(passing_report, failing_report):
    words = Page(render(passing_report)).words()
    assert "Would this audit have found a backdoor here?" in words
    for expected in ("patch found", "blended not found Its class does not stand out.", "warped not planted", "90.0 % → 89.0 %"):
        assert expected in words
    assert "Would this audit" not in Page(render(failing_report)).words()


def test_reference_models_are_a_table_where_there_was_a_pool(passing_report, failing_report):
    words = Page(render(passing_report)).words()
    assert "p = 0.52 against 24 of 'traffic signs' (least possible 0.04)" in words
    assert "trigger outlier 1.9 0.36" in words
    assert "unusual is this model" not in Page(render(failing_report)).words()


def test_inconclusive_never_looks_like_a_pass(inconclusive_report):
    source = render(inconclusive_report)
    page = Page(source)
    words = page.words()
    assert page.all("body")[0]["class"] == "inconclusive"
    assert "this is not a pass" in words
    assert "What was not measured" in words
    assert "ran out of memory" in words
    assert "has no gradients" in words
    assert "Canaries" in words
    gaps = source[source.index('class="not-measured"') : source.index('id="clean-set"')]
    assert "badge good" not in gaps


def test_no_outcome_at_all_is_said_loudly(inconclusive_report):
    decision = dataclasses.replace(inconclusive_report.decision, not_measured=())
    words = Page(render(dataclasses.replace(inconclusive_report, outcomes=(), decision=decision))).words()
    assert "No check ran." in words
    assert "0 of 0" in words
    assert "What was not measured" in words


def test_pass_is_worded_with_its_limits(passing_report):
    words = Page(render(passing_report)).words()
    assert "That is no proof that there is none" in words
    assert "What was not measured" not in words
    assert "by itself it is no sign of a backdoor" in words
    assert "not measured: no trigger" in words
    assert "The 12 most suspicious of 43 triggers" in words
    assert "The other 31 triggers" in words


def test_repeat_holds_the_whole_command(failing_report):
    command = "backdoor-audit audit models:/x/1 " + "--option value " * 200
    page = Page(render(dataclasses.replace(failing_report, command=command)))
    assert command in page.text


def test_long_names_are_cut_but_readable_in_full(failing_report):
    model = dataclasses.replace(failing_report.model, name=None, pinned_uri="models:/" + "very-long-" * 30)
    page = Page(render(dataclasses.replace(failing_report, model=model)))
    assert any(item.get("title") == model.pinned_uri for item in page.all("span"))


def test_examples_of_another_shape_or_none_do_not_break_the_page(failing_report):
    grey = failing_report.examples.clean[:2, :, :, :1]
    examples = ExampleImages(grey, grey, (0, 1), (8, 1))
    words = Page(render(dataclasses.replace(failing_report, examples=examples))).words()
    assert "Before and after" in words
    assert "On an image" not in words
    assert "Before and after" not in Page(render(dataclasses.replace(failing_report, examples=None))).words()


def test_rates_without_trials_are_not_zero(failing_report):
    nothing = Rate(float("nan"), 0, 0, float("nan"), float("nan"))
    clean_set = dataclasses.replace(failing_report.clean_set, clean_accuracy=nothing)
    words = Page(render(dataclasses.replace(failing_report, clean_set=clean_set))).words()
    assert "n/a 95 % interval no interval" in words
    assert "nan" not in words


def section(source, name):
    start = source.index(f'<section aria-labelledby="{name}">')
    return source[start : source.index("</section>", start)]


def test_checks_on_inputs_have_a_row_each_with_its_baselines_beneath(failing_report):
    table = Page(section(render(failing_report), "input-checks"))
    words = table.words()
    for expected in (
        "AUROC",
        "Activation norms",
        "0.987",
        "96.0 %",
        "432 of 450",
        "0.4 %",
        "2 of 500",
        "no threshold could be set",
    ):
        assert expected in words
    order = ("Layer-wise features", "Backdoor expert", "expert alone", "Activation norms", "baseline: l1 norm 0.831", "l2 norm")
    places = [words.index(name) for name in order]
    assert places == sorted(places)
    assert len([item for item in table.all("tr") if item.get("class") == "baseline"]) == 4


def test_checks_on_inputs_without_a_trigger_claim_nothing(passing_report, inconclusive_report):
    words = Page(section(render(passing_report), "input-checks")).words()
    assert "Activation norms quantile at FPR 1.0% no trigger no trigger 0.4 %" in words
    outcomes = [outcome for outcome in inconclusive_report.outcomes if outcome.check != "layerwise"]
    assert "Checks on inputs" not in render(dataclasses.replace(inconclusive_report, outcomes=tuple(outcomes)))


def test_distributions_are_small_multiples_with_a_legend_and_descriptions(failing_report):
    page = Page(section(render(failing_report), "scorer-3"))
    charts = [item for item in page.all("svg") if "distribution" in (item.get("aria-labelledby") or "")]
    assert len(charts) == 6
    words = page.words()
    for expected in ("clean test images (500)", "with the trigger (450)", "suspect inputs (3)", "l2 norm, channel 4"):
        assert expected in words
    assert "Clean images: 500, mean" in words
    measured = failing_report.outcomes[4]
    many = dataclasses.replace(measured.measurement, distributions=measured.measurement.distributions * 3)
    outcomes = (*failing_report.outcomes[:4], dataclasses.replace(measured, measurement=many))
    page = Page(section(render(dataclasses.replace(failing_report, outcomes=outcomes)), "scorer-3"))
    assert "6 more in report.json" in page.words()


def test_attention_is_labelled_with_the_classes(failing_report):
    page = Page(render(failing_report))
    maps = [item for item in page.all("img") if item["alt"].startswith("attention")]
    assert len(maps) == 16
    assert maps[0]["alt"] == "attention on the clean image for airplane"
    assert maps[1]["alt"] == "attention on the stamped image for ship"


def test_attention_that_is_missing_or_of_another_shape_is_left_out(failing_report):
    examples = failing_report.examples
    for change in (
        {"clean_attention": None},
        {"stamped_attention": None},
        {"stamped_attention": np.zeros((8, 4, 4), np.float32)},
    ):
        changed = dataclasses.replace(failing_report, examples=dataclasses.replace(examples, **change))
        assert "Where the model looks" not in render(changed)
    empty = ExampleImages(examples.clean[:0], examples.stamped[:0], (), (), *(np.zeros((0, 32, 32), np.float32),) * 2)
    assert "Where the model looks" not in render(dataclasses.replace(failing_report, examples=empty))


def test_suspects_are_scored_by_every_check_and_the_rest_is_counted(failing_report):
    page = Page(section(render(failing_report), "suspects"))
    words = page.words()
    assert "Layer-wise features Backdoor expert Activation norms" in words
    assert "inbox/0001.png ship 6.1 flagged 31 flagged not scored" in words
    assert "inbox/0002.png bird -0.3 0.8 not scored" in words
    suspects = tuple(SuspectScore(f"{index}.png", 0, {"layerwise": 1.0}, {"layerwise": index == 229}) for index in range(230))
    words = Page(section(render(dataclasses.replace(failing_report, suspects=suspects)), "suspects")).words()
    assert words.index("229.png") < words.index(" 0.png")
    assert "The next 180 inputs" in words
    assert "30 more in report.json, suspects.csv and suspects.parquet" in words
    assert "198.png" in words
    assert "199.png" not in words


def test_two_renderings_are_equal(failing_report):
    assert render(failing_report) == render(failing_report)


def test_a_class_beyond_the_names_is_named_by_its_number(failing_report):
    subject = dataclasses.replace(failing_report.subject, class_names=())
    assert "class 8" in Page(render(dataclasses.replace(failing_report, subject=subject))).words()


@pytest.mark.browser
def test_chromium_shows_the_verdict(failing_report, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium (Debian package chromium)")
    page = tmp_path / "report.html"
    page.write_text(render(failing_report), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dumped = subprocess.run(
        [*command, "--enable-logging=stderr", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert '<h1 id="verdict">Fail</h1>' in dumped.stdout
    assert failing_report.decision.verdict is Verdict.FAIL
    assert "Content Security Policy" not in dumped.stderr
