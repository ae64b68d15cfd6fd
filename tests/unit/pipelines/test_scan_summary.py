"""What a scan concludes: exit codes, drift, and a summary that nobody can forge."""

from __future__ import annotations

import dataclasses
import json
import threading
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from audit_plugin import publishing
from audit_plugin.attestation import SIGNING_KEY, VERIFYING_KEYS, VerifyingKeys, keys_from_environment, signer_from_environment
from audit_plugin.attestation import generate_keys as make_keys
from audit_plugin.promotion import Promotion
from audit_plugin.types import Decision, Expectation, Reason, Verdict
from pipelines import scan_registry
from pipelines.scan.page import render_page
from pipelines.scan.summary import OUTCOMES, Drift, Row, Summary, compared, open_summary, sign_summary, summary_from

NOBODY = VerifyingKeys(())


def row(name="digits", version="1", outcome="pass", *, promoted=False, digest="sha256:a", created="2026-01-01", **more):
    return Row(name, version, created, (), promoted, outcome, digest=digest, **more)


def summary(*rows, run_id="run", since=None, **more):
    return Summary(run_id, "2026-01-01T00:00:00+00:00", 1.0, {"since": since}, {"policy_digest": "x"}, rows, **more)


@pytest.fixture
def keys(tmp_path):
    signing, verifying = make_keys(tmp_path)
    environment = {SIGNING_KEY: str(signing), VERIFYING_KEYS: str(verifying)}
    return signer_from_environment(environment), keys_from_environment(environment=environment)


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["pass"], 0),
        (["pass", "inconclusive"], 3),
        (["pass", "no clean images"], 3),
        (["pass", "pending"], 3),
        (["pass", "error", "inconclusive"], 2),
        (["fail", "error", "inconclusive", "no clean images"], 1),
    ],
)
def test_exit_code_is_that_of_the_worst_version(outcomes, code):
    found = summary(*(row(version=str(index), outcome=outcome) for index, outcome in enumerate(outcomes)))
    assert found.exit_code("any") == code


def test_nothing_in_scope_is_no_success_unless_only_new_versions_were_asked_for():
    assert summary().exit_code("any") == 3
    assert summary(since="1d").exit_code("any") == 0


def test_fail_on_new_passes_over_known_failures_but_not_over_errors():
    known = summary(row(outcome="fail"))
    again = compared(summary(row(outcome="fail")), known)
    assert (again.exit_code("any"), again.exit_code("new")) == (1, 0)
    broken = compared(summary(row(outcome="fail"), row(version="2", outcome="error")), known)
    assert broken.exit_code("new") == 2
    assert compared(summary(row(outcome="fail")), summary(row(outcome="pass"))).exit_code("new") == 1


def test_the_first_scan_finds_every_failure_new_and_no_version_new():
    drift = compared(summary(row(outcome="fail", promoted=True), row(version="2")), None).drift
    assert drift == Drift(newly_failing=("models:/digits/1",), alarming=("models:/digits/1",))


def test_drift_names_what_changed():
    before = summary(
        row("gone"),
        row("worse"),
        row("better", outcome="inconclusive"),
        row("same", outcome="fail"),
        row("bytes", digest="sha256:a"),
    )
    now = summary(
        row("worse", outcome="fail"), row("better"), row("same", outcome="fail"), row("bytes", digest="sha256:b"), row("new")
    )
    drift = compared(now, before).drift
    assert drift.newly_failing == ("models:/worse/1",)
    assert drift.newly_passing == ("models:/better/1",)
    assert drift.changed == ("models:/bytes/1",)
    assert drift.new == ("models:/new/1",)
    assert drift.gone == ("models:/gone/1",)
    assert drift.alarming == ()


def test_a_failing_version_with_other_files_fails_anew():
    drift = compared(summary(row(outcome="fail", digest="sha256:b")), summary(row(outcome="fail"))).drift
    assert drift.newly_failing == drift.changed == ("models:/digits/1",)


def test_a_version_made_anew_under_the_same_number_is_another_one():
    drift = compared(summary(row(outcome="fail", created="2026-02-02")), summary(row(outcome="fail"))).drift
    assert drift.newly_failing == drift.new == drift.gone == ("models:/digits/1",)


def test_a_known_failure_alarms_when_it_is_promoted():
    drift = compared(summary(row(outcome="fail", promoted=True)), summary(row(outcome="fail"))).drift
    assert (drift.newly_failing, drift.alarming) == ((), ("models:/digits/1",))
    again = compared(summary(row(outcome="fail", promoted=True)), summary(row(outcome="fail", promoted=True))).drift
    assert again.alarming == ()


def test_metrics_count_earlier_audits_as_skipped_and_errors_as_neither():
    found = summary(row(audited=True), row(version="2"), row(version="3", outcome="error"), row(version="4", outcome="fail"))
    metrics = found.metrics
    assert (metrics["found"], metrics["audited"], metrics["skipped"]) == (4, 1, 2)
    assert (metrics["pass"], metrics["fail"], metrics["error"], metrics["no_clean_images"]) == (2, 1, 1, 0)


