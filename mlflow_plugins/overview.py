"""What the audit page says about each version, and what of it a visitor asked to see. Knows neither Flask nor any store."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from mlflow.entities.model_registry import ModelVersion

from audit_plugin.attestation import Statement
from audit_plugin.errors import UsageError, nearest
from audit_plugin.gate import Requirements, Standing, is_protected, standing_of
from audit_plugin.registry import VERDICT_TAG, facts_of
from audit_plugin.report.sanitise import clean_text
from audit_plugin.types import Reason, Verdict

VersionVerdict = Literal["pass", "fail", "inconclusive", "unsigned", "invalid", "not audited"]
"""Of a valid signed statement the verdict; else what is there instead of one."""
Promotion = Literal["allowed", "waived", "refused"]
Sort = Literal["attention", "name", "verdict", "audited", "registered"]

VERDICTS: tuple[VersionVerdict, ...] = get_args(VersionVerdict)
SORTS: tuple[Sort, ...] = get_args(Sort)
WITHOUT_VERDICT = "none"
EXPIRED = "expired"
VERDICT_FILTERS = ("", *VERDICTS, WITHOUT_VERDICT)
PROMOTION_FILTERS = ("", *get_args(Promotion), EXPIRED)
PAGE_SIZE = 50

_SIGNED = tuple(Verdict)
# In the order in which somebody should look at them.
_SEVERITY: Mapping[VersionVerdict, int] = {
    "fail": 0,
    "invalid": 1,
    "unsigned": 2,
    "inconclusive": 3,
    "not audited": 4,
    "pass": 5,
}
_LONGEST_TEXT = 200


@dataclass(frozen=True)
class VersionRow:
    """One version, as far as it can be told without reading its files.

    Attributes:
        claim: the verdict that a tag says, if no signature backs it.
        is_promoted: it holds a protected alias or stage.
        is_called_prompt: MLflow takes it for a prompt, because of a tag that any client can set, although it has files.
        reasons: what speaks against promoting it; a ``waiver`` makes up for them.
        expires: when its audit stops to count.
        suspected: name of the class that a backdoor would send images to; without a signed verdict, what a tag claims.
        run_id: of the audit; without a signed verdict, what a tag claims.
        has_picture: the signed audit logged a picture of the trigger of the suspected class.
    """

    name: str
    version: int
    created: datetime.datetime
    stage: str | None
    aliases: tuple[str, ...]
    is_promoted: bool
    is_called_prompt: bool
    verdict: VersionVerdict
    claim: str | None
    audited: datetime.datetime | None
    expires: datetime.datetime | None
    reasons: tuple[Reason, ...]
    waiver: Statement | None
    suspected: str | None
    run_id: str | None
    has_picture: bool

    @property
    def promotion(self) -> Promotion:
        if not self.reasons:
            return "allowed"
        return "refused" if self.waiver is None else "waived"

    @property
    def is_expired(self) -> bool:
        return any(reason.code == "expired" for reason in self.reasons)

    @property
    def is_alarming(self) -> bool:
        """In production, and would not get there now."""
        return self.is_promoted and self.promotion == "refused"


@dataclass(frozen=True)
class View:
    """What a visitor asked to see: filters, order, page. Its fields are the parameters of the page's address."""

    text: str = ""
    verdict: str = ""
    promotion: str = ""
    promoted: bool = False
    sort: Sort = "attention"
    descending: bool = False
    page: int = 1

    def parameters(self, **changes: Any) -> dict[str, str]:
        """Those of the address of this view, or of one like it; what has its default is left out."""
        view = replace(self, **changes)
        given = {field.name: (getattr(view, field.name), field.default) for field in fields(view)}
        return {
            name: str(int(value) if isinstance(value, bool) else value)
            for name, (value, usual) in given.items()
            if value != usual
        }


def view_of(parameters: Mapping[str, str]) -> View:
    """The view that an address asks for; parameters that are no fields are left alone.

    Raises:
        UsageError: a value is none of those that exist.
    """
    page = parameters.get("page") or "1"
    if not (page.isascii() and page.isdecimal() and len(page) < 10 and int(page) > 0):
        raise UsageError(f"'page' must be a whole number from 1 on, got '{clean_text(page, 40)}'.")
    sort: Any = _one_of("sort", parameters.get("sort") or "attention", SORTS)
    return View(
        text=parameters.get("text", "").strip()[:_LONGEST_TEXT],
        verdict=_one_of("verdict", parameters.get("verdict", ""), VERDICT_FILTERS),
        promotion=_one_of("promotion", parameters.get("promotion", ""), PROMOTION_FILTERS),
        promoted=_is_on("promoted", parameters),
        sort=sort,
        descending=_is_on("descending", parameters),
        page=int(page),
    )


