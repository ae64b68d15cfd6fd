"""The rule of promotion: one version that may pass, and everything that turns it away."""

from __future__ import annotations

import dataclasses
import datetime

import pytest

from audit_plugin.attestation import SIGNING_KEY, TAG_OF, VERIFYING_KEYS, Statement, generate_keys, keys_from_environment, sign
from audit_plugin.attestation import signer_from_environment as signer_of
from audit_plugin.errors import AttestationError
from audit_plugin.gate import (
    Requirements,
    VersionFacts,
    check_sealed_tag,
    is_protected,
    is_sealed,
    must_stay,
    standing_of,
)
from audit_plugin.policy import GatePolicy

NOW = datetime.datetime(2026, 3, 10, 12, 0, tzinfo=datetime.UTC)
DIGEST, POLICY, SUITE = "sha256:" + "ab" * 32, "sha256:policy", "sha256:suite"
FACTS = {"verdict": "pass", "policy_digest": POLICY, "promotion": {"allowed": True, "suite_digest": SUITE}}
GATE = GatePolicy(maximum_age_days=30, maximum_waiver_days=7)


def days(count):
    return datetime.timedelta(days=count)


MADE = NOW - days(3)
AUDIT = Statement("verdict", "digits", "3", DIGEST, NOW - days(2), {"audit.verdict": "pass", "audit.digest": DIGEST}, FACTS, MADE)
WAIVER = Statement(
    "waiver",
    "digits",
    "3",
    DIGEST,
    NOW - days(1),
    {"audit.waived": "by Ada"},
    {"by": "Ada", "reason": "outage", "until": (NOW + days(1)).isoformat()},
    MADE,
)


@pytest.fixture(scope="module")
def keyring(tmp_path_factory):
    """Signers and verifying keys of the auditor, of who may waive, and of a stranger."""
    found = {}
    for name in ("auditor", "officer", "stranger"):
        signing, verifying = generate_keys(tmp_path_factory.mktemp(name))
        found[name] = signer_of({SIGNING_KEY: str(signing)}), keys_from_environment(environment={VERIFYING_KEYS: str(verifying)})
    return found


@pytest.fixture(scope="module")
def requirements(keyring):
    return Requirements(GATE, POLICY, SUITE, keyring["auditor"][1], keyring["officer"][1])


@pytest.fixture(scope="module")
def standing(keyring, requirements):
    """The standing of a version with these statements: ``standing(audit=..., waiver=..., digest=...)``."""

    def judge(audit=AUDIT, waiver=None, digest=DIGEST, by="auditor", waived_by="officer", created=MADE, now=NOW):
        tags = {}
        if audit is not None:
            tags[TAG_OF["verdict"]] = sign(audit, keyring[by][0])
        if waiver is not None:
            tags[TAG_OF["waiver"]] = sign(waiver, keyring[waived_by][0])
        return standing_of(VersionFacts("digits", "3", created, tags), requirements, digest=digest, now=now)

    return judge


def codes(standing):
    return [reason.code for reason in standing.reasons]


def with_facts(**facts):
    return dataclasses.replace(AUDIT, facts={**FACTS, **facts})


def test_an_audited_version_that_passed_may_be_promoted(standing):
    found = standing()
    assert (found.allowed, found.counts, found.is_refuted, codes(found)) == (True, True, False, [])
    assert found.attestation == AUDIT


@pytest.mark.parametrize(
    ("audit", "code", "refuted", "counts"),
    [
        (None, "not-audited", False, False),
        (with_facts(verdict="fail"), "verdict-fail", True, True),
        (with_facts(verdict="inconclusive"), "verdict-inconclusive", False, False),
        (with_facts(verdict=None), "verdict-None", False, False),
        (with_facts(verdict="PASS"), "verdict-PASS", False, False),
        (with_facts(promotion={"allowed": False, "suite_digest": SUITE}), "promotion-suite", True, True),
        (with_facts(promotion={"allowed": "yes", "suite_digest": SUITE}), "promotion-suite", True, True),
        (with_facts(promotion={"allowed": True, "suite_digest": "sha256:old"}), "another-suite", False, False),
        (with_facts(promotion=None), "promotion-suite", True, False),
        (with_facts(policy_digest="sha256:old"), "another-policy", False, False),
        (dataclasses.replace(AUDIT, digest="sha256:" + "cd" * 32), "bytes-changed", True, False),
        (dataclasses.replace(AUDIT, version="4"), "bad-attestation", True, False),
        (dataclasses.replace(AUDIT, name="letters"), "bad-attestation", True, False),
        (dataclasses.replace(WAIVER, facts=FACTS), "bad-attestation", True, False),
        (dataclasses.replace(AUDIT, created=NOW + days(1)), "from-the-future", False, False),
    ],
)
def test_what_turns_a_version_away(standing, audit, code, refuted, counts):
    found = standing(audit=audit)
    assert code in codes(found)
    assert (found.allowed, found.is_refuted, found.counts) == (False, refuted, counts)


