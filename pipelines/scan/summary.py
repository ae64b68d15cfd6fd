"""What a scan found, what changed since the one before, and both as a signed document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from securesystemslib.signer import CryptoSigner

from audit_plugin.attestation import VerifyingKeys, seal, unseal
from audit_plugin.types import Verdict

Outcome = Literal["fail", "error", "inconclusive", "no clean images", "pending", "pass"]
"""The verdict on a version; else why there is none. In the order in which somebody should look at them."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
FailOn = Literal["any", "new"]

SUMMARY_FILE, SIGNED_FILE, PAGE_FILE = "summary.json", "summary.dsse.json", "summary.html"
_PAYLOAD_TYPE = "application/vnd.mlflow-backdoor-audit.scan+json"
_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One version.

    Attributes:
        created: when it was registered, ISO format; a version of the same name and number made anew has another time.
        audited: by this scan; else the verdict is of an earlier audit that still counts.
        digest: of its files, as far as this scan knows.
        reason: one line for a reader; of an error why.
        inputs: digest of the tags that say how images become input, and which clean images these are.
        refused: these very files cannot be audited, for a reason that lies in them or in those tags.
        suspected: name of the suspected class.
        run_id: of the audit.
    """

    name: str
    version: str
    created: str
    aliases: tuple[str, ...]
    promoted: bool
    outcome: Outcome
    audited: bool = False
    digest: str | None = None
    inputs: str = ""
    reason: str = ""
    refused: bool = False
    suspected: str | None = None
    run_id: str | None = None
    seconds: float = 0.0

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.name, self.version, self.created


@dataclass(frozen=True)
class Drift:
    """URIs of versions that are not as the last finished scan of the same scope left them.

    Attributes:
        alarming: promoted and failing, and not both before.
        gone: deleted, or no longer in scope.
    """

    newly_failing: tuple[str, ...] = ()
    newly_passing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    alarming: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """A whole scan.

    Attributes:
        run_id: of the scan's MLflow run; None of a dry run.
        conditions: what decides how an audit ends beside a version's files and images: policy, tool version, options.
        previous: run of the scan that ``drift`` compares with, None if there is none.
        notes: what a reader should know about all of it.
    """

    run_id: str | None
    started: str
    seconds: float
    scope: Mapping[str, Any]
    conditions: Mapping[str, Any]
    rows: tuple[Row, ...]
    previous: str | None = None
    drift: Drift = field(default_factory=Drift)
    notes: tuple[str, ...] = ()

    def of(self, *outcomes: Outcome) -> tuple[Row, ...]:
        """Rows with one of these outcomes."""
        return tuple(row for row in self.rows if row.outcome in outcomes)

    @property
    def metrics(self) -> dict[str, float]:
        """Headline figures by name."""
        audited = sum(row.audited for row in self.rows)
        signed = sum(row.outcome in tuple(Verdict) and not row.audited for row in self.rows)
        return {
            "found": len(self.rows),
            "audited": audited,
            "skipped": signed,
            **{outcome.replace(" ", "_"): len(self.of(outcome)) for outcome in OUTCOMES},
            "newly_failing": len(self.drift.newly_failing),
            "seconds": round(self.seconds, 3),
        }

    def exit_code(self, fail_on: FailOn) -> int:
        """1 if a version fails, 2 if one could not be audited, 3 if one has no verdict, else 0; the first that holds."""
        if self.of("fail") if fail_on == "any" else self.drift.newly_failing:
            return 1
        if self.of("error"):
            return 2
        # Nothing in scope is nothing measured, unless only what is new was asked for.
        nothing = not self.rows and self.scope.get("since") is None
        return 3 if nothing or self.of("inconclusive", "no clean images", "pending") else 0

    def document(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "format": _FORMAT,
            "run_id": self.run_id,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "scope": dict(self.scope),
            "conditions": dict(self.conditions),
            "metrics": self.metrics,
            "previous": self.previous,
            "drift": {name: list(uris) for name, uris in asdict(self.drift).items()},
            "notes": list(self.notes),
            "versions": [asdict(row) | {"aliases": list(row.aliases)} for row in self.rows],
        }


def summary_from(document: Mapping[str, Any]) -> Summary:
    """What :meth:`Summary.document` wrote, but for its drift and notes.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no such document.
    """
    if document["format"] != _FORMAT:
        raise ValueError("another format")
    rows = tuple(Row(**{**entry, "aliases": tuple(entry["aliases"])}) for entry in document["versions"])
    if not all(row.outcome in OUTCOMES for row in rows):
        raise ValueError("an unknown outcome")
    return Summary(
        document["run_id"],
        document["started"],
        float(document["seconds"]),
        dict(document["scope"]),
        dict(document["conditions"]),
        rows,
    )


def compared(summary: Summary, previous: Summary | None) -> Summary:
    """The summary with its drift since another one. Without one, whatever fails is newly failing, and nothing is new."""
    before = {row.key: row for row in previous.rows} if previous else {}
    now = {row.key for row in summary.rows}

    def uris(rows: Iterable[Row]) -> tuple[str, ...]:
        return tuple(row.uri for row in rows)

    def was(row: Row, outcome: Outcome) -> bool:
        return row.key in before and before[row.key].outcome == outcome

    def has_changed(row: Row) -> bool:
        earlier = before[row.key].digest if row.key in before else None
        return None not in (earlier, row.digest) and earlier != row.digest

    failing = summary.of("fail")
    newly = [row for row in failing if not was(row, "fail") or has_changed(row)]
    drift = Drift(
        newly_failing=uris(newly),
        newly_passing=uris(row for row in summary.of("pass") if row.key in before and not was(row, "pass")),
        changed=uris(row for row in summary.rows if has_changed(row)),
        new=uris(row for row in summary.rows if previous and row.key not in before),
        gone=uris(row for row in before.values() if row.key not in now),
        alarming=uris(row for row in failing if row.promoted and (row in newly or not before[row.key].promoted)),
    )
    return replace(summary, previous=previous.run_id if previous else None, drift=drift)


def sign_summary(summary: Summary, signer: CryptoSigner) -> str:
    """The document in a signed DSSE envelope, as JSON text."""
    return seal(summary.document(), _PAYLOAD_TYPE, signer)


def open_summary(text: str, run_id: str, keys: VerifyingKeys) -> Summary | None:
    """The summary of a run, from its text: signed, if there are keys, since any client can write an artifact.

    None for a text that does not hold.
    """
    try:
        summary = summary_from(json.loads(unseal(text, _PAYLOAD_TYPE, keys) if keys.keys else text))
    except Exception:  # a stranger's text; whatever is wrong with it, it is no summary of ours
        return None
    return summary if summary.run_id == run_id else None