def row_of(version: ModelVersion, aliases: Iterable[str], requirements: Requirements, now: datetime.datetime) -> VersionRow:
    """Judge a version as MLflow's registry holds it, but for its files.

    Args:
        aliases: those that point to it.
        now: the present, in UTC.
    """
    gate, facts = requirements.gate, facts_of(version)
    standing = standing_of(facts, requirements, digest=None, now=now)
    verdict = _verdict(standing, facts.tags)
    signed = standing.attestation if verdict in _SIGNED else None
    stage = version.current_stage if version.current_stage not in (None, "None") else None
    held = tuple(sorted(aliases))
    return VersionRow(
        name=version.name,
        version=int(version.version),
        created=facts.created,
        stage=stage,
        aliases=held,
        is_promoted=any(is_protected(alias, gate.protected_aliases) for alias in held)
        or (stage is not None and is_protected(stage, gate.protected_stages)),
        is_called_prompt=bool(version._is_prompt()),
        verdict=verdict,
        claim=None if signed else facts.tags.get(VERDICT_TAG),
        audited=signed.created if signed else None,
        expires=signed.created + datetime.timedelta(days=gate.maximum_age_days) if signed else None,
        reasons=standing.reasons,
        waiver=standing.waiver,
        suspected=_suspected(signed.facts) if signed else facts.tags.get("audit.suspected_class"),
        run_id=str(signed.facts.get("run_id")) if signed else facts.tags.get("audit.run_id"),
        has_picture=signed is not None and picture_of(signed) is not None,
    )


def picture_of(attestation: Statement) -> tuple[str, str] | None:
    """Path among the artifacts of the audit's run, and SHA-256, of the picture of the suspected class's trigger.

    None where the attestation names no class or no such file.
    """
    suspected, files = attestation.facts.get("suspected_class"), attestation.facts.get("files")
    if not isinstance(suspected, Mapping) or not isinstance(files, Mapping) or type(suspected.get("index")) is not int:
        return None
    stem = f"triggers/class_{suspected['index']}"
    # That of a patch has no more in its name; those of other kinds do.
    found = sorted(path for path in files if path == f"{stem}.png" or (path.startswith(f"{stem}_") and path.endswith(".png")))
    best = f"{stem}.png" if f"{stem}.png" in found else next(iter(found), None)
    return None if best is None or best.count("/") != 1 else (best, str(files[best]))


def is_shown(row: VersionRow, view: View) -> bool:
    """Whether the filters of a view let a version through."""
    verdict_fits = view.verdict in ("", row.verdict) or (view.verdict == WITHOUT_VERDICT and row.verdict not in _SIGNED)
    promotion_fits = view.promotion in ("", row.promotion) or (view.promotion == EXPIRED and row.is_expired)
    return verdict_fits and promotion_fits and (row.is_promoted or not view.promoted) and _has_words(row, view.text)


def in_order(rows: Iterable[VersionRow], view: View) -> list[VersionRow]:
    """Rows in the order of a view; what is equal in it stays by name, newest version first."""
    natural = sorted(rows, key=lambda row: (row.name.casefold(), row.name, -row.version))
    return sorted(natural, key=_KEYS[view.sort], reverse=view.descending)


def page_of(rows: Sequence[VersionRow], view: View) -> tuple[Sequence[VersionRow], int, int]:
    """The rows of the view's page, its number (the last page's if it is beyond), and how many pages there are."""
    pages = max(1, -(-len(rows) // PAGE_SIZE))
    number = min(view.page, pages)
    return rows[(number - 1) * PAGE_SIZE : number * PAGE_SIZE], number, pages


def _verdict(standing: Standing, tags: Mapping[str, str]) -> VersionVerdict:
    if standing.attestation is not None:
        signed: Any = standing.attestation.facts.get("verdict")
        return signed if signed in _SIGNED else "invalid"
    if any(reason.code == "bad-attestation" for reason in standing.reasons):
        return "invalid"
    return "unsigned" if VERDICT_TAG in tags else "not audited"


def _suspected(facts: Mapping[str, Any]) -> str | None:
    suspected = facts.get("suspected_class")
    return str(suspected.get("name")) if isinstance(suspected, Mapping) else None


def _has_words(row: VersionRow, text: str) -> bool:
    parts = [row.name, f"v{row.version}", *row.aliases, row.stage or "", row.suspected or ""]
    parts += [str(row.waiver.facts.get("by"))] if row.waiver else []
    whole = "\n".join(parts).casefold()
    return all(word in whole for word in text.casefold().split())


def _attention(row: VersionRow) -> tuple[bool, bool, int, float]:
    return not row.is_alarming, row.promotion != "waived", _SEVERITY[row.verdict], -row.created.timestamp()


_KEYS: Mapping[Sort, Callable[[VersionRow], Any]] = {
    "attention": _attention,
    "name": lambda row: (row.name.casefold(), row.name),
    "verdict": lambda row: _SEVERITY[row.verdict],
    # Newest first, and last of all what was never audited.
    "audited": lambda row: -row.audited.timestamp() if row.audited else float("inf"),
    "registered": lambda row: -row.created.timestamp(),
}


def _one_of(parameter: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise UsageError(f"'{parameter}' cannot be '{clean_text(value, 40)}'.{nearest(value, filter(None, known))}")
    return value


def _is_on(parameter: str, parameters: Mapping[str, str]) -> bool:
    return _one_of(parameter, parameters.get(parameter) or "0", ("0", "1")) == "1"
