"""Whether a version may be promoted: one rule, for the registry, for CI and for those who deploy."""

from __future__ import annotations

import contextlib
import datetime
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from audit_plugin.attestation import (
    TAG_OF,
    Kind,
    Statement,
    VerifyingKeys,
    verify,
)
from audit_plugin.errors import AttestationError
from audit_plugin.model.input_spec import is_input_tag
from audit_plugin.policy import GatePolicy
from audit_plugin.types import Reason, Verdict

AUDIT_PREFIX = "audit."
LAST_WORD = frozenset({"verdict-fail", "promotion-suite"})  # reasons that another audit would only repeat
_CLOCK_TOLERANCE = datetime.timedelta(minutes=5)


@dataclass(frozen=True)
class VersionFacts:
    """A registered version as the registry keeps it; ``created`` in UTC, ``tags`` untrusted."""

    name: str
    version: str
    created: datetime.datetime
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class Requirements:
    """What promotion asks for, from the policy that holds now.

    ``policy_digest`` is :attr:`audit_plugin.policy.Policy.verdict_digest`, ``suite_digest`` that of the promotion suite.
    """

    gate: GatePolicy
    policy_digest: str
    suite_digest: str
    verdict_keys: VerifyingKeys
    waiver_keys: VerifyingKeys


@dataclass(frozen=True)
class Standing:
    """What speaks against promoting a version; nothing when ``reasons`` is empty.

    Attributes:
        reasons: why its attestation does not do, the weightiest first.
        attestation: the verdict that was signed for it, None if there is none that holds.
        waiver: a waiver in force, which makes up for every reason.
    """

    reasons: tuple[Reason, ...]
    attestation: Statement | None = None
    waiver: Statement | None = None

    @property
    def allowed(self) -> bool:
        return not self.reasons or self.waiver is not None

    @property
    def is_refuted(self) -> bool:
        """Whether something speaks against the version itself: a failed audit, changed files, a statement that does not hold."""
        return bool({reason.code for reason in self.reasons} & {*LAST_WORD, "bytes-changed", "bad-attestation"})

    @property
    def counts(self) -> bool:
        """Whether its audit need not be repeated: it allows the version, or fails it under the present rules."""
        return self.allowed or {reason.code for reason in self.reasons} <= LAST_WORD


def is_protected(name: str, protected: Iterable[str]) -> bool:
    """Whether an alias or stage is one of the protected ones, or could be to a database that ignores case and accents."""
    return not name.isascii() or _folded(name) in {_folded(entry) for entry in protected}


def is_sealed(key: str) -> bool:
    """Whether only a signed statement may write this tag: every ``audit.*`` tag but those that describe the model's input.

    So is every name with a dot that a database which ignores accents could take for one.
    """
    folded = _folded(key)
    return not is_input_tag(key) and (folded.startswith(AUDIT_PREFIX) or ("." in folded and not folded.isascii()))


def check_sealed_tag(
    version: VersionFacts, key: str, value: str, requirements: Requirements, *, now: datetime.datetime | None = None
) -> None:
    """That a sealed tag may be written: a statement, if it holds and is newer than the present one; else what one vouches for.

    A statement from the future is not taken: no other could replace it before its time has come.

    Args:
        now: the present, in UTC.

    Raises:
        AttestationError: it may not.
    """
    kind = next((kind for kind, tag in TAG_OF.items() if tag == key), None)
    if kind is None:
        if not any(statement.tags.get(key) == value for statement in _statements(version, requirements)):
            raise AttestationError(f"No signed statement on {version.uri} says '{key}' = '{value[:100]}'.")
        return
    keys = requirements.waiver_keys if kind == "waiver" else requirements.verdict_keys
    statement = verify(value, keys)
    check_statement(statement, version, kind)
    if statement.created > (now or datetime.datetime.now(datetime.UTC)) + _CLOCK_TOLERANCE:
        raise AttestationError(
            f"The statement on {version.uri} is dated {statement.created.isoformat()}, which is yet to come: the "
            "clock of whoever signed it runs ahead."
        )
    present = [held for held in _statements(version, requirements) if held.kind == kind]
    if present and statement.created <= present[0].created and value != version.tags[key]:
        raise AttestationError(f"{version.uri} has a newer statement of this kind already; an older one cannot come back.")


def must_stay(version: VersionFacts, key: str, requirements: Requirements) -> bool:
    """Whether a sealed tag may not be deleted: it is a statement, says what one vouches for, or is not there in this spelling."""
    value = version.tags.get(key)
    return (
        value is None
        or key in TAG_OF.values()
        or any(statement.tags.get(key) == value for statement in _statements(version, requirements))
    )