def test_an_audit_counts_to_the_last_day(standing):
    assert standing(now=AUDIT.created + days(30)).allowed
    found = standing(now=AUDIT.created + days(30.1))
    assert (found.allowed, codes(found)) == (False, ["expired"])
    assert "30.1 days old" in found.reasons[0].message


def test_a_strangers_signature_is_a_forgery(standing):
    found = standing(by="stranger")
    assert (codes(found), found.is_refuted, found.attestation) == (["bad-attestation"], True, None)


@pytest.mark.parametrize("seconds", [-86400, -0.001, 0.001, 86400])
def test_a_version_of_another_time_is_another_version(standing, seconds):
    """It was deleted and made anew, or got its name from another one."""
    found = standing(created=MADE + datetime.timedelta(seconds=seconds))
    assert codes(found) == ["bad-attestation"]
    assert "another version" in found.reasons[0].message


def test_a_statement_that_does_not_say_which_version_holds_for_none(standing):
    assert codes(standing(audit=dataclasses.replace(AUDIT, version_created=None))) == ["bad-attestation"]


def test_an_auditor_whose_clock_is_behind_is_believed(standing):
    assert standing(audit=dataclasses.replace(AUDIT, created=MADE - days(0.001))).allowed


def test_changed_files_are_seen_only_when_they_are_compared(standing):
    assert codes(standing(digest="sha256:other")) == ["bytes-changed"]
    assert standing(digest=None).allowed


def test_a_failed_audit_that_is_out_of_date_is_not_the_last_word(standing):
    found = standing(audit=with_facts(verdict="fail", policy_digest="sha256:old"))
    assert not found.counts
    assert found.is_refuted


# --------------------------------------------------------------------------------------------------------- waivers


@pytest.mark.parametrize("audit", [None, with_facts(verdict="fail"), AUDIT])
def test_a_waiver_makes_up_for_the_audit_and_stays_visible(standing, audit):
    found = standing(audit=audit, waiver=WAIVER)
    assert (found.allowed, found.waiver) == (True, WAIVER)


@pytest.mark.parametrize(
    "waiver",
    [
        dataclasses.replace(WAIVER, facts={**WAIVER.facts, "until": (NOW - days(0.1)).isoformat()}),
        dataclasses.replace(WAIVER, facts={**WAIVER.facts, "until": (NOW + days(8)).isoformat()}),
        dataclasses.replace(WAIVER, facts={**WAIVER.facts, "until": "tomorrow"}),
        dataclasses.replace(WAIVER, facts={**WAIVER.facts, "until": "2030-01-01"}),
        dataclasses.replace(WAIVER, facts={"by": "Ada"}),
        dataclasses.replace(WAIVER, digest="sha256:" + "cd" * 32),
        dataclasses.replace(WAIVER, version="4"),
        dataclasses.replace(WAIVER, created=NOW + days(0.5)),
        dataclasses.replace(AUDIT, facts={**WAIVER.facts, **FACTS}),
    ],
    ids=["over", "too long", "no time", "no zone", "no end", "other files", "other version", "not yet", "no waiver"],
)
def test_a_waiver_that_does_not_hold_is_none(standing, waiver):
    found = standing(audit=None, waiver=waiver)
    assert (found.allowed, found.waiver) == (False, None)


@pytest.mark.parametrize("made", [datetime.datetime.max, datetime.datetime.min], ids=["the last day", "the first day"])
def test_a_waiver_at_the_end_of_the_calendar_is_none(standing, made):
    waiver = dataclasses.replace(WAIVER, created=made.replace(microsecond=0, tzinfo=datetime.UTC))
    found = standing(audit=None, waiver=waiver)
    assert (found.allowed, found.waiver) == (False, None)


@pytest.mark.parametrize("signer", ["auditor", "stranger"])
def test_only_the_keys_for_waivers_sign_them(standing, signer):
    assert not standing(audit=None, waiver=WAIVER, waived_by=signer).allowed


# ------------------------------------------------------------------------------------------------- names and tags