def test_a_document_reads_back():
    found = compared(summary(row(outcome="fail", suspected="7", promoted=True), row(version="2")), None)
    assert summary_from(json.loads(json.dumps(found.document()))).rows == found.rows


def test_a_signed_summary_is_believed_only_with_its_own_key_and_of_its_own_run(keys, tmp_path):
    signer, verifying = keys
    text = sign_summary(summary(row()), signer)
    opened = open_summary(text, "run", verifying)
    assert opened is not None
    assert opened.rows == (row(),)
    assert open_summary(text, "another run", verifying) is None
    _, foreign = make_keys(tmp_path / "foreign")
    assert open_summary(text, "run", keys_from_environment(environment={VERIFYING_KEYS: str(foreign)})) is None


def test_with_keys_an_unsigned_summary_is_not_believed(keys):
    plain = json.dumps(summary(row()).document())
    assert open_summary(plain, "run", keys[1]) is None
    assert open_summary(plain, "run", NOBODY) is not None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "[" * 100_000, '{"payload": 1, "signatures": []}'])
def test_text_that_is_no_summary_is_none(keys, text):
    assert open_summary(text, "run", keys[1]) is None
    assert open_summary(text, "run", NOBODY) is None


def test_an_unknown_outcome_is_not_believed():
    document = summary(row()).document()
    document["versions"][0]["outcome"] = "clean"
    assert open_summary(json.dumps(document), "run", NOBODY) is None


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text, self.links = set(), "", []

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.links += [value for name, value in attributes if name == "href"]

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_hostile_names_as_text(monkeypatch):
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: "http://user:secret@mlflow.example:5000")
    evil = "<script>alert(1)</script>\u202e"
    found = summary(row(evil, outcome="fail", reason="<img src=x onerror=alert(2)>", suspected="<b>", run_id="ab12"))
    found = compared(found, summary(row("gone"), row(evil)))
    page = render_page(found, "7")
    read = _Tags()
    read.feed(page)
    assert not {"script", "img", "b", "link"} & read.seen
    assert "<script>alert(1)</script>\\u202e" in read.text
    assert read.links == ["http://mlflow.example:5000/#/experiments/7/runs/ab12"]
    assert "secret" not in page


def test_a_run_id_that_is_none_is_no_link():
    found = dataclasses.replace(row(outcome="fail"), run_id='x"onclick="')
    read = _Tags()
    read.feed(render_page(summary(found), "7"))
    assert read.links == []


def test_the_page_of_a_large_registry_stays_readable():
    page = render_page(summary(*(row(version=str(number)) for number in range(6000))), None)
    assert page.count("<tr") == 5001
    assert "1000 more are in summary.json" in page


def test_outcomes_are_in_the_order_of_attention():
    assert OUTCOMES[0] == "fail"
    assert OUTCOMES[-1] == "pass"


@pytest.mark.parametrize(
    ("verdict", "allowed", "outcome"), [("pass", True, "pass"), ("pass", False, "fail"), ("inconclusive", False, "inconclusive")]
)
def test_a_version_that_the_promotion_suite_refuses_does_not_count_as_passed(verdict, allowed, outcome, monkeypatch):
    """As 'gate' and 'verify' have it, after the audit as well as in later scans."""
    unmet = Expectation("only-pt2", "Only .pt2 goes into production.", False, "onnx")
    promotion = Promotion(allowed, "sha256:s", () if allowed else (unmet,))
    monkeypatch.setattr(publishing, "publish", lambda report, suite: SimpleNamespace(promotion=promotion, run_id="7"))
    reasons = (Reason("no-class-stands-out", "None stands out."),)
    report = SimpleNamespace(decision=Decision(Verdict(verdict), reasons), model=SimpleNamespace(digest="sha256:a"))
    finished = SimpleNamespace(seconds=1.0, report=report)
    now = scan_registry._ended(row(outcome="pending"), finished, SimpleNamespace(suite=None), threading.Event())
    assert now.outcome == outcome
    assert ("Only .pt2 goes into production." in now.reason) is (outcome == "fail")
    assert (now.reason == "None stands out.") is (outcome != "fail")

    facts = {"verdict": verdict, "promotion": {"allowed": allowed}, "reasons": ["no-class-stands-out"], "run_id": "7"}
    standing = SimpleNamespace(attestation=SimpleNamespace(facts=facts, digest="sha256:a"))
    monkeypatch.setattr(scan_registry, "_row", lambda entry, outcome, **more: row(outcome=outcome, **more))
    earlier = scan_registry._earlier(None, standing)
    assert earlier.outcome == outcome
    assert ("promotion suite does not allow it" in earlier.reason) is (outcome == "fail")