def _statements(version: VersionFacts, requirements: Requirements) -> list[Statement]:
    """Every statement on the version that holds."""
    found = []
    for kind in TAG_OF:
        with contextlib.suppress(AttestationError):
            held = held_statement(version, kind, requirements.waiver_keys if kind == "waiver" else requirements.verdict_keys)
            if held is not None:
                found.append(held)
    return found


def standing_of(
    version: VersionFacts, requirements: Requirements, *, digest: str | None, now: datetime.datetime | None = None
) -> Standing:
    """Judge a version by the statements in its tags.

    Args:
        digest: of the version's files as they are now; None leaves them out, which a promotion must never do.
        now: the present, in UTC.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    waiver = _waiver_in_force(version, requirements, digest, now)
    try:
        attestation = held_statement(version, "verdict", requirements.verdict_keys)
    except AttestationError as error:
        return Standing((Reason("bad-attestation", str(error)),), None, waiver)
    if attestation is None:
        return Standing((Reason("not-audited", "It has no signed audit."),), None, waiver)
    return Standing(tuple(_objections(version, attestation, requirements, digest, now)), attestation, waiver)


def held_statement(version: VersionFacts, kind: Kind, keys: VerifyingKeys) -> Statement | None:
    """The statement of a kind that the version's tags hold; None without one.

    Raises:
        AttestationError: what is there does not hold, or speaks of another version, or of one that was deleted since.
    """
    text = version.tags.get(TAG_OF[kind])
    if text is None:
        return None
    statement = verify(text, keys)
    check_statement(statement, version, kind)
    return statement


def check_statement(statement: Statement, version: VersionFacts, kind: Kind) -> None:
    """That a statement is of a kind and speaks of this very version.

    Raises:
        AttestationError: it does not.
    """
    if statement.kind != kind:
        raise AttestationError(f"The tag {TAG_OF[kind]} holds a statement of the kind '{statement.kind}', not '{kind}'.")
    if (statement.name, statement.version) != (version.name, version.version):
        raise AttestationError(f"Its attestation speaks of {statement.uri}, not of {version.uri}.")
    if statement.version_created != version.created:
        raise AttestationError(f"Its attestation speaks of another version that was once {version.uri}, not of this one.")


def _objections(
    version: VersionFacts, attestation: Statement, requirements: Requirements, digest: str | None, now: datetime.datetime
) -> Iterable[Reason]:
    facts, gate = attestation.facts, requirements.gate
    verdict = facts.get("verdict")
    if digest is not None and digest != attestation.digest:
        yield Reason(
            "bytes-changed", f"Its files were changed after the audit: they hash to {digest}, audited was {attestation.digest}."
        )
    if verdict != Verdict.PASS:
        yield Reason(f"verdict-{verdict}", f"Its audit says '{verdict}'.")
    promotion = facts.get("promotion") or {}
    if verdict == Verdict.PASS and promotion.get("allowed") is not True:
        yield Reason("promotion-suite", "Its audit passed, but the promotion suite did not allow it.")
    if facts.get("policy_digest") != requirements.policy_digest:
        yield Reason("another-policy", "It was audited by another policy than the one that holds now.")
    if promotion.get("suite_digest") != requirements.suite_digest:
        yield Reason("another-suite", "It was judged by another promotion suite than the one that holds now.")
    age = now - attestation.created
    if age > datetime.timedelta(days=gate.maximum_age_days):
        yield Reason(
            "expired", f"Its audit is {age.total_seconds() / 86400:.1f} days old; at most {gate.maximum_age_days:g} count."
        )
    if age < -_CLOCK_TOLERANCE:
        yield Reason("from-the-future", f"Its audit is dated {attestation.created.isoformat()}, which is yet to come.")


def _waiver_in_force(
    version: VersionFacts, requirements: Requirements, digest: str | None, now: datetime.datetime
) -> Statement | None:
    """The waiver of these very bytes, if it is signed, has not run out, and was not made for longer than the policy allows."""
    try:
        waiver = held_statement(version, "waiver", requirements.waiver_keys)
        if waiver is None:
            return None
        until = datetime.datetime.fromisoformat(waiver.facts["until"])
        longest = waiver.created + datetime.timedelta(days=requirements.gate.maximum_waiver_days) + _CLOCK_TOLERANCE
        in_time = until.tzinfo is not None and waiver.created - _CLOCK_TOLERANCE <= now < until <= longest
    except (AttestationError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return waiver if in_time and digest in (None, waiver.digest) else None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().casefold()