@pytest.mark.parametrize("alias", ["champion", "Champion", "CHAMPION", " champion ", "ｃｈａｍｐｉｏｎ"])
def test_an_alias_is_protected_however_it_is_written(alias):
    assert is_protected(alias, GATE.protected_aliases)


@pytest.mark.parametrize("alias", ["chámpion", "chåmpion", "chaｍpion", "çhampion", "champiön", "чампион"])
def test_an_alias_that_a_database_could_take_for_a_protected_one_is_protected_too(alias):
    assert is_protected(alias, GATE.protected_aliases)


@pytest.mark.parametrize("alias", ["challenger", "champion2", "", "champ"])
def test_other_aliases_are_free(alias):
    assert not is_protected(alias, GATE.protected_aliases)


@pytest.mark.parametrize(
    "key",
    [
        "audit.verdict",
        "Audit.Verdict",
        "AUDIT.x",
        "ａudit.verdict",
        " audit.verdict",
        "audit.Input.mean",
        "áudit.attestation",
        "auđit．x",
        "a\u00adudit.verdict",
    ],
)
def test_audit_tags_are_sealed_however_they_are_written(key):
    assert is_sealed(key)


@pytest.mark.parametrize("key", ["audit.input.mean", "audit.classes", "owner", "auditor", "my.audit.verdict", "größe", "所有者"])
def test_tags_on_the_input_and_all_others_are_not(key):
    assert not is_sealed(key)


@pytest.fixture(scope="module")
def version(keyring):
    return VersionFacts("digits", "3", NOW - days(3), {TAG_OF["verdict"]: sign(AUDIT, keyring["auditor"][0])})


def test_a_tag_is_taken_on_the_word_of_a_statement(version, requirements):
    check_sealed_tag(version, "audit.verdict", "pass", requirements)
    for key, value in (("audit.verdict", "fail"), ("audit.other", "pass"), ("Audit.verdict", "pass")):
        with pytest.raises(AttestationError, match="No signed statement"):
            check_sealed_tag(version, key, value, requirements)


def test_a_newer_statement_replaces_an_older_one_and_never_the_other_way(version, requirements, keyring):
    def signed(statement, by="auditor"):
        return sign(statement, keyring[by][0])

    check_sealed_tag(version, TAG_OF["verdict"], signed(dataclasses.replace(AUDIT, created=NOW)), requirements)
    check_sealed_tag(version, TAG_OF["verdict"], version.tags[TAG_OF["verdict"]], requirements)  # a repeated call
    with pytest.raises(AttestationError, match="newer statement"):
        check_sealed_tag(version, TAG_OF["verdict"], signed(dataclasses.replace(AUDIT, created=NOW - days(2.5))), requirements)
    with pytest.raises(AttestationError, match="by none of the keys"):
        check_sealed_tag(version, TAG_OF["verdict"], signed(dataclasses.replace(AUDIT, created=NOW), "stranger"), requirements)
    with pytest.raises(AttestationError, match="kind"):
        check_sealed_tag(version, TAG_OF["verdict"], signed(dataclasses.replace(AUDIT, kind="origin")), requirements)
    with pytest.raises(AttestationError, match="by none of the keys"):
        check_sealed_tag(version, TAG_OF["waiver"], signed(WAIVER), requirements)
    check_sealed_tag(version, TAG_OF["waiver"], signed(WAIVER, "officer"), requirements)


def test_a_statement_from_a_clock_that_runs_ahead_does_not_block_those_that_follow(version, requirements, keyring):
    def check(created):
        statement = dataclasses.replace(AUDIT, created=created)
        check_sealed_tag(version, TAG_OF["verdict"], sign(statement, keyring["auditor"][0]), requirements, now=NOW)

    check(NOW + datetime.timedelta(minutes=4))
    for ahead in (datetime.timedelta(minutes=6), days(365)):
        with pytest.raises(AttestationError, match="yet to come"):
            check(NOW + ahead)


def test_what_a_statement_vouches_for_must_stay(version, requirements):
    held = dataclasses.replace(version, tags={**version.tags, "audit.verdict": "pass", "audit.digest": "old"})
    assert must_stay(held, TAG_OF["verdict"], requirements)
    assert must_stay(held, "audit.verdict", requirements)
    assert not must_stay(held, "audit.digest", requirements), "no statement says that"
    assert must_stay(held, "Audit.Verdict", requirements), "some databases would delete the other one"
    assert must_stay(dataclasses.replace(version, tags={}), TAG_OF["verdict"], requirements)
